"""Orthogonalising: a matrix moves in all of its directions alike, instead of mostly in the few that gradients agree on.

With d the update of a matrix [rows, columns], U S V^T its singular value decomposition and |.| the Frobenius norm:

    o  = about U V^T, all singular values near 1                        a few iterations of a polar method
    e  = d + w (o |d| / |o| - d)                                        w: how much of it is done
    c  = <d, o> / |d| |o|                                               near 1 where all directions count alike already
    d' = e |d| / |e| min(1, c / threshold)^q                            as long as d, or damped

Rows are outputs, columns everything connected to one output (torch's convention). Vectors are left alone, and so are
matrices with many more rows than columns, which are embeddings of words, or vocabularies that are predicted.

The default method is the iteration of Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
networks"): five times there, on a momentum; here on the whole learned update, whose length and averaging remain the
rule's. Fewer iterations leave the weakest directions weak.

A new polar method is a function with an entry in :data:`POLAR_METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.rule.layouts import WholeLayout, indices_by
from learned_optim.rule.types import Spread


class Orthogonalization(NamedTuple):
    """The settings of a policy; see :class:`~learned_optim.rule.config.PolicyConfig` for what they mean."""

    share: float
    method: str
    coefficients: tuple[float, ...]
    iterations: int
    aspect: float
    damping: float
    damping_threshold: float

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Rows and columns of a tensor that is orthogonalised; ``None`` where it is left alone.

        Such tensors have two rows and columns or more, and less than ``aspect`` rows per column.
        """
        if not self.share or len(shape) < 2 or shape[0] < 2:
            return None
        columns = math.prod(shape[1:])
        return (shape[0], columns) if columns > 1 and shape[0] < self.aspect * columns else None


def newton_schulz(x: Tensor, coefficients: Sequence[float], iterations: int) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, so often.

    Args:
        x: matrices of Frobenius norm 1, [B, rows, columns].
        coefficients: a, b, c. Of those that keep singular values near 1, (3.4445, -4.7750, 2.0315) have about the
            largest slope at 0, and so bring small ones up fastest: by 3.4 per iteration.
        iterations: each costs six times rows times columns times the smaller of both.
    """
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


#: ``(x [B, rows, columns] of Frobenius norm 1, coefficients, iterations) -> about U V^T`` of each.
POLAR_METHODS: dict[str, Callable[[Tensor, Sequence[float], int], Tensor]] = {"newton_schulz": newton_schulz}


def orthogonalize(settings: Orthogonalization, d: Tensor, share: Spread) -> tuple[Tensor, Tensor]:
    """d' of the module's description, for one matrix or many of the same size, and its length over d's, [..., 1, 1].

    Products of small ones cost little more together than one of them does.

    Args:
        settings: of the policy.
        d: [..., rows, columns], float32 or float64.
        share: w, a number for all or [..., 1, 1]; at 0 the result has the bits of d.
    """
    tiny = torch.finfo(d.dtype).tiny ** 0.5
    length = _frobenius_norm(d, tiny)
    unit = d / length
    with torch.autocast(d.device.type, enabled=False):
        polar = POLAR_METHODS[settings.method]
        o = polar(unit.reshape(-1, *d.shape[-2:]), settings.coefficients, settings.iterations).reshape(d.shape)
    o = o / _frobenius_norm(o, tiny)
    e = d + share * (o * length - d)
    factor = torch.ones_like(length)
    if settings.damping:
        cosine = (unit * o).sum((-2, -1), keepdim=True)  # positive, but for matrices of zeros
        threshold = settings.damping_threshold
        factor = (cosine.clamp(1e-3, threshold) / threshold) ** settings.damping
    return e * (length * factor / _frobenius_norm(e, tiny)), factor


def _frobenius_norm(x: Tensor, least: float) -> Tensor:
    # The floor keeps what is zero at zero, and the root differentiable there.
    return x.square().sum((-2, -1), keepdim=True).clamp(min=least * least).sqrt()


def orthogonalize_all(settings: Orthogonalization, d: Tensor, layout: WholeLayout, share: Spread) -> Tensor:
    """d' [n] of whole tensors side by side in a vector d [n]; equal shapes as one batch.

    Args:
        settings: of the policy.
        d: directions of all tensors.
        layout: where each tensor lies.
        share: w, a number for all or [K].
    """
    shapes, sizes = layout.shapes, layout.sizes
    parts = [[piece] for piece in d.split(sizes)]
    for shape, indices in indices_by(map(tuple, shapes)).items():
        matrix = settings.matrix_shape(shape)
        if matrix is None:
            continue
        numel = math.prod(shape)
        matrices = torch.stack([parts[i][0][:numel].view(matrix) for i in indices])
        part = share[indices].to(d.dtype).view(-1, 1, 1) if isinstance(share, Tensor) else share
        moved, _ = orthogonalize(settings, matrices, part)
        for i, one in zip(indices, moved.flatten(1).unbind(), strict=True):
            parts[i] = [one, parts[i][0][numel:]]
    return torch.cat([t for part in parts for t in part])
