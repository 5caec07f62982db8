"""Tensors of a step for which it does not count: their gradient is not finite, or has been zero so far."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learned_optim.engine.param_state import ParamState, uncount
from learned_optim.rule.types import TensorSums


def suspects(sums: Tensor) -> list[int]:
    """Columns of sums [S, K] that are not finite: every tensor is among them whose gradient is not.

    A gradient that is NaN or infinite makes itself NaN over the root of the second moment. The sums are there anyway.
    """
    if math.isfinite(float(sums.sum())):  # as in almost every step
        return []
    return (~sums.isfinite().all(0)).nonzero().flatten().tolist()


def is_finite(param: ParamState) -> bool:
    """Whether what is here of its gradient is finite."""
    return bool(param.grad.isfinite().all())


def without(params: list[ParamState], left_out: list[ParamState]) -> list[ParamState]:
    """The others, in order."""
    ids = {id(p) for p in left_out}
    return [p for p in params if id(p) not in ids]


def at_rest(params: list[ParamState], sums: TensorSums) -> list[ParamState]:
    """Those in their first step whose gradient is zero.

    Or so large that its square overflows: as their second moment, that would let them rest for good.
    """
    first = [i for i, p in enumerate(params) if p.is_first]
    if not first:  # as in almost every step; a GPU's answer would be waited for
        return []
    return [params[i] for i, u_u in zip(first, sums.u_u[first].tolist(), strict=True) if u_u == 0.0]


def take_back(params: list[ParamState]) -> None:
    """Let a first step without a gradient not count, when all else is done: the first is that with the first gradient.

    Counted, it would make a tensor old that knows nothing: after a hundred such steps the normalised gradient is ten
    times as large as it is in a first step, and nothing else in the mixture is.
    """
    uncount([p.count for p in params])
    if state := [tensor for p in params for tensor in (*p.tensor_state, *p.state_tensors)]:
        torch._foreach_zero_(state)  # pyright: ignore[reportPrivateImportUsage]
