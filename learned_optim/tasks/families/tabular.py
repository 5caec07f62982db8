"""Families on tables: classification, regression, recommendation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..base import LossFn, Task, TaskFamily
from ..data_optional import CLASSIFICATION_TABLES, optional_import, standardise, table
from ..nets import initialise, mlp, random_style
from ..objectives import classification, regression
from ..sampling import (
    Data,
    chance,
    choice,
    dataset_task,
    integer,
    log_int,
    log_uniform,
    run_length,
    spawn,
    split,
    uniform,
)
from .vision import hidden_widths, mlp_work


def table_classification(rng: torch.Generator) -> Task:
    name, make_rng = choice(rng, CLASSIFICATION_TABLES), spawn(rng)
    inputs, outputs = {"iris": (4, 3), "wine": (13, 3), "breast_cancer": (30, 2)}[name]
    return _small_table(rng, lambda: split(table(name), make_rng()), inputs, outputs, classification)


def table_regression(rng: torch.Generator) -> Task:
    name, make_rng = choice(rng, ("diabetes", "diabetes", "linnerud")), spawn(rng)
    inputs, outputs = {"diabetes": (10, 1), "linnerud": (3, 3)}[name]
    return _small_table(rng, lambda: split(table(name), make_rng()), inputs, outputs, regression)


def _small_table(
    rng: torch.Generator, load: Callable[[], tuple[Data, Data]], inputs: int, outputs: int, loss: LossFn
) -> Task:
    """A random perceptron on a table of few columns."""
    style, batch_size = random_style(rng), log_int(rng, 8, 128)
    widths = [inputs, *hidden_widths(rng, 8, 256, (1, 4)), outputs]
    length = run_length(rng, 200, 500, batch_size * mlp_work(widths))
    return dataset_task(
        lambda: initialise(mlp(widths, style), style),
        load,
        loss,
        batch_size=batch_size,
        length=length,
    )


def teacher_regression(rng: torch.Generator) -> Task:
    """Columns of unequal scale, some heavy-tailed; targets from a random network, with noise."""
    inputs, outputs, n = log_int(rng, 4, 100), integer(rng, 1, 5), log_int(rng, 500, 8000)
    style, batch_size, make_rng = random_style(rng), log_int(rng, 8, 256), spawn(rng)
    noise, spread, standardised = uniform(rng, 0.0, 0.5), uniform(rng, 0.0, 1.5), chance(rng, 0.5)
    widths = [inputs, *hidden_widths(rng, 16, 256, (1, 4)), outputs]

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        x = torch.randn(n, inputs, generator=data_rng)
        heavy = torch.rand(inputs, generator=data_rng) < 0.2
        hidden = (x @ torch.randn(inputs, 16, generator=data_rng) / math.sqrt(inputs) * 2).sin()
        y = hidden @ torch.randn(16, outputs, generator=data_rng)
        y = standardise(y) + noise * torch.randn(y.shape, generator=data_rng)
        x = torch.where(heavy, x.sign() * x.abs().exp().sub(1), x)
        x = standardise(x) if standardised else x * (spread * torch.randn(inputs, generator=data_rng)).exp()
        return split((x, y), data_rng)

    length = run_length(rng, 200, 800, batch_size * mlp_work(widths))
    return dataset_task(
        lambda: initialise(mlp(widths, style), style), load, regression, batch_size=batch_size, length=length
    )


class Recommender(nn.Module):
    """Scores ``[batch]`` of (user, item) pairs ``[batch, 2]``: dot product and biases, or a network on embeddings."""

    def __init__(self, users: int, items: int, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.user = nn.Embedding(users, width)
        self.item = nn.Embedding(items, width)
        self.item_bias = nn.Embedding(items, 1)
        self.network = mlp_head(2 * width, hidden) if hidden else None
        for embedding in (self.user, self.item, self.item_bias):
            nn.init.normal_(embedding.weight, std=scale)

    def forward(self, pairs: Tensor) -> Tensor:
        user, item = self.user(pairs[:, 0]), self.item(pairs[:, 1])
        bias = self.item_bias(pairs[:, 1]).squeeze(1)
        if self.network is None:
            return (user * item).sum(1) + bias
        return self.network(torch.cat([user, item], 1)).squeeze(1) + bias


def mlp_head(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def likes(module: nn.Module, batch: Data) -> Tensor:
    """Binary cross-entropy (nats) of "liked" (0 or 1) for (user, item) pairs."""
    pairs, liked = batch
    return nn.functional.binary_cross_entropy_with_logits(module(pairs), liked)


def recommender(rng: torch.Generator) -> Task:
    """Nearly all parameters sit in embeddings, and a few popular items get most of the gradients."""
    users, items, width = log_int(rng, 100, 6000), log_int(rng, 100, 6000), log_int(rng, 4, 64)
    hidden, n = choice(rng, (0, 16, 64)), 20 * (users + items)
    scale, skew, make_rng = log_uniform(rng, 0.05, 0.5), uniform(rng, 1.0, 3.0), spawn(rng)

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        user = torch.randint(users, (n,), generator=data_rng)
        item = (items * torch.rand(n, generator=data_rng) ** skew).long()
        taste = torch.randn(users, 4, generator=data_rng)[user] * torch.randn(items, 4, generator=data_rng)[item]
        appeal = torch.randn(items, generator=data_rng)[item]
        liked = torch.rand(n, generator=data_rng) < torch.sigmoid(1.5 * taste.sum(1) + 1.5 * appeal)
        return split((torch.stack([user, item], 1), liked.float()), data_rng, held_out=0.1)

    return dataset_task(
        lambda: Recommender(users, items, width, hidden, scale),
        load,
        likes,
        batch_size=log_int(rng, 32, 256),
        length=run_length(rng, 200, 800),
    )


FORMULAS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    # Inputs are uniform in (0, 1), one argument per column; constants put every term within reach of the others.
    "pendulum_period": (2, lambda length, swing: (0.2 + length).sqrt() * (1 + swing**2 / 4 + 9 * swing**4 / 64)),
    "lens": (2, lambda near, bend: 1 / (1 / (0.3 + near) + 0.5 + bend)),
    "planck": (2, lambda wave, heat: (0.2 + wave) ** -5 / torch.expm1(2 / ((0.2 + wave) * (0.5 + heat)))),
    "gravity": (
        6,
        lambda a, b, x, y, u, v: (0.1 + a) * (0.1 + b) / (0.1 + (x - u) ** 2 + (y - v) ** 2),
    ),
    "relativistic_speed": (2, lambda u, v: (u + 0.9 * v) / (1 + 0.9 * u * v)),
    "damped_wave": (4, lambda t, decay, tone, phase: (-3 * decay * t).exp() * (6 + 12 * tone * t + 6 * phase).cos()),
    "interference": (
        5,
        lambda x, gap, wave, p, q: p**2 + q**2 + 2 * p * q * (6 * x * (1 + gap) / (0.3 + wave)).cos(),
    ),
    "van_der_waals": (4, lambda t, v, a, b: (0.5 + t) / (0.6 + v - 0.4 * b) - a / (0.6 + v) ** 2),
    "snell": (2, lambda ratio, angle: torch.asin((0.95 * ratio) * (1.5 * angle).sin())),
    "rocket": (3, lambda speed, dry, fuel: (0.5 + speed) * torch.log1p(3 * fuel / (0.1 + dry))),
}


def val_formula_regression(rng: torch.Generator) -> Task:
    """Two formulas of physics at once, with irrelevant columns and a little noise."""
    names = [choice(rng, sorted(FORMULAS)) for _ in range(2)]
    idle, n, make_rng = integer(rng, 0, 8), log_int(rng, 3000, 12000), spawn(rng)
    inputs = sum(FORMULAS[name][0] for name in names) + idle
    style, batch_size = random_style(rng), log_int(rng, 32, 256)
    widths = [inputs, *hidden_widths(rng, 96, 512, (2, 5)), 2]

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        x = torch.rand(n, inputs, generator=data_rng)
        columns, targets = iter(x.unbind(1)), []
        for name in names:
            count, formula = FORMULAS[name]
            targets.append(formula(*(next(columns) for _ in range(count))))
        y = standardise(torch.stack(targets, 1))
        y = y + 0.05 * torch.randn(y.shape, generator=data_rng)
        return split((standardise(x), y), data_rng)

    length = run_length(rng, 500, 2000, batch_size * mlp_work(widths), seconds=10.0)
    return dataset_task(
        lambda: initialise(mlp(widths, style), style), load, regression, batch_size=batch_size, length=length
    )


GENERATED_TABLES = {
    # scikit-learn's generator, its options, inputs, classes (0: regression)
    "friedman1": ({"n_features": 20, "noise": 0.5}, 20, 0),
    "friedman2": ({"noise": 1.0}, 4, 0),
    "friedman3": ({"noise": 0.05}, 4, 0),
    "classification": ({"n_features": 40, "n_informative": 10, "n_classes": 6, "class_sep": 1.5}, 40, 6),
    "gaussian_quantiles": ({"n_features": 10, "n_classes": 5}, 10, 5),
    "hastie_10_2": ({}, 10, 2),
}


def val_generated_tables(rng: torch.Generator) -> Task:
    name = choice(rng, sorted(GENERATED_TABLES))
    options, inputs, classes = GENERATED_TABLES[name]
    n, seed, make_rng = log_int(rng, 2000, 8000), integer(rng, 0, 2**31 - 1), spawn(rng)
    style, batch_size = random_style(rng), log_int(rng, 32, 256)
    widths = [inputs, *hidden_widths(rng, 96, 512, (2, 4)), classes or 1]

    def load() -> tuple[Data, Data]:
        make = getattr(optional_import("sklearn.datasets"), f"make_{name}")
        x, y = make(n_samples=n, random_state=seed, **options)
        inputs = standardise(torch.as_tensor(x, dtype=torch.float32))
        if classes:
            return split((inputs, torch.as_tensor(y > 0 if classes == 2 else y, dtype=torch.int64)), make_rng())
        return split((inputs, standardise(torch.as_tensor(y, dtype=torch.float32)[:, None])), make_rng())

    length = run_length(rng, 500, 1500, batch_size * mlp_work(widths), seconds=10.0)
    return dataset_task(
        lambda: initialise(mlp(widths, style), style),
        load,
        classification if classes else regression,
        batch_size=batch_size,
        length=length,
    )


FAMILIES = (
    TaskFamily("table_classification", "perceptrons on iris, wine, breast cancer", "train", table_classification),
    TaskFamily("table_regression", "perceptrons on diabetes and linnerud", "train", table_regression),
    TaskFamily("teacher_regression", "perceptrons that imitate a random network", "train", teacher_regression),
    TaskFamily("recommender", "user and item embeddings, skewed popularity", "train", recommender),
    TaskFamily("val_formula_regression", "perceptrons on formulas of physics", "validation", val_formula_regression),
    TaskFamily("val_generated_tables", "perceptrons on generated tables", "validation", val_generated_tables),
)
