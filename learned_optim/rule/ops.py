"""Elementwise operations of the rule, written to be fast both compiled and not.

Compiled for a CPU, clamps are comparisons of bit patterns as integers. A float's clamp passes NaN on, for which
inductor takes four instructions and ten cycles; an integer's is one of each, which saves a sixth of all instructions of
the rule's kernel. The bits of floats of one sign are ordered as the floats are. A NaN may be clamped there; it reaches
the update by other ways, since directions are not clamped.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.rule.types import Spread


def bounded_ratio(x: Tensor, bound: float) -> Tensor:
    """A smooth, odd-in-log factor between 1/bound and bound: 1 at x = 0, f(-x) = 1 / f(x). One division."""
    a = (bound - 1.0) / (bound + 1.0)
    base = x.abs().add_(1.0)
    return torch.add(base, x, alpha=a) / torch.sub(base, x, alpha=a)


def linear(weights: Tensor | Sequence, inputs: list[Tensor]) -> list[Tensor]:
    """Rows of ``weights`` [R, I] times I inputs [n] -> R outputs; one product, or a chain where weights are floats.

    In a chain, terms whose weight is zero are left out.
    """
    if isinstance(weights, Tensor) and not torch.compiler.is_compiling():
        stacked = torch.stack(inputs)
        return list((weights.to(stacked.dtype) @ stacked).unbind())
    out = []
    for row in weights:
        if isinstance(row, Tensor) and not torch.compiler.is_compiling():
            stacked = torch.stack(inputs)
            out.append(row.to(stacked.dtype) @ stacked)
            continue
        terms = [(w, x) for w, x in zip(row, inputs, strict=True) if isinstance(w, Tensor) or w != 0.0]
        total = torch.mul(terms[0][1], terms[0][0]) if terms else torch.zeros_like(inputs[0])
        for w, x in terms[1:]:
            total = add_product(total, w, x)
        out.append(total)
    return out


def per_column(weight: Tensor, context: Tensor) -> Tensor:
    """[R, C] times [C, K] in float64; unlike those of a matrix product, a column's bits do not depend on K."""
    return (weight.double().unsqueeze(2) * context).sum(1)


def add_product(total: Tensor, factor: Spread, x: Tensor) -> Tensor:
    """``total + factor * x`` in one operation; ``total`` must not be used again, it may be overwritten."""
    return torch.addcmul(total, factor, x) if isinstance(factor, Tensor) else total.add_(x, alpha=factor)


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


@torch.compiler.assume_constant_result  # torch 2.6 cannot trace it
def _bits_of(value: float, dtype: torch.dtype) -> int:
    code = ("<d", "<q") if dtype == torch.float64 else ("<f", "<i")
    return struct.unpack(code[1], struct.pack(code[0], value))[0]
