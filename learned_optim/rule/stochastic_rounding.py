"""State in two bytes: rounding that is right on average, and the same whenever the step is the same.

Rounded to the nearest bfloat16, a slow average would stand still as soon as its steps are below half a unit in the
last place, 0.2% of its value. Stochastic rounding keeps the average moving. Its noise is not drawn: it is hashed
from the bits of the coordinate's second moment, a float32 that changes with every step and knows nothing of where
the coordinate lies. A run that is resumed, or whose tensors are grouped otherwise, rounds in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.rule.types import CoordinateState

#: Bits that a float32 loses, by what it becomes.
_LOST = {torch.bfloat16: 16, torch.float16: 13}


def rounded_state(state: CoordinateState, dtypes: Sequence[torch.dtype]) -> CoordinateState:
    """The state as it is kept, in its ``dtypes``: what is kept in two bytes is rounded stochastically."""
    if not any(dtype in _LOST for dtype in dtypes):
        return state
    noise = _noise(state.exp_avg_sq)
    pairs = zip(state.tensors, dtypes, strict=True)
    return CoordinateState.of([_rounded(x, dtype, noise) if dtype in _LOST else x for x, dtype in pairs])


def _noise(x: Tensor) -> Tensor:
    """int32 whose lower bits look random, from x as a float32: a multiplicative hash, twice."""
    bits = x.to(torch.float32).view(torch.int32) * -1640531535
    return ((bits >> 15) ^ bits) * 73244475 >> 15


def _rounded(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    # Noise below the last bit that stays, added to the magnitude, then cut off: up with the right probability. An
    # infinity stays one; the usual NaN too.
    below = (1 << _LOST[dtype]) - 1
    bits = x.to(torch.float32).view(torch.int32) + (noise & below)
    return (bits & ~below).view(torch.float32).to(dtype)
