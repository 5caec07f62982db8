"""The rule run by Triton kernels on a GPU: one launch per pass, straight on the memory of all tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from learned_optim.engine.gpu_kernels import PIECE, Kernels, Kind, kernels
from learned_optim.engine.head import TensorHead, head_pass
from learned_optim.engine.kernels import compiled_head
from learned_optim.engine.packing import COPIED, bins, limit, to_device
from learned_optim.engine.param_state import (
    FlatViews,
    Format,
    ParamState,
    arithmetic_dtype,
    contexts_of,
    have_changed,
)
from learned_optim.engine.products import directions_dtype
from learned_optim.engine.step import Bucket
from learned_optim.rule.types import TensorSums

#: Bytes, a multiple of which addresses must be for loads of several coordinates at once.
ALIGNMENT = 16
#: Directions of matrices begin at multiples of so many coordinates.
DIRECTION_ALIGNMENT = 64


class GpuBackend:
    """Kernels generated from the rule, which Triton compiles.

    Args:
        head: the policy's, with configuration and weights.
    """

    name = "compiled"

    def __init__(self, head: TensorHead) -> None:
        self.head, self.settings = head, head.config.orthogonalization
        self._weights: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._tables: dict[tuple[Format, bool, int], _Table] = {}

    def prepare(self, params: list[ParamState]) -> None:
        pass

    def before_capture(self, params: list[ParamState]) -> None:
        for _ in self.buckets(params):
            pass

    def load(self, form: Format) -> Kernels:
        """Those for tensors like these.

        Raises:
            CompilationError: they cannot be had, and why.
        """
        made = kernels(self.kind(form))
        if form.device.type != "cpu":  # where each small operation is a launch
            self.head.compiled.setdefault(form.device, compiled_head(head_pass))
        return made

    def kind(self, form: Format) -> Kind:
        """What the kernels for such tensors are specialised to."""
        directions = directions_dtype(arithmetic_dtype(form.param), form.device)
        return Kind(self.head.config, (form.param, form.grad, *form.state), directions)

    def buckets(self, params: list[ParamState]) -> Iterator[Bucket]:
        kinds: dict[tuple[Format, bool], list[_Flat]] = {}
        for p in params:
            if p.numel > 0:
                if p.grad.is_neg():  # an imaginary part of autograd's
                    p.grad = p.grad.resolve_neg()
                flat = _Flat(p, self.settings.matrix_shape(p.shape, p.role) is not None)
                kinds.setdefault((p.format, flat.is_aligned), []).append(flat)
        for (form, aligned), alike in kinds.items():
            for number, some in enumerate(bins(alike, lambda flat: flat.copied, limit(COPIED, form.device))):
                table = self._tables.setdefault((form, aligned, number), _Table())
                yield _GpuBucket(self, form, some, table)

    def weights(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The cell's weights in one vector, as the kernels take them."""
        if (dtype, device) not in self._weights:
            names = self.head.config.coordinate_weights()
            flat = [self.head.weights[name].flatten() for name in names]
            self._weights[dtype, device] = torch.cat(flat).to(device, dtype)
        return self._weights[dtype, device]


class _Flat:
    """A parameter's tensors as vectors in one order, which is that of their memory where they share it."""

    def __init__(self, param: ParamState, as_matrix: bool) -> None:
        self.param, self.as_matrix, self.views = param, as_matrix, FlatViews(param)
        self.addresses = [t.data_ptr() for t in self.views.tensors]
        self.is_aligned = not any(address % ALIGNMENT for address in self.addresses)
        #: Coordinates that a step copies: directions are kept until they are orthogonal.
        self.copied = param.numel if as_matrix or self.views.copied else 0

    def in_order(self, directions: Tensor, begin: int) -> Tensor:
        """A direction, [numel] in the order of the indices, out of those of all."""
        like = self.views.tensors[0]
        return directions.as_strided(like.shape, like.stride(), begin).reshape(-1)


class _Pieces:
    """Tensors cut into the pieces that the programs of a launch take."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        counts = torch.tensor([math.ceil(size / PIECE) for size in sizes])
        owners = torch.arange(len(sizes)).repeat_interleave(counts)
        firsts = (counts.cumsum(0) - counts)[owners]
        begins = (torch.arange(len(owners)) - firsts) * PIECE
        self.count = len(owners)
        self.table = torch.stack([owners, begins], 1).to(device)
        #: Of the pieces of each tensor, once for each sum.
        self.lengths = counts.repeat(len(TensorSums._fields)).to(device)


@lru_cache(maxsize=64)
def _pieces(sizes: tuple[int, ...], device: torch.device) -> _Pieces:
    return _Pieces(sizes, device)


class _Table:
    """Rows of whole numbers on the GPU, sent again when they have changed."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._sent: Tensor | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []  #: what graphs read at each replay, and will for ever
        self._spare: Tensor | None = None

    def holding(self, rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
        """[len(rows), columns] int64.

        A replay of a graph reads whatever lies where the capture found it. What a capture uses is therefore never
        written again; and since memory of the host cannot be had while one is under way, some is kept ready.
        """
        shape = (len(rows), len(rows[0]))
        if not is_capturing(device):
            if rows != self._rows or self._sent is None or self._sent.device != device:
                self._rows, self._sent = rows, to_device(rows, torch.int64, device)
            if device.type == "cuda" and (self._spare is None or self._spare.shape != shape):
                self._spare = torch.empty(shape, dtype=torch.int64, pin_memory=True)
            return self._sent
        if rows == self._rows and self._sent is not None:
            self._captured.append((self._sent, self._sent))
            return self._sent
        host = self._spare
        if host is None or host.shape != shape:
            raise RuntimeError(
                "step() is being captured in a CUDA graph with other parameters than before. Run a step with these "
                "before the capture"
            )
        self._spare = None
        host.copy_(torch.tensor(rows))
        sent = torch.empty(shape, dtype=torch.int64, device=device)
        sent.copy_(host, non_blocking=True)
        self._captured.append((host, sent))
        return sent


def is_capturing(device: torch.device) -> bool:
    """Whether the GPU's work is being recorded instead of done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _GpuBucket:
    """Tensors of the same dtypes on the same device.

    Args:
        backend: of the policy.
        form: of the tensors.
        flats: the tensors.
        table: where their addresses were in the last step.
    """

    def __init__(self, backend: GpuBackend, form: Format, flats: list[_Flat], table: _Table) -> None:
        self.backend, self.form, self.flats = backend, form, flats
        self.params = [flat.param for flat in flats]
        self.copied = sum(flat.copied for flat in flats)
        self.kernels = backend.load(form)
        self.pieces = _pieces(tuple([p.numel for p in self.params]), form.device)
        padded = [-(-flat.param.numel // DIRECTION_ALIGNMENT) * DIRECTION_ALIGNMENT * flat.as_matrix for flat in flats]
        *self.begins, self.total = accumulate(padded, initial=0)
        contexts, which = contexts_of(self.params)
        rows = [
            (flat.param.numel, row, begin if flat.as_matrix else -1, *flat.addresses)
            for flat, row, begin in zip(flats, which, self.begins, strict=True)
        ]
        self.table = table.holding(rows, form.device)
        self.arithmetic = arithmetic_dtype(form.param)
        self.scalars = to_device([context.scalars for context in contexts], self.arithmetic, form.device)

    def measure(self) -> TensorSums:
        pieces, count = self.pieces, len(TensorSums._fields)
        sums = self.scalars.new_empty(count, pieces.count)
        self.kernels.measure(self.table, pieces.table, self.scalars, sums, aligned=self.flats[0].is_aligned)
        # A GPU has a block of threads for each segment of a vector, for those of a matrix one thread; and would be
        # waited for without `unsafe`.
        by_tensor = torch.segment_reduce(sums.double().flatten(), "sum", lengths=pieces.lengths, unsafe=True)
        return TensorSums(*by_tensor.view(count, -1).unbind())

    def apply(self, coefficients: Tensor) -> list[Tensor | None]:
        device = self.form.device
        directions = torch.empty(self.total, dtype=self.backend.kind(self.form).directions, device=device)
        self.kernels.apply(
            self.table, self.pieces.table, self.scalars, coefficients.T.to(self.arithmetic).contiguous(),
            self.backend.weights(self.arithmetic, device), directions, aligned=self.flats[0].is_aligned,
        )  # fmt: skip
        for flat in self.flats:
            flat.views.write_back()
        have_changed([flat.param for flat in self.flats if not flat.as_matrix])
        return [
            flat.in_order(directions, begin) if flat.as_matrix else None
            for flat, begin in zip(self.flats, self.begins, strict=True)
        ]
