"""Orthogonalising: a matrix moves in all of its directions alike, instead of mostly in the few that gradients agree on.

With d the update of a matrix [rows, columns], U S V^T its singular value decomposition, |.| the root of the sum of
squares:

    o  = about U V^T, all singular values near 1                        by a few iterations of Newton and Schulz
    e  = d + w (o |d| / |o| - d)                                        w: how much of it is done
    d' = e |d| / |e|                                                    as long as d

Rows are outputs, columns all that is connected to one output (torch's convention); vectors and numbers are left alone.
The iteration is that of Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"): five
times there, of a momentum; here of the whole learned update, whose length and averaging remain the rule's. Fewer
iterations leave the weakest directions weak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.coordinates import Spread
from learned_optim.policy import PolicyConfig

#: a, b, c of X <- a X + (b A + c A^2) X, A = X X^T: the slope at 0, and with it the speed, is as large as it may be.
_ITERATION = (3.4445, -4.7750, 2.0315)


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int] | None:
    """How many of each a tensor of this shape has; ``None`` where it is no matrix of two by two or more."""
    if len(shape) < 2 or shape[0] < 2:
        return None
    columns = math.prod(shape[1:])
    return (shape[0], columns) if columns > 1 else None


def orthogonalised(d: Tensor, share: Spread, iterations: int) -> Tensor:
    """d' of the module's description.

    Args:
        d: [rows, columns], float32 or float64.
        share: w, 0-d; at 0 the result has the bits of d.
        iterations: each multiplies small singular values by 3.4, and costs six times rows times columns times the
            smaller of both.
    """
    tiny = torch.finfo(d.dtype).tiny ** 0.5
    length = _length(d, tiny)
    with torch.autocast(d.device.type, enabled=False):
        o = _newton_schulz(d / length, iterations)
    e = d + share * (o * (length / _length(o, tiny)) - d)
    return e * (length / _length(e, tiny))


def _newton_schulz(x: Tensor, iterations: int) -> Tensor:
    a, b, c = _ITERATION
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(iterations):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _length(x: Tensor, least: float) -> Tensor:
    # The floor keeps what is zero at zero, and the root differentiable there.
    return x.square().sum().clamp(min=least * least).sqrt()


def whole(config: PolicyConfig, d: Tensor, shapes: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
    """d' of whole tensors side by side in a vector, each padded to its size.

    Args:
        config: says how much, and how often.
        d: [n].
        shapes: of the tensors.
        sizes: coordinates of each in the vector, padding included.
    """
    pieces: list[Tensor] = []
    for piece, shape in zip(d.split(list(sizes)), shapes, strict=True):
        matrix = rows_and_columns(shape)
        if matrix is None:
            pieces.append(piece)
            continue
        numel = math.prod(shape)
        moved = orthogonalised(piece[:numel].view(matrix), config.orthogonal, config.orthogonal_iterations)
        pieces += [moved.reshape(-1), piece[numel:]]
    return torch.cat(pieces)
