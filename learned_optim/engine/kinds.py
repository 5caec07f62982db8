"""What a group says its tensors are: stacks of matrices, matrices packed into one, roles.

A parameter that holds several tensors is several tensors to the rule: each has its own sums, its own per-tensor state
and step count (state without dimensions becomes state with one), and each is orthogonalised by itself. They are views
of the parameter's memory; nothing is copied but columns that are cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.engine.hyperparameters import each_group
from learned_optim.rule.layouts import ROLES, Role

#: The keys of a parameter group that say what its tensors are.
KIND_KEYS = ("stacked", "split", "role", "transposed")


class Part(NamedTuple):
    """A tensor of the rule: a parameter, or one of those that a parameter holds."""

    row: int | None  #: of the per-tensor state; ``None`` where the parameter is one tensor
    start: tuple[int, ...]  #: where it begins in the parameter, by dimension
    lengths: tuple[int, ...]  #: its extent there, 1 in each dimension of the stack
    stacked: int  #: how many of the dimensions are those of the stack
    role: Role | None
    transposed: bool  #: stored as [inputs, outputs, ...]

    @property
    def shape(self) -> torch.Size:
        """Outputs first, seen as real numbers."""
        stored = self.lengths[self.stacked :]
        return torch.Size((stored[1], stored[0], *stored[2:]) if self.transposed else stored)

    def of(self, local: Tensor, offset: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """A view of what a piece of the parameter holds of it, and the row and column of it at which that begins.

        Args:
            local: real; empty where nothing is here.
            offset: where the piece begins in the parameter.
        """
        begins = [max(a, b) for a, b in zip(self.start, offset, strict=True)]
        ends = [
            min(a + n, b + size)
            for a, n, b, size in zip(self.start, self.lengths, offset, local.shape, strict=True)
        ]  # fmt: skip
        if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
            return local.detach().reshape(-1)[:0], (0, 0)
        where = [slice(a - b, end - b) for a, end, b in zip(begins, ends, offset, strict=True)]
        inside = [a - start for a, start in zip(begins, self.start, strict=True)][self.stacked :]
        index = (*(place.start for place in where[: self.stacked]), *where[self.stacked :])
        rest = math.prod(self.lengths[self.stacked + 2 :])
        row, column = (*inside, 0, 0)[:2]
        return local.detach()[index], (row, column * rest)


class TensorKind(NamedTuple):
    """What the tensors of a group are; see ``docs/groups.md``."""

    stacked: int = 0  #: leading dimensions that count matrices
    split: int | tuple[int, ...] | None = None  #: how many matrices lie below each other, or the rows of each
    role: Role | None = None  #: ``None``: the shape decides
    transposed: bool = False  #: stored as [inputs, outputs, ...]

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> TensorKind:
        """That of a parameter group.

        Raises:
            TypeError, ValueError: a key of :data:`KIND_KEYS` with a value that it cannot have.
        """
        if not any(key in group for key in KIND_KEYS):
            return _PLAIN
        stacked, split, role, transposed = (group.get(key) for key in KIND_KEYS)
        stacked = 0 if stacked is None else stacked
        if type(stacked) is not int or stacked < 0:
            raise TypeError(
                f"Invalid stacked: {stacked!r}; expected how many leading dimensions count matrices, 0 or more"
            )
        counts = split if isinstance(split, tuple | list | torch.Size) else () if split is None else (split,)
        if any(type(n) is not int or n < 1 for n in counts) or (split is not None and not counts):
            raise TypeError(
                f"Invalid split: {split!r}; expected how many equal matrices, or the rows of each: (64, 64, 64)"
            )
        if role is not None and role not in ROLES:
            raise ValueError(f"Invalid role: {role!r}; choose one of {ROLES} or None")
        if not isinstance(transposed, bool | None):
            raise TypeError(f"Invalid transposed: {transposed!r}; expected True or False")
        return cls(stacked, tuple(counts) if isinstance(split, tuple | list) else split, role, bool(transposed))

    @property
    def is_packed(self) -> bool:
        """Whether a parameter holds several tensors, and its per-tensor state has a dimension for them."""
        return self.stacked > 0 or self.split is not None

    def parts(self, p: Tensor) -> tuple[Part, ...]:
        """The tensors that a parameter holds, in order.

        Raises:
            ValueError: its shape does not allow for it.
        """
        return _parts(self, real_shape(p), p.ndim)

    def numbers(self, p: Tensor) -> tuple[int, ...]:
        """The shape of a parameter's per-tensor state.

        Raises:
            ValueError: that of :meth:`parts`.
        """
        return (len(self.parts(p)),) if self.is_packed else ()


_PLAIN = TensorKind()


def kinds_of(groups: Iterable[Mapping[str, Any]]) -> list[TensorKind]:
    """:meth:`TensorKind.of` each; errors say of which."""
    return each_group(TensorKind.of, groups)


@lru_cache(maxsize=4096)
def _parts(kind: TensorKind, shape: torch.Size, ndim: int) -> tuple[Part, ...]:
    """Args: ``ndim`` leaves out the dimension of real and imaginary part."""
    stacked, split, role, _ = kind
    transposed = kind.transposed and ndim - stacked >= 2
    if not kind.is_packed:
        return (Part(None, (0,) * len(shape), shape, 0, role, transposed),)
    size = tuple(shape[:ndim])
    if ndim <= stacked:
        what = f"stacked={stacked}" if stacked else f"split={split}"
        raise ValueError(f"{what} needs {stacked + 1} dimensions or more, the parameter has shape {size}")
    if 0 in size:
        raise ValueError(f"a parameter of shape {size} is empty: it cannot be stacked or split")
    dim = stacked + transposed
    rows = shape[dim]
    sizes = (rows,) if split is None else (rows // split,) * split if isinstance(split, int) else split
    if sum(sizes) != rows or 0 in sizes:
        raise ValueError(f"split={split} does not add up to the {rows} outputs of a parameter of shape {size}")
    starts = list(itertools.accumulate(sizes, initial=0))
    parts = []
    for place in itertools.product(*map(range, shape[:stacked])):
        for start, length in zip(starts, sizes, strict=False):
            begin, lengths = [0] * len(shape), list(shape)
            begin[:stacked], lengths[:stacked] = place, [1] * stacked
            begin[dim], lengths[dim] = start, length
            parts.append(Part(len(parts), tuple(begin), tuple(lengths), stacked, role, transposed))
    return tuple(parts)


def real_shape(p: Tensor) -> torch.Size:
    """The shape of a parameter seen as real numbers."""
    return torch.Size((*p.shape, 2)) if p.is_complex() else p.shape
