"""Orthogonalising: a matrix moves in all of its directions alike, instead of mostly in the few that gradients agree on.

With d the update of a matrix, X_b its blocks of rows, |.| the Frobenius norm and w the share that is orthogonalised:

    A_b = X_b X_b^T / |X_b|^2                      Gram matrices: all that follows sees only these, until the last line
    Q_b = polynomial of A_b                        so that all singular values of o_b = Q_b X_b / |X_b| come near 1
    c   = <d, o> / |d| |o|                         near 1 where all directions count alike already
    e   = d + w (o |d| / |o| - d)
    d'  = e |d| / |e| min(1, c / threshold)^(q w)  as long as d, or damped: d'_b = S_b X_b with S_b from A_b and Q_b;
                                                   0 where d is

Rows are outputs, columns everything connected to one output (torch's convention); of matrices with more rows than
columns, the columns are cut into blocks. Vectors are left alone, and so are embeddings of words and vocabularies that
are predicted: by their role where it is known, else because they have many more rows than columns. Blocks make the
price per parameter the same for matrices of any size.

The default method is the iteration of Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
networks"): five times there, on a momentum; here on the whole learned update, whose length and averaging remain the
rule's. Fewer iterations leave the weakest directions weak. A new method is a function with an entry in
:data:`POLAR_METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.rule.layouts import ORTHOGONALIZED, Role, WholeLayout, indices_by
from learned_optim.rule.types import Spread

#: Sizes of blocks are multiples of this, if they can be.
EVEN = 8


class Orthogonalization(NamedTuple):
    """The settings of a policy; see :class:`~learned_optim.rule.config.PolicyConfig` for what they mean."""

    share: float
    method: str
    coefficients: tuple[float, ...]
    iterations: int
    block: int
    aspect: float
    damping: float
    damping_threshold: float

    def matrix_shape(self, shape: Sequence[int], role: Role | None = None) -> tuple[int, int] | None:
        """Rows and columns of a tensor that is orthogonalised; ``None`` where it is left alone.

        Such tensors have two rows and columns or more, and a role that asks for it; without a role, less than
        ``aspect`` rows per column.
        """
        if not self.share or len(shape) < 2 or shape[0] < 2:
            return None
        columns = math.prod(shape[1:])
        wanted = shape[0] < self.aspect * columns if role is None else role in ORTHOGONALIZED
        return (shape[0], columns) if columns > 1 and wanted else None

    def block_rows(self, rows: int) -> int:
        """Of each block of a matrix whose smaller side has so many rows."""
        blocks = -(-rows // self.block) if self.block else 1
        r = -(-rows // blocks)
        # Products of odd sizes take a third longer.
        return min(-(-r // EVEN) * EVEN, self.block) if blocks > 1 else r


def newton_schulz(gram: Tensor, coefficients: Sequence[float], iterations: int) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, so often, as a polynomial of the first A.

    Args:
        gram: of matrices of Frobenius norm 1, [N, r, r].
        coefficients: a, b, c. Of those that keep singular values near 1, (3.4445, -4.7750, 2.0315) have about the
            largest slope at 0, and so bring small ones up fastest: by 3.4 per iteration.
        iterations: each costs six or eight times r^3.
    """
    a, b, c = coefficients
    diagonal = scaled_identity(a, gram)
    total = gram
    for i in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + diagonal
        total = factor if i == 0 else factor @ total
        if i < iterations - 1:
            gram = factor @ gram @ factor
    return total


def scaled_identity(scale: float, like: Tensor) -> Tensor:
    """A multiple of the identity, of the last dimension's size, dtype and device of ``like``; kept between steps."""
    if torch.compiler.is_compiling():
        return scale * torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return _scaled_identity(scale, like.shape[-1], like.dtype, like.device)


@lru_cache(maxsize=256)
def _scaled_identity(scale: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made there could not be used with gradients later
        return scale * torch.eye(size, dtype=dtype, device=device)


#: ``(gram [N, r, r] of X with Frobenius norm 1, coefficients, iterations) -> Q``, so that Q X is about U V^T.
POLAR_METHODS: dict[str, Callable[[Tensor, Sequence[float], int], Tensor]] = {"newton_schulz": newton_schulz}


def orthogonalize(settings: Orthogonalization, d: Tensor, share: Spread) -> tuple[Tensor, Tensor]:
    """d' of the module's description for matrices of the same size, and its length over d's, [B].

    Args:
        settings: of the policy.
        d: [B, rows, columns], float32 or float64.
        share: w, a number for all or [B].
    """
    x = as_blocks(settings, d)
    with torch.autocast(d.device.type, enabled=False):
        scale, factor = block_scales(settings, x @ x.mT, len(d), share)
        return from_blocks(along_blocks(scale, x), d.shape), factor


def along_blocks(scale: Tensor, x: Tensor) -> Tensor:
    """S_b X_b, but 0 where X_b is: a coordinate that never had a gradient, such as a pruned weight, does not move."""
    return (scale @ x).masked_fill(x == 0.0, 0.0)


def as_blocks(settings: Orthogonalization, d: Tensor) -> Tensor:
    """X_b: [B, rows, columns] -> [N, r, c] with N = B times blocks of r rows each, or of columns where those are fewer.

    Blocks are of equal size, a multiple of ``EVEN`` where that is no more than ``settings.block``; the last one of a
    matrix may end in zeros, which change nothing.
    """
    x = d.mT if d.shape[1] > d.shape[2] else d
    return cut_into_blocks(x, settings.block_rows(x.shape[1]))


def cut_into_blocks(x: Tensor, r: int) -> Tensor:
    """[B, rows, columns] -> [N, r, columns], with zeros at the end of each."""
    if missing := -x.shape[1] % r:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, r, x.shape[2])


def from_blocks(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`as_blocks`, for matrices of ``shape`` [B, rows, columns]."""
    count, rows, columns = shape
    d = x.reshape(count, -1, x.shape[2])[:, : min(rows, columns)]
    return d.mT if rows > columns else d


def block_scales(settings: Orthogonalization, gram: Tensor, matrices: int, share: Spread) -> tuple[Tensor, Tensor]:
    """S_b [N, r, r], and by how much each matrix is damped [matrices].

    Args:
        settings: of the policy.
        gram: X_b X_b^T, [N, r, r], the blocks of a matrix one after the other.
        matrices: how many; each has the same number of blocks.
        share: w, a number for all or [matrices].
    """

    def per_matrix(of_blocks: Tensor) -> Tensor:
        return of_blocks if len(gram) == matrices else of_blocks.view(matrices, -1).sum(1)

    def per_block(of_matrices: Tensor) -> Tensor:
        if len(gram) == matrices:
            return of_matrices.view(-1, 1, 1)
        return of_matrices.unsqueeze(1).expand(matrices, len(gram) // matrices).reshape(-1, 1, 1)

    tiny = torch.finfo(gram.dtype).tiny  # keeps what is zero at zero, and roots differentiable there
    square = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=tiny)  # |X_b|^2
    gram = gram / square.view(-1, 1, 1)
    polar = POLAR_METHODS[settings.method](gram, settings.coefficients, settings.iterations)
    product = polar @ gram
    root, length = square.sqrt(), per_matrix(square).sqrt()
    of_o = per_matrix((product * polar).sum((1, 2))).clamp(min=tiny).sqrt()
    inner = per_matrix(product.diagonal(dim1=1, dim2=2).sum(1) * root)  # <d, o>
    cosine = inner / (length * of_o)  # positive, but for matrices of zeros
    factor = (cosine.clamp(1e-3, settings.damping_threshold) / settings.damping_threshold) ** (settings.damping * share)
    rest, size = 1.0 - share, factor
    mixed = isinstance(rest, Tensor) or rest
    if mixed:
        of_e = rest * rest + 2.0 * rest * share * cosine + share * share  # |e|^2 / |d|^2
        size = factor / of_e.clamp(min=tiny).sqrt()
    scale = polar * (per_block(size * share * length / of_o) / root.view(-1, 1, 1))
    if mixed:
        scale = scale + per_block(size * rest) * scaled_identity(1.0, gram)
    return scale, factor


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
    for (shape, role), indices in indices_by(zip(map(tuple, shapes), layout.roles, strict=True)).items():
        matrix = settings.matrix_shape(shape, role)
        if matrix is None:
            continue
        numel = math.prod(shape)
        matrices = torch.stack([parts[i][0][:numel].view(matrix) for i in indices])
        part = share[indices].to(d.dtype) if isinstance(share, Tensor) else share
        moved, _ = orthogonalize(settings, matrices, part)
        for i, one in zip(indices, moved.flatten(1).unbind(), strict=True):
            parts[i] = [one, parts[i][0][numel:]]
    return torch.cat([t for part in parts for t in part])
