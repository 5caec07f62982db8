"""Orthogonalising a matrix of which several processes hold parts, and what they must send each other for it.

Blocks of rows are orthogonalised by their Gram matrices alone. Where processes hold whole blocks, or columns of all
blocks, each computes its part of the Gram matrices; added up, all have the same, and each moves its own part: a block
of r rows and c columns costs r^2 coordinates in place of r c. Elsewhere the whole update is added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.engine.head import LengthFactors
from learned_optim.engine.param_state import ParamState
from learned_optim.engine.sharding import Sharded, Shards
from learned_optim.rule.orthogonalize import (
    Orthogonalization,
    along_blocks,
    block_scales,
    cut_into_blocks,
    orthogonalize,
)


class Matrix(NamedTuple):
    """A tensor that moves when its update has been orthogonalised."""

    param: ParamState
    d: Tensor  #: [numel]
    share: Tensor  #: [1], how much of it is orthogonalised


Move = Callable[[Sequence[ParamState], Sequence[Tensor]], None]


def orthogonalize_cut(
    settings: Orthogonalization, tensor: Sharded, here: Matrix | None, shards: Shards, move: Move
) -> Iterator[LengthFactors]:
    """Orthogonalise the update of a matrix that is cut, and move the part that is here.

    Args:
        settings: of the policy.
        tensor: the matrix; all processes call this for the same ones.
        here: ``None`` where this process holds nothing of it, or no gradient.
        shards: adds up.
        move: parameters along directions shaped like them.
    """
    yield from (_by_grams if sends_grams(settings, tensor) else _as_a_whole)(settings, tensor, here, shards, move)


def sends_grams(settings: Orthogonalization, tensor: Sharded) -> bool:
    """Whether the Gram matrices of its blocks are enough, and less than the matrix."""
    part = tensor.part
    rows, columns = part.shape[0], part.shape[1:].numel()
    smaller = min(rows, columns)
    r = settings.block_rows(smaller)
    chunk = dict(tensor.cut or ()).get(part.stacked)
    if chunk is None or tensor.cut != ((part.stacked, chunk),) or -(-smaller // r) * r * r >= rows * columns:
        return False
    if (rows > columns) != part.transposed:  # the larger side is cut
        return True
    begin, end = part.start[part.stacked], part.start[part.stacked] + part.lengths[part.stacked]
    inside = range(-(-begin // chunk) * chunk, end, chunk)
    fits = len(part.shape) == 2 or not part.transposed
    return fits and all((boundary - begin) % r == 0 for boundary in inside)


def _by_grams(
    settings: Orthogonalization, tensor: Sharded, here: Matrix | None, shards: Shards, move: Move
) -> Iterator[LengthFactors]:
    part = tensor.part
    rows, columns = part.shape[0], part.shape[1:].numel()
    flipped = rows > columns
    r = settings.block_rows(min(rows, columns))
    gram = torch.zeros(-(-min(rows, columns) // r), r, r, dtype=tensor.dtype, device=shards.device)
    if here is None:
        shards.add_up(gram)
        return
    stored = here.d.view(here.param.param.shape)
    d = stored.transpose(0, 1).flatten(1) if part.transposed else stored.flatten(1)
    oriented = d.mT if flipped else d
    with torch.autocast(d.device.type, enabled=False):
        x = cut_into_blocks(oriented.unsqueeze(0), r)
        begin = here.param.origin[0] // r if flipped == part.transposed else 0
        gram[begin : begin + len(x)] = x @ x.mT
        shards.add_up(gram)
        scale, factor = block_scales(settings, gram, 1, here.share.to(d.dtype))
        moved = along_blocks(scale[begin : begin + len(x)], x).flatten(0, 1)[: oriented.shape[0]]
    moved = moved.mT if flipped else moved
    if part.transposed:
        moved = moved.reshape(stored.shape[1], stored.shape[0], *stored.shape[2:]).transpose(0, 1)
    move([here.param], [moved.reshape(stored.shape)])
    yield LengthFactors([here.param.param_index], factor)


def _as_a_whole(
    settings: Orthogonalization, tensor: Sharded, here: Matrix | None, shards: Shards, move: Move
) -> Iterator[LengthFactors]:
    part = tensor.part
    d = torch.zeros(part.lengths[part.stacked :], dtype=tensor.dtype, device=shards.device).flatten(1)
    if here is None:
        shards.add_up(d)
        return
    mine = here.d.view(here.param.param.shape[0], -1)
    (row, column), (rows, width) = here.param.origin, mine.shape
    d[row : row + rows, column : column + width].copy_(mine)
    shards.add_up(d)
    whole, factor = orthogonalize(settings, here.param.matrices(d.unsqueeze(0)), here.share.to(d.dtype))
    stored = here.param.stored(whole).flatten(2)
    move([here.param], [stored[0, row : row + rows, column : column + width]])
    yield LengthFactors([here.param.param_index], factor)
