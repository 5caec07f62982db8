"""Train a task once, with any optimizer: what evaluation, gradient-free estimators and the bench have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim.tasks.base import Task, batches_of
from learned_optim.tasks.recipe import Schedule, constant


class Curve(NamedTuple):
    """One trajectory."""

    losses: list[float]  #: training loss before each inner step; ``inf`` from the first non-finite one on
    held_out: float | None  #: held-out loss at the end, where the task has held-out data
    held_out_along: Sequence[float] = ()  #: held-out losses where they were asked for, where the task has such data


def train(
    task: Task,
    seed: int,
    make_optimizer: Callable[[list[Tensor]], Optimizer],
    steps: int,
    *,
    schedule: Schedule = constant,
    clip_norm: float = math.inf,
    held_out: bool = False,
    evaluate_at: Sequence[int] = (),
) -> Curve:
    """Train ``task`` for ``steps`` inner steps.

    Args:
        task: what is trained.
        seed: of the initial parameters (``seed``) and of the batches (``seed + 1``), as in meta-training.
        make_optimizer: from the list of parameters.
        steps: inner steps.
        schedule: factor of the learning rate as a function of the part of the run that is done, in [0, 1).
        clip_norm: gradients of a larger norm, over all parameters together, are shortened to this one.
        held_out: take the held-out loss at the end.
        evaluate_at: take it after so many steps, too; in order, from 1 to ``steps``.
    """
    params, buffers = task.init(torch.Generator().manual_seed(seed))
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    optimizer = make_optimizer(list(leaves.values()))
    warm = getattr(task, "warm_start", None)
    if warm is not None:
        warm.apply(optimizer, leaves)
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = batches_of(task, torch.Generator().manual_seed(seed + 1))
    eval_loss: Any = getattr(task, "eval_loss", None) if held_out or evaluate_at else None
    losses: list[float] = []
    along: list[float] = []

    def evaluated() -> float:
        with torch.no_grad():
            return float(eval_loss(leaves, buffers))

    for step in range(steps):
        if schedule is not constant:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step / steps)
        loss = task.loss(leaves, buffers, next(batches))
        value = loss.item()
        if not math.isfinite(value):
            losses += [math.inf] * (steps - step)
            missing = len(evaluate_at) - len(along) if eval_loss is not None else 0
            return Curve(losses, math.inf if held_out else None, along + [math.inf] * missing)
        losses.append(value)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for p, g in zip(leaves.values(), grads, strict=True):
            p.grad = g
        if math.isfinite(clip_norm):
            torch.nn.utils.clip_grad_norm_(leaves.values(), clip_norm)
        optimizer.step()
        if eval_loss is not None and step + 1 in evaluate_at:
            along += [evaluated()] * list(evaluate_at).count(step + 1)
    return Curve(losses, evaluated() if held_out and eval_loss is not None else None, along)


def smoothed(losses: Sequence[float], end: int) -> float:
    """Mean of the last tenth of the first ``end`` losses."""
    width = max(1, round(end * 0.1))
    return sum(losses[end - width : end]) / width
