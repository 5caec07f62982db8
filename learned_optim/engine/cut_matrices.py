"""Orthogonalising a matrix of which several processes hold parts, and what they must send each other for it.

Blocks of rows are orthogonalised by their Gram matrices alone. Where processes hold whole blocks, or columns of all
blocks, each computes its part of the Gram matrices; added up, all have the same, and each moves its own part: a block
of r rows and c columns costs r^2 coordinates in place of r c. Elsewhere the whole update is added up. What all matrices
of a step send goes into one vector, or into a few where it is long: a message costs time, however short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.engine.head import LengthFactors
from learned_optim.engine.packing import COPIED, bins, limit
from learned_optim.engine.param_state import ParamIndex, ParamState
from learned_optim.engine.sharding import Sharded, Shards
from learned_optim.rule.layouts import indices_by
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
    decay: Tensor  #: [1], weight decay beside the user's


Move = Callable[[Sequence[ParamState], Sequence[Tensor], Sequence[Tensor]], None]


def orthogonalize_cut(
    settings: Orthogonalization,
    tensors: Mapping[ParamIndex, Sharded],
    matrices: Mapping[ParamIndex, Matrix],
    shards: Shards,
    move: Move,
) -> Iterator[LengthFactors]:
    """Orthogonalise the updates of matrices that are cut, and move the parts that are here.

    Args:
        settings: of the policy.
        tensors: the matrices; all processes call this for the same ones, in the same order.
        matrices: of them, those of which this process holds something with a gradient.
        shards: adds up.
        move: parameters along directions shaped like them, given the decay of each.
    """
    of = {index: _Grams if sends_grams(settings, tensor) else _Whole for index, tensor in tensors.items()}
    cut = [of[index](settings, tensor, matrices.get(index)) for index, tensor in tensors.items()]
    for dtype, which in indices_by(tensor.dtype for tensor in tensors.values()).items():
        for some in bins((cut[i] for i in which), lambda one: one.size, limit(COPIED, shards.device)):
            vector = torch.zeros(sum(one.size for one in some), dtype=dtype, device=shards.device)
            sent = vector.split([one.size for one in some])
            for one, piece in zip(some, sent, strict=True):
                one.put(piece)
            shards.add_up(vector)
            for one, piece in zip(some, sent, strict=True):
                yield from one.finish(piece, move)


class _Cut(Protocol):
    """A matrix of which this process holds a part, or nothing."""

    size: int  #: coordinates that it sends

    def put(self, sent: Tensor) -> None:
        """Write what is here into zeros, [size]."""
        ...

    def finish(self, sent: Tensor, move: Move) -> Iterator[LengthFactors]:
        """Move what is here, given the sum over all processes."""
        ...


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


class _Grams(_Cut):
    def __init__(self, settings: Orthogonalization, tensor: Sharded, here: Matrix | None) -> None:
        part = tensor.part
        rows, columns = part.shape[0], part.shape[1:].numel()
        self._settings, self._here, self._transposed = settings, here, part.transposed
        self._flipped = rows > columns
        self._r = settings.block_rows(min(rows, columns))
        self._shape = -(-min(rows, columns) // self._r), self._r, self._r
        self.size = math.prod(self._shape)
        if here is not None:
            stored = here.d.view(here.param.param.shape)
            d = stored.transpose(0, 1).flatten(1) if part.transposed else stored.flatten(1)
            self._oriented = d.mT if self._flipped else d
            begin = here.param.origin[0] // self._r if self._flipped == part.transposed else 0
            self._blocks = slice(begin, begin + -(-len(self._oriented) // self._r))

    def _x(self) -> Tensor:
        return cut_into_blocks(self._oriented.unsqueeze(0), self._r)

    def put(self, sent: Tensor) -> None:
        if self._here is not None:
            with torch.autocast(sent.device.type, enabled=False):
                x = self._x()
                sent.view(self._shape)[self._blocks] = x @ x.mT

    def finish(self, sent: Tensor, move: Move) -> Iterator[LengthFactors]:
        here = self._here
        if here is None:
            return
        with torch.autocast(sent.device.type, enabled=False):
            scale, factor = block_scales(self._settings, sent.view(self._shape), 1, here.share.to(sent.dtype))
            moved = along_blocks(scale[self._blocks], self._x()).flatten(0, 1)[: len(self._oriented)]
        moved = moved.mT if self._flipped else moved
        shape = here.param.param.shape
        if self._transposed:
            moved = moved.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        move([here.param], [moved.reshape(shape)], [here.decay])
        yield LengthFactors([here.param.param_index], factor)


class _Whole(_Cut):
    def __init__(self, settings: Orthogonalization, tensor: Sharded, here: Matrix | None) -> None:
        lengths = tensor.part.lengths[tensor.part.stacked :]
        self._settings, self._here = settings, here
        self._shape = lengths[0], math.prod(lengths[1:])
        self.size = math.prod(lengths)

    def _mine(self, sent: Tensor, here: Matrix) -> Tensor:
        row, column = here.param.origin
        rows = here.param.param.shape[0]
        return sent.view(self._shape)[row : row + rows, column : column + here.d.numel() // rows]

    def put(self, sent: Tensor) -> None:
        if self._here is not None:
            mine = self._mine(sent, self._here)
            mine.copy_(self._here.d.view(mine.shape))

    def finish(self, sent: Tensor, move: Move) -> Iterator[LengthFactors]:
        here = self._here
        if here is None:
            return
        d = here.param.matrices(sent.view(1, *self._shape))
        whole, factor = orthogonalize(self._settings, d, here.share.to(sent.dtype))
        move([here.param], [self._mine(here.param.stored(whole).flatten(2)[0], here)], [here.decay])
        yield LengthFactors([here.param.param_index], factor)
