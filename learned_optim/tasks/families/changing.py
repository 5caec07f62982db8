"""Training families whose target changes along the run: all at once, several times, or slowly."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..base import LossFn, ModuleTask, Task, TaskFamily
from ..data_images import IMAGE_SOURCES, preprocess
from ..nets import Style, initialise, mlp, random_style
from ..objectives import classification, regression
from ..sampling import Data, chance, choice, integer, log_int, run_length, spawn, split, uniform
from .vision import hidden_widths, mlp_work

Source = Callable[[torch.Generator, int, bool], Data]
"""``source(rng, n, held_out)``: raw examples, before a concept has its say."""

Concept = Callable[[int, Data], Data]
"""``concept(k, raw) -> (inputs, targets)``: what concept number ``k`` makes of raw examples."""


class Changing(nn.Module):
    """A network, and the number of the concept that it was trained on last: a buffer, so that it goes with the run."""

    concept: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("concept", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def start_steps(rng: torch.Generator, concepts: int, length: int) -> list[int]:
    """The steps at which each concept begins, from 0 on; no stretch is longer than three times another."""
    stretches = 0.5 + torch.rand(concepts, generator=rng)
    ends = stretches.cumsum(0) / stretches.sum() * length
    return [0, *(round(float(end)) for end in ends[:-1])]


def changing_task(
    rng: torch.Generator,
    widths: Sequence[int],
    style: Style,
    source: Source,
    concept: Concept,
    concepts: int,
    *,
    classes: bool,
    batch_size: int,
    length: int,
) -> ModuleTask:
    """A perceptron's run through ``concepts`` concepts in order, which change when the seed of the batches says.

    With ``classes``, targets are labels. Batches are ``(inputs, targets, number of the concept)``. The held-out loss is
    that of the concept of the last batch, after a whole run the last one of all.
    """

    objective: LossFn = classification if classes else regression

    def batches(batch_rng: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        starts = start_steps(batch_rng, concepts, length)
        for step in count():
            k = bisect.bisect_right(starts, step) - 1
            yield *concept(k, source(batch_rng, batch_size, False)), torch.tensor(k)

    def loss(module: Any, batch: tuple[Tensor, ...]) -> Tensor:
        if len(batch) == 3:
            module.concept.copy_(batch[2])
            return objective(module, batch[:2])
        return objective(module, tuple(t.index_select(0, module.concept.view(1)).squeeze(0) for t in batch))

    make_rng = spawn(rng)

    def held_out() -> Data:
        # The examples are the same for all concepts, so that two of them differ by what changes and nothing else.
        parts = [concept(k, source(make_rng(), 512 if concepts < 10 else 256, True)) for k in range(concepts)]
        return tuple(torch.stack(tensors) for tensors in zip(*parts, strict=True))

    return ModuleTask(
        lambda: Changing(initialise(mlp(widths, style), style)), batches, loss, length=length, eval_batch=held_out
    )


def gaussian_source(inputs: int, outputs: int) -> Source:
    """Standard normal inputs [n, inputs] and what the noise of the targets is made of, uniform, [n, outputs]."""

    def source(rng: torch.Generator, n: int, held_out: bool) -> Data:
        return torch.randn(n, inputs, generator=rng), torch.rand(n, outputs, generator=rng)

    return source


def image_source(rng: torch.Generator, kind: str, size: int, classes: int) -> Source:
    """Flat images [n, size * size] and labels [n]: one of 4,000 (512 of them held out) under fresh noise."""
    make_rng, how, noise = spawn(rng), choice(rng, ("standardised", "per_pixel")), uniform(rng, 0.3, 1.0)

    @functools.cache
    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        images, labels = IMAGE_SOURCES[kind](data_rng, 4000, classes, size=size)
        return split((preprocess(images, how).flatten(1), labels), data_rng)

    def source(rng: torch.Generator, n: int, held_out: bool) -> Data:
        data = load()[held_out]
        index = torch.randint(len(data[0]), (n,), generator=rng)
        images, labels = (t[index] for t in data)
        return images + noise * torch.randn(images.shape, generator=rng), labels

    return source


def teacher_concept(
    inner: Callable[[int], Tensor], outer: Callable[[int], Tensor], noise: float, classes: bool
) -> Concept:
    """Targets ``sin(x inner_k) outer_k`` with noise, or labels: the largest of them, in part of the cases any."""

    def concept(k: int, raw: Data) -> Data:
        x, chances = raw
        y = (x @ inner(k)).sin() @ outer(k)
        if classes:
            wrong = chances[:, 0] < 0.3 * noise
            return x, torch.where(wrong, (chances[:, 1] * y.shape[1]).long(), y.argmax(1))
        return x, y + noise * math.sqrt(12.0) * (chances - 0.5)

    return concept


def permuted_pixels(orders: Sequence[Tensor]) -> Concept:
    return lambda k, raw: (raw[0][:, orders[k]], raw[1])


def permuted_labels(orders: Sequence[Tensor]) -> Concept:
    return lambda k, raw: (raw[0], orders[k][raw[1]])


def flowing_pixels(turned: Callable[[Tensor, int], Tensor], order: Tensor) -> Concept:
    """Images that turn towards themselves with pixels in another order; ``turned`` as in :func:`drifting_targets`."""
    return lambda k, raw: (turned(torch.stack([raw[0], raw[0][:, order]]), k), raw[1])


def switching_targets(rng: torch.Generator) -> Task:
    """Three to six times the work becomes another: what continual learning and changing markets do to a run.

    Either a random network that gives targets or labels is exchanged, wholly or in its last layer, or its inputs are
    permuted; or images keep their labels under permuted pixels, or get permuted labels.
    """
    kind = choice(rng, ("teacher", "last_layer", "inputs", "pixels", "labels"))
    images, style, batch_size = kind in ("pixels", "labels"), random_style(rng), log_int(rng, 24, 128)
    classes, noise, make_rng = images or chance(rng, 0.4), uniform(rng, 0.0, 0.2), spawn(rng)
    size, inputs = integer(rng, 10, 16), log_int(rng, 8, 48)
    outputs = integer(rng, 20, 60) if images else integer(rng, 3, 8) if classes else integer(rng, 1, 4)
    widths = [size * size if images else inputs, *hidden_widths(rng, 96, 384, (1, 3)), outputs]
    length = run_length(rng, 450, 800, batch_size * mlp_work(widths), seconds=4.0)
    concepts = integer(rng, 4, max(4, min(7, length // 100)))
    data_rng = make_rng()
    if images:
        source = image_source(rng, choice(rng, ("shapes", "strokes", "blobs")), size, outputs)
        n = outputs if kind == "labels" else size * size
        orders = [torch.randperm(n, generator=data_rng) for _ in range(concepts)]
        concept = permuted_labels(orders) if kind == "labels" else permuted_pixels(orders)
    else:
        source, units = gaussian_source(inputs, outputs), integer(rng, 8, 32)
        gain = uniform(rng, 0.7, 1.3)
        inner = gain * torch.randn(concepts, inputs, units, generator=data_rng) / math.sqrt(inputs)
        outer = torch.randn(concepts, units, outputs, generator=data_rng) * math.sqrt(2 / units)
        if kind == "inputs":
            inner = torch.stack([inner[0, torch.randperm(inputs, generator=data_rng)] for _ in range(concepts)])
        concept = teacher_concept(
            lambda k: inner[0 if kind == "last_layer" else k],
            lambda k: outer[0 if kind == "inputs" else k],
            noise,
            classes,
        )
    return changing_task(
        rng, widths, style, source, concept, concepts, classes=classes, batch_size=batch_size, length=length
    )


def drifting_targets(rng: torch.Generator) -> Task:
    """The relation of targets to inputs turns slowly, in 40 small stages, by an eighth to half a turn.

    A random network's weights turn, or pixels of images flow into one another: habits and sensors that change while
    a model is trained on them. What was learned stays nearly right and is never wholly right.
    """
    kind = choice(rng, ("regression", "classification", "images"))
    style, batch_size, noise, make_rng = random_style(rng), log_int(rng, 24, 128), uniform(rng, 0.0, 0.2), spawn(rng)
    size, inputs, concepts, turn = integer(rng, 10, 16), log_int(rng, 8, 48), 40, uniform(rng, 0.25, 1.0) * math.pi
    images, classes = kind == "images", kind != "regression"
    outputs = integer(rng, 20, 60) if images else integer(rng, 3, 8) if classes else integer(rng, 1, 4)
    widths = [size * size if images else inputs, *hidden_widths(rng, 96, 384, (1, 3)), outputs]
    length = run_length(rng, 400, 800, batch_size * mlp_work(widths), seconds=4.0)
    data_rng = make_rng()

    def turned(pair: Tensor, k: int) -> Tensor:
        """From one of two tensors [2, ...] towards the other."""
        angle = turn * k / (concepts - 1)
        return math.cos(angle) * pair[0] + math.sin(angle) * pair[1]

    if images:
        source = image_source(rng, choice(rng, ("shapes", "strokes", "blobs")), size, outputs)
        concept = flowing_pixels(turned, torch.randperm(size * size, generator=data_rng))
    else:
        source, units = gaussian_source(inputs, outputs), integer(rng, 6, 24)
        inner = uniform(rng, 0.7, 1.3) * torch.randn(2, inputs, units, generator=data_rng) / math.sqrt(inputs)
        outer = torch.randn(units, outputs, generator=data_rng) * math.sqrt(2 / units)
        concept = teacher_concept(lambda k: turned(inner, k), lambda k: outer, noise, classes)
    return changing_task(
        rng, widths, style, source, concept, concepts, classes=classes, batch_size=batch_size, length=length
    )


FAMILIES = (
    TaskFamily("switching_targets", "targets, labels or inputs that switch 3 to 6 times", "train", switching_targets),
    TaskFamily("drifting_targets", "targets or inputs that turn slowly", "train", drifting_targets),
)
