"""Tensors of a step for which it does not count: their gradient is not finite, or has been zero so far."""

from __future__ import annotations

import math

from torch import Tensor

from learned_optim.engine.param_state import ParamState, uncount
from learned_optim.rule.types import TensorState, TensorSums

_AGE = TensorState._fields.index("age")


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
    """Those in their second step that never had a gradient but zero."""
    second = [i for i, p in enumerate(params) if p.is_second and p.rows is None]
    if not second:  # as in almost every step; a GPU's answer would be waited for
        return []
    moved = (sums.u_u + sums.b_b)[second].tolist()  # of gradient and momentum, in all processes
    still = [params[i] for i, x in zip(second, moved, strict=True) if x == 0.0]
    return [p for p in still if not bool(p.state_tensors[1].any())]  # squares that overflow divide to zero


def take_back(params: list[ParamState]) -> None:
    """Let a second step without any gradient so far not count, when all else is done.

    Counted, such steps would make a tensor old that knows nothing: after a hundred of them the normalised gradient is
    ten times as large as it is in a first step, and nothing else in the mixture is. The first step counts in any case:
    below an output layer of zeros every tensor rests for one, and the unrolled rule counts for all of them together.
    """
    uncount([p.count for p in params])
    for p in params:
        for tensor in (*p.tensor_state, *p.state_tensors):  # trust and a GRU's hidden state move without a gradient
            tensor.zero_()
        p.tensor_state[_AGE].fill_(1.0)
