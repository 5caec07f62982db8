"""Training family that fine-tunes: perceptrons trained on one generator of tables learn what another one makes."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base import Task, TaskFamily
from ..data_optional import standardise
from ..nets import Style, mlp
from ..objectives import classification, regression
from ..pretrained import Recipe
from ..sampling import Data, chance, choice, dataset_task, integer, spawn, split, uniform
from .fine_tuning import draw_tuning, mislabelled, tuned_network, tuning_set


class World(NamedTuple):
    """How tables come about: a few hidden causes, seen through the columns, that decide the targets."""

    view: Tensor  #: [causes, columns]
    first: Tensor  #: [causes, 48]
    second: Tensor  #: [48, outputs]


class TableNetwork(NamedTuple):
    columns: int
    outputs: int
    classes: bool
    widths: tuple[int, ...]
    style: Style


TABLE_NETWORKS = {
    "wide": TableNetwork(24, 4, False, (256,), Style("relu")),
    "deep": TableNetwork(40, 2, False, (96, 96, 96, 96), Style("silu", "layer", residual=True)),
    "norm": TableNetwork(16, 8, True, (160, 96), Style("relu", "batch")),
    "classes": TableNetwork(60, 12, True, (128, 128), Style("gelu", "rms")),
    "plain": TableNetwork(12, 3, False, (128, 128, 128), Style("tanh")),
    "long": TableNetwork(100, 5, True, (192, 96, 48), Style("gelu", "layer")),
}
CAUSES, HIDDEN = 10, 48


def drawn_world(rng: torch.Generator, columns: int, outputs: int) -> World:
    return World(
        torch.randn(CAUSES, columns, generator=rng) / math.sqrt(CAUSES),
        1.5 * torch.randn(CAUSES, HIDDEN, generator=rng) / math.sqrt(CAUSES),
        torch.randn(HIDDEN, outputs, generator=rng),
    )


def table_rows(world: World, classes: bool, n: int, rng: torch.Generator, noise: float) -> Data:
    """``n`` rows: columns, and standardised targets or the class whose score is highest."""
    causes = torch.randn(n, CAUSES, generator=rng)
    columns = causes @ world.view
    columns = columns + 0.3 * torch.randn(columns.shape, generator=rng)
    scores = standardise((causes @ world.first).sin() @ world.second)
    scores = scores + noise * torch.randn(scores.shape, generator=rng)
    return columns, scores.argmax(1) if classes else scores


def _world_of(name: str) -> World:
    """That of pre-training."""
    network, rng = TABLE_NETWORKS[name], torch.Generator().manual_seed(100 + sorted(TABLE_NETWORKS).index(name))
    return drawn_world(rng, network.columns, network.outputs)


def _table_pretraining(name: str) -> Task:
    network, world, rng = TABLE_NETWORKS[name], _world_of(name), torch.Generator().manual_seed(0)
    rows = table_rows(world, network.classes, 20_000, rng, 0.2)
    return dataset_task(
        functools.partial(_table_network, network),
        lambda: (rows, rows),  # nobody asks for a held-out loss
        classification if network.classes else regression,
        batch_size=128,
        length=1500,
    )


def _table_network(network: TableNetwork) -> nn.Module:
    return mlp([network.columns, *network.widths, network.outputs], network.style)


TABLE_RECIPES = {name: Recipe(f"tables_{name}", lambda name=name: _table_pretraining(name)) for name in TABLE_NETWORKS}


def turned(old: Tensor, new: Tensor, angle: float) -> Tensor:
    """From ``old`` (angle 0) to ``new`` (a right angle); independent entries keep their variance."""
    return math.cos(angle) * old + math.sin(angle) * new


def finetune_tables(rng: torch.Generator) -> Task:
    """A perceptron trained on 20,000 rows learns from a few hundred of a related table.

    Both tables are noisy views of the same hidden causes, as the records of two hospitals are; columns and what they
    decide have turned by some angle. The old head stays if the targets are the old ones, turned too; new questions
    about the same features get a new head. A part of the targets belongs to other rows.
    """
    name, tuning, make_rng = choice(rng, sorted(TABLE_NETWORKS)), draw_tuning(rng), spawn(rng)
    network, (n, batch_size, length) = TABLE_NETWORKS[name], tuning_set(rng)
    same_head, classes, outputs = chance(rng, 0.4), chance(rng, 0.5), integer(rng, 2, 10)
    classes, outputs = (network.classes, network.outputs) if same_head else (classes, outputs)
    angles = uniform(rng, 0.0, 0.8), uniform(rng, 0.0, 0.8), uniform(rng, 0.2, 1.2)
    noise, wrong = uniform(rng, 0.1, 0.8), choice(rng, (0.0, 0.05, 0.1, 0.3))

    def load() -> tuple[Data, Data]:
        data_rng, old = make_rng(), _world_of(name)
        new = drawn_world(data_rng, network.columns, outputs)
        second = turned(old.second, new.second, angles[2]) if same_head else new.second
        world = World(turned(old.view, new.view, angles[0]), turned(old.first, new.first, angles[1]), second)
        rows = table_rows(world, classes, n + 512, data_rng, noise)
        return split(mislabelled(rows, wrong, data_rng), data_rng, held_out=512 / (n + 512))

    return dataset_task(
        lambda: tuned_network(
            TABLE_RECIPES[name],
            functools.partial(_table_network, network),
            tuning,
            None if same_head else outputs,
        ),
        load,
        classification if classes else regression,
        batch_size=batch_size,
        length=length,
    )


FAMILIES = (
    TaskFamily("finetune_tables", "pre-trained perceptrons on few rows of a related table", "train", finetune_tables),
)
