"""Clamps; compiled for a CPU they are comparisons of bit patterns as integers.

A float's clamp passes NaN on, for which inductor takes four instructions and ten cycles; an integer's is one of each,
and a sixth of all instructions of the update rule's kernel are saved. The bits of floats of one sign are ordered as the
floats are. A NaN may be clamped there; it reaches the update by other ways, since directions are not clamped.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from learned_optim.coordinates import Spread


def clamp_magnitude(x: Tensor, bound: float) -> Tensor:
    """``x`` between ``-bound`` and ``bound``."""
    if not _as_integers(x):
        return x.clamp(-bound, bound)
    bits = _bits(x)
    sign = torch.iinfo(bits.dtype).min
    return ((bits & ~sign).clamp(max=_bits_of(bound, x.dtype)) | (bits & sign)).view(x.dtype)


def clamp_positive(x: Tensor, low: Spread, high: float | None = None) -> Tensor:
    """``x >= 0`` between ``low > 0`` and ``high``; ``high`` has the last word."""
    if _as_integers(x):
        bits = _bits(x)
        if isinstance(low, Tensor):
            bits = torch.maximum(bits, _bits(low.to(x.dtype)))
        else:
            bits = bits.clamp(min=_bits_of(low, x.dtype))
        return (bits if high is None else bits.clamp(max=_bits_of(high, x.dtype))).view(x.dtype)
    if isinstance(low, Tensor):
        x = torch.maximum(x, low.to(x.dtype))
        return x if high is None else x.clamp(max=high)
    return x.clamp(min=low) if high is None else x.clamp(min(low, high), high)


def _as_integers(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not x.requires_grad


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def _bits_of(value: float, dtype: torch.dtype) -> int:
    code = ("<d", "<q") if dtype == torch.float64 else ("<f", "<i")
    return struct.unpack(code[1], struct.pack(code[0], value))[0]
