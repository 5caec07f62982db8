"""Random choices drawn from a ``torch.Generator``, and tasks made of data sets."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .base import LossFn, ModuleTask, draw_seed

T = TypeVar("T")


def uniform(rng: torch.Generator, low: float, high: float) -> float:
    """A number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=rng))


def log_uniform(rng: torch.Generator, low: float, high: float) -> float:
    """A number from [low, high) whose logarithm is uniform."""
    return math.exp(uniform(rng, math.log(low), math.log(high)))


def log_int(rng: torch.Generator, low: int, high: int) -> int:
    """An integer from low to high inclusive, roughly uniform in its logarithm."""
    return min(int(log_uniform(rng, low, high + 1)), high)


def integer(rng: torch.Generator, low: int, high: int) -> int:
    """An integer from low to high inclusive."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def choice(rng: torch.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[integer(rng, 0, len(options) - 1)]


def chance(rng: torch.Generator, probability: float) -> bool:
    """True with the given probability."""
    return float(torch.rand((), generator=rng)) < probability


def spawn(rng: torch.Generator) -> Callable[[], torch.Generator]:
    """Draws a seed now and returns a maker of generators with it: for data that is made later, or made again."""
    seed = draw_seed(rng)
    return lambda: torch.Generator().manual_seed(seed)


Data = tuple[Tensor, ...]
"""Tensors of equal length along dimension 0, one row per example."""


def split(data: Data, rng: torch.Generator, held_out: float = 0.2) -> tuple[Data, Data]:
    """Shuffles examples and splits them into (training, held-out); the held-out part has at most 512 of them."""
    n = len(data[0])
    order = torch.randperm(n, generator=rng)
    n_held_out = max(1, min(512, round(held_out * n)))
    return tuple(t[order[n_held_out:]] for t in data), tuple(t[order[:n_held_out]] for t in data)


def dataset_batches(data: Data, batch_size: int, rng: torch.Generator) -> Iterator[Data]:
    """Yields batches for ever, reshuffling at each pass; drops an incomplete last batch.

    A data set smaller than ``batch_size`` gives full batches of all examples.
    """
    n = len(data[0])
    size = min(batch_size, n)
    while True:
        order = torch.randperm(n, generator=rng)
        for start in range(0, n - size + 1, size):
            index = order[start : start + size]
            yield tuple(t[index] for t in data)


def run_length(rng: torch.Generator, low: int, high: int, work: float = 0.0, seconds: float = 2.0) -> int:
    """Draws a number of inner steps between low and high, log-uniform.

    Args:
        rng: source of the choice.
        low: fewest steps.
        high: most steps.
        work: multiply-adds of one forward pass (parameters times examples, for an MLP). Expensive tasks get fewer
            steps, though never fewer than ``low``.
        seconds: roughly how long the whole run may take on one core at 50 GFLOP/s.
    """
    affordable = int(seconds * 50e9 / (6 * work)) if work > 0 else high  # backward costs twice the forward pass
    return max(low, min(log_int(rng, low, high), affordable))


def dataset_task(
    make_module: Callable[[], nn.Module],
    load: Callable[[], tuple[Data, Data]],
    loss_fn: LossFn,
    *,
    batch_size: int,
    length: int,
    change: Callable[[Data, torch.Generator], Data] | None = None,
) -> ModuleTask:
    """A task on a fixed data set; ``load() -> (training, held-out)`` runs once, at first use.

    With ``change``, which makes another batch of a batch, no example is seen twice as it is, so that none can be
    memorised.
    """
    load = functools.cache(load)

    def batches(rng: torch.Generator) -> Iterator[Data]:
        if change is None:
            yield from dataset_batches(load()[0], batch_size, rng)
        else:
            change_rng = torch.Generator().manual_seed(draw_seed(rng))
            for batch in dataset_batches(load()[0], batch_size, rng):
                yield change(batch, change_rng)

    return ModuleTask(
        make_module,
        batches,
        loss_fn,
        length=length,
        eval_batch=lambda: load()[1],
    )
