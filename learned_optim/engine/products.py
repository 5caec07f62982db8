"""Matrix products of a step as GPUs like them: few, large, and of two-byte numbers where that has been asked for.

A column of zeros changes no product of rows, so blocks of equally many rows make one batch whatever their columns. That
is exact in real numbers; sums of more terms may be added up in another order, so CPUs, whose bits must not depend on
what lies beside a tensor, multiply each size by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.engine.packing import limit

#: Devices on which blocks are padded, and multiplied in ``DIRECTIONS``.
ON = ("cuda",)
#: A batch may be so many times as large as what is padded into it.
WASTE = 1.25
#: In a bucket of float32 arithmetic, the dtype of matrices' directions before they are orthogonalised: ``None`` is
#: float32. With ``torch.bfloat16`` a direction takes half of the memory and its products a fraction of the time;
#: ``tools/measure_gpu.py`` measures both, and how far updates differ.
DIRECTIONS: torch.dtype | None = None

_TWO_BYTES = (torch.bfloat16, torch.float16)


def directions_dtype(arithmetic: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the directions of matrices, for parameters of this arithmetic."""
    return DIRECTIONS if DIRECTIONS and arithmetic is torch.float32 and device.type in ON else arithmetic


def padded_together(blocks: Sequence[Tensor], most: int) -> list[list[int]]:
    """Which of some blocks, [N, r, c] each with the same r, are multiplied as one batch: indices, every one once.

    Args:
        blocks: of any number of columns.
        most: coordinates of a batch, for CPUs (see :func:`~learned_optim.engine.packing.limit`).
    """
    if blocks[0].device.type not in ON:
        return [[i] for i in range(len(blocks))]
    most = limit(most, blocks[0].device)
    batches: list[list[int]] = []
    columns = filled = rows = 0
    for i in sorted(range(len(blocks)), key=lambda i: -blocks[i].shape[2]):  # the widest of a batch comes first
        own = blocks[i].shape[0] * blocks[i].shape[1]
        together = (rows + own) * columns
        if batches and together <= min(most, WASTE * (filled + blocks[i].numel())):
            batches[-1].append(i)
        else:
            batches.append([i])
            columns, filled, rows = blocks[i].shape[2], 0, 0
        filled, rows = filled + blocks[i].numel(), rows + own
    return batches


def padded(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks of equally many rows in one batch, their columns filled up with zeros; a single one as it is."""
    columns = max(x.shape[2] for x in blocks)
    return blocks[0] if len(blocks) == 1 else torch.cat([_widened(x, columns) for x in blocks])


def _widened(x: Tensor, columns: int) -> Tensor:
    return x if x.shape[2] == columns else torch.nn.functional.pad(x, (0, columns - x.shape[2]))


def gram(x: Tensor) -> Tensor:
    """X X^T, [N, r, r], in float32 where X has two bytes: sums of squares are beyond what float16 can hold."""
    if x.dtype not in _TWO_BYTES:
        return x @ x.mT
    if x.device.type == "cuda":
        return torch.bmm(x, x.mT, out_dtype=torch.float32)
    return x.float() @ x.float().mT
