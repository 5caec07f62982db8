"""Orthogonalising: a matrix moves in all of its directions alike, instead of mostly in the few that gradients agree on.

With d the update of a matrix [rows, columns], U S V^T its singular value decomposition, |.| the root of the sum of
squares:

    o  = about U V^T, all singular values near 1                        by a few iterations of Newton and Schulz
    e  = d + w (o |d| / |o| - d)                                        w: how much of it is done
    c  = <d, o> / |d| |o|                                               near 1 where all directions count alike already
    d' = e |d| / |e| min(1, c / 0.7)^q                                  as long as d, or shorter

Rows are outputs, columns all that is connected to one output (torch's convention). Vectors and numbers are left alone,
and so are matrices with many more rows than columns, which are embeddings of words, or vocabularies that are predicted.
The iteration is that of Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"): five
times there, of a momentum; here of the whole learned update, whose length and averaging remain the rule's. Fewer
iterations leave the weakest directions weak.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from learned_optim.coordinates import Spread
from learned_optim.policy import PolicyConfig

#: a, b, c of X <- a X + (b A + c A^2) X, A = X X^T: the slope at 0, and with it the speed, is as large as it may be.
_ITERATION = (3.4445, -4.7750, 2.0315)
#: From this cosine on nothing is shortened: most matrices of the training families lie between 0.5 and 0.7, small ones
#: and output layers above.
_UNTURNED = 0.7


def rows_and_columns(shape: Sequence[int], aspect: float) -> tuple[int, int] | None:
    """How many of each a tensor of this shape has; ``None`` where it is no matrix to be orthogonalised.

    Those have two rows and columns or more, and less than ``aspect`` rows per column.
    """
    if len(shape) < 2 or shape[0] < 2:
        return None
    columns = math.prod(shape[1:])
    return (shape[0], columns) if columns > 1 and shape[0] < aspect * columns else None


def orthogonalised(d: Tensor, share: Spread, iterations: int, shortening: float = 0.0) -> tuple[Tensor, Tensor]:
    """d' of the module's description, for one matrix or many of the same size, and how long it is over d, [..., 1, 1].

    Products of small ones cost little more together than one of them does.

    Args:
        d: [..., rows, columns], float32 or float64.
        share: w, a number for all or [..., 1, 1]; at 0 the result has the bits of d.
        iterations: each multiplies small singular values by 3.4, and costs six times rows times columns times the
            smaller of both.
        shortening: q; with 0 the result is as long as d.
    """
    tiny = torch.finfo(d.dtype).tiny ** 0.5
    length = _length(d, tiny)
    unit = d / length
    with torch.autocast(d.device.type, enabled=False):
        o = _newton_schulz(unit.reshape(-1, *d.shape[-2:]), iterations).reshape(d.shape)
    o = o / _length(o, tiny)
    e = d + share * (o * length - d)
    factor = torch.ones_like(length)
    if shortening:
        cosine = (unit * o).sum((-2, -1), keepdim=True)  # positive, but for matrices of zeros
        factor = (cosine.clamp(1e-3, _UNTURNED) / _UNTURNED) ** shortening
    return e * (length * factor / _length(e, tiny)), factor


def as_configured(config: PolicyConfig, d: Tensor, share: Spread) -> tuple[Tensor, Tensor]:
    """:func:`orthogonalised` as often, and shortened as much, as a policy's configuration says."""
    return orthogonalised(d, share, config.orthogonal_iterations, config.orthogonal_shortening)


def _newton_schulz(x: Tensor, iterations: int) -> Tensor:
    a, b, c = _ITERATION
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _length(x: Tensor, least: float) -> Tensor:
    # The floor keeps what is zero at zero, and the root differentiable there.
    return x.square().sum((-2, -1), keepdim=True).clamp(min=least * least).sqrt()


def alike(keys: Iterable[Hashable]) -> list[list[int]]:
    """Numbers of those whose keys are equal, in the order in which they first occur."""
    found: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        found.setdefault(key, []).append(number)
    return list(found.values())


def whole(config: PolicyConfig, d: Tensor, shapes: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
    """d' of whole tensors side by side in a vector, each padded to its size.

    Args:
        config: says how much, and how often.
        d: [n].
        shapes: of the tensors.
        sizes: coordinates of each in the vector, padding included.
    """
    parts = [[piece] for piece in d.split(list(sizes))]
    for numbers in alike(map(tuple, shapes)):
        shape = shapes[numbers[0]]
        matrix = rows_and_columns(shape, config.orthogonal_aspect)
        if matrix is None:
            continue
        numel = math.prod(shape)
        matrices = torch.stack([parts[i][0][:numel].view(matrix) for i in numbers])
        moved, _ = as_configured(config, matrices, config.orthogonal)
        for i, one in zip(numbers, moved.flatten(1).unbind(), strict=True):
            parts[i] = [one, parts[i][0][numel:]]
    return torch.cat([t for part in parts for t in part])
