"""Runs that begin with second moments known beforehand, in place of an empty optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import Tensors


class WarmStart(NamedTuple):
    """What is known of a task's gradients before its first step.

    A task with an attribute ``warm_start`` of this type begins every run with it, in meta-training as in
    :func:`~learned_optim.tasks.rollout.train`. This is for weights that were trained before: their second moments
    need not be found out again in the first steps, in which Adam's are mostly noise. First moments and hidden states
    begin at zero.
    """

    second_moments: Tensors  #: mean squares of the gradient, by parameter, shaped like it
    steps: int  #: as if they had been gathered over this many steps; decides the bias correction

    def apply(self, optimizer: Optimizer, params: Tensors) -> None:
        """Put ``optimizer``, fresh over ``params``, into this state; nothing happens where it keeps no such moments."""
        begin_warm(optimizer, list(params.values()), [self.second_moments[name] for name in params], self.steps)


@torch.no_grad()
def begin_warm(optimizer: Optimizer, params: Sequence[Tensor], second_moments: Sequence[Tensor], steps: int) -> None:
    """Give an optimizer, before its first step, second moments as if gathered over ``steps`` steps.

    Any optimizer will do that keeps them as Adam does, under ``step`` and ``exp_avg_sq``; others are left alone. An
    ``age``, as :class:`~learned_optim.LearnedOptimizer` keeps it, becomes ``steps`` too.

    Raises:
        ValueError: moments that do not fit the parameters, that are negative or not finite; or ``steps`` below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, found {steps}")
    for p, moment in zip(params, second_moments, strict=True):
        if p.shape != moment.shape:
            raise ValueError(f"second moments of shape {tuple(moment.shape)} for a parameter of {tuple(p.shape)}")
        if not bool((moment.isfinite() & (moment >= 0.0)).all()):
            raise ValueError(f"second moments of a parameter of shape {tuple(p.shape)} are negative or not finite")
    # State is made at the first step, so a step that changes nothing is taken: no gradient, no learning rate.
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    everything = list(dict.fromkeys([*params, *(p for group in groups for p in group["params"])]))
    grads = {p: p.grad for p in everything}
    try:
        for group in groups:
            group["lr"] = 0.0
        for p in everything:
            p.grad = None
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for p, grad in grads.items():
            p.grad = grad
    for p, moment in zip(params, second_moments, strict=True):
        state = optimizer.state[p]
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].copy_(moment)
            for count in {"step", "age"} & state.keys():
                state[count] = torch.full_like(state[count], float(steps))
            # What a learned rule made of the empty gradient; all else is still zero.
            for said in {"log_pace", "trust"} & state.keys():
                state[said] = torch.zeros_like(state[said])
