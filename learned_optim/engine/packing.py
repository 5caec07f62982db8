"""Small tensors side by side in one vector, and how much may be copied for that at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from learned_optim.rule.layouts import Pieces, indices_by

#: Coordinates copied side by side, or copied because of their strides, before the passes are run over them.
COPIED = 1 << 19
#: On a GPU all limits of this kind are so many times as large: what is gained there is launches, each of which costs as
#: much as some hundred thousand coordinates.
ON_GPU = 32

Tensors = list[Tensor] | tuple[Tensor, ...]
Item = TypeVar("Item")


def limit(coordinates: int, device: torch.device) -> int:
    """A limit that is meant for CPUs, as it is on this device."""
    return coordinates if device.type == "cpu" else coordinates * ON_GPU


def bins(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Items in order, cut where the next one would make the sizes of a bin add up to more than ``most``."""
    batch: list[Item] = []
    filled = 0
    for item in items:
        if batch and filled + size(item) > most:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += size(item)
    if batch:
        yield batch


def copy_all(targets: Tensors, sources: Tensors) -> None:
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def stacked_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """[len(tensors), ...]; of a single one a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of them, without waiting for what a GPU still has to do.

    Numbers, or rows of them. They may be 0-d tensors of the device already, the first of them then is one: a CUDA graph
    reads the numbers of each step there (:mod:`learned_optim.engine.device_scalars`).
    """
    nested = isinstance(values[0], tuple | list)
    first = values[0][0] if nested else values[0]
    if isinstance(first, Tensor):
        flat = list(chain.from_iterable(values)) if nested else values
        tensors = [x if isinstance(x, Tensor) else torch.full_like(first, x) for x in flat]
        return torch.stack(tensors).to(dtype).view(len(values), *[-1] * nested)
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Packing:
    """Vectors side by side in one, each followed by zeros up to a multiple of ``align``.

    Args:
        sizes: of the vectors, 1 or more.
        align: see above.
        device: where they are.
    """

    def __init__(self, sizes: Sequence[int], align: int, device: torch.device) -> None:
        self._gaps = [-size % align for size in sizes]
        self.total = sum(sizes) + sum(self._gaps)
        self._pieces = Pieces(sizes, self._gaps)
        self._device = device
        self._zeros: dict[torch.dtype, list[Tensor]] = {}

    def pack(self, columns: Sequence[Sequence[Tensor]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """The vectors of each column as one, [total], of a dtype to which theirs can be promoted."""
        packed: list[Any] = [None] * len(columns)
        for dtype, which in indices_by(dtypes).items():
            if dtype not in self._zeros:
                zeros = torch.zeros(max(self._gaps), dtype=dtype, device=self._device)
                self._zeros[dtype] = [zeros[:gap] for gap in self._gaps]
            gaps = self._zeros[dtype]
            parts = [part for i in which for both in zip(columns[i], gaps, strict=True) for part in both]
            for i, vector in zip(which, torch.cat(parts).to(dtype).view(len(which), -1).unbind(), strict=True):
                packed[i] = vector
        return packed

    def write(self, columns: Sequence[Sequence[Tensor]], packed: Sequence[Tensor]) -> None:
        """Copy what was packed, and has changed since, into the vectors."""
        kinds = [(column[0].dtype, one.dtype) for column, one in zip(columns, packed, strict=True)]
        for which in indices_by(kinds).values():
            targets = [part for i in which for part in columns[i]]
            copy_all(targets, [part for i in which for part in self._pieces.of(packed[i])])


@lru_cache(maxsize=256)
def packing(sizes: tuple[int, ...], align: int, device: torch.device) -> Packing:
    return Packing(sizes, align, device)
