"""Orthogonalising by compiled C++ on a CPU: two to thirty times faster than by one library call per product.

A block's matrices stay in the caches from the Gram matrix to the last product, and a call costs a few
microseconds whatever the number of matrices. The code is ``native_orthogonalize.cpp``; its reference is
:mod:`learned_optim.rule.orthogonalize`.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.engine.param_state import ParamState
from learned_optim.rule.orthogonalize import Orthogonalization

#: Rows of the largest blocks. The products of larger ones leave the caches, and a library is faster.
MOST_ROWS = 128
#: Coordinates of the largest matrix where SIMD vectors have 16 bytes only: there a library is faster beyond.
FEW = 4096


class NativeMatrices:
    """Orthogonalises directions of one dtype in place.

    Args:
        lib: compiled for that dtype of the arithmetic.
        settings: of the policy.
    """

    def __init__(self, lib: ctypes.CDLL, settings: Orthogonalization) -> None:
        self.lib, self.settings = lib, settings
        self._most = None if lib.vector_bytes() > 16 else FEW
        self._numbers = array("d", (*settings.coefficients, settings.damping, settings.damping_threshold))

    def takes(self, param: ParamState, d: Tensor) -> bool:
        """Whether it can, and is faster than a library."""
        return (
            self.settings.method == "newton_schulz"
            and d.is_contiguous()
            and not (param.transposed and len(param.shape) > 2)
            and (self._most is None or param.numel <= self._most)
            and self.settings.block_rows(min(_sides(param))) <= MOST_ROWS
        )

    def __call__(self, params: Sequence[ParamState], directions: Sequence[Tensor], shares: Sequence[Tensor]) -> Tensor:
        """Replace every d by d'; by how much each was damped, [K]."""
        layouts, settings = array("q"), self.settings
        for param in params:
            rows, columns = _sides(param)
            row, column = (1, rows) if param.transposed else (columns, 1)  # strides
            if rows > columns:
                rows, columns, row, column = columns, rows, column, row
            layouts.extend((rows, columns, row, column, settings.block_rows(rows)))
        addresses = array("q", [d.data_ptr() for d in directions])
        guarded = params[0].is_guarded  # else the share is the same for all
        of_each = array("d", [float(share) for share in shares] if guarded else [settings.share] * len(params))
        factors = torch.empty(len(params), dtype=torch.float64, device="cpu")
        self.lib.orthogonalize(
            len(params), at(addresses), at(layouts), at(self._numbers), settings.iterations, at(of_each),
            factors.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return factors


def at(values: array) -> int:
    """The address of the first one."""
    return values.buffer_info()[0]


def _sides(param: ParamState) -> tuple[int, int]:
    """Outputs, and everything that is connected to one."""
    return param.shape[0], param.numel // param.shape[0]
