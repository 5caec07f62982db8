"""Train a task once, with any optimizer: what evaluation, gradient-free estimators and the bench have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim.tasks.base import Task


class Curve(NamedTuple):
    """One trajectory."""

    losses: list[float]  #: training loss before each inner step; ``inf`` from the first non-finite one on
    held_out: float | None  #: held-out loss at the end, where the task has held-out data


def train(
    task: Task,
    seed: int,
    make_optimizer: Callable[[list[Tensor]], Optimizer],
    steps: int,
    *,
    schedule: Callable[[float], float] | None = None,
    held_out: bool = False,
) -> Curve:
    """Train ``task`` for ``steps`` inner steps.

    Args:
        task: what is trained.
        seed: of the initial parameters (``seed``) and of the batches (``seed + 1``), as in meta-training.
        make_optimizer: from the list of parameters.
        steps: inner steps.
        schedule: factor of the learning rate as a function of the part of the run that is done, in [0, 1).
        held_out: take the held-out loss at the end.
    """
    params, buffers = task.init(torch.Generator().manual_seed(seed))
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    optimizer = make_optimizer(list(leaves.values()))
    warm = getattr(task, "warm_start", None)
    if warm is not None:
        warm.apply(optimizer, leaves)
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = task.batches(torch.Generator().manual_seed(seed + 1))
    losses: list[float] = []
    for step in range(steps):
        if schedule is not None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step / steps)
        loss = task.loss(leaves, buffers, next(batches))
        value = loss.item()
        if not math.isfinite(value):
            losses += [math.inf] * (steps - step)
            return Curve(losses, math.inf if held_out else None)
        losses.append(value)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for p, g in zip(leaves.values(), grads, strict=True):
            p.grad = g
        optimizer.step()
    end = None
    eval_loss = getattr(task, "eval_loss", None)
    if held_out and eval_loss is not None:
        with torch.no_grad():
            end = float(eval_loss(leaves, buffers))
    return Curve(losses, end)


def cosine(done: float) -> float:
    """Cosine decay to zero, as a ``schedule``."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def smoothed(losses: Sequence[float], end: int) -> float:
    """Mean of the last tenth of the first ``end`` losses."""
    width = max(1, round(end * 0.1))
    return sum(losses[end - width : end]) / width
