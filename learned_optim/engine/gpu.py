"""The rule run by Triton kernels on a GPU: one launch per pass, straight on the memory of all tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        self._kernels: dict[Format, tuple[Kernels, torch.dtype]] = {}
        self._tables: dict[tuple[Format, bool, int, int], _Table] = {}

    def prepare(self, params: list[ParamState]) -> None:
        pass

    def before_capture(self, params: list[ParamState]) -> None:
        for table in self._tables.values():
            table.release()  # the graph before is gone
        for _ in self.buckets(params):
            pass

    def load(self, form: Format) -> tuple[Kernels, torch.dtype]:
        """The kernels for tensors like these, and the dtype of directions that they write.

        Raises:
            CompilationError: they cannot be had, and why.
        """
        if form not in self._kernels:
            directions = directions_dtype(arithmetic_dtype(form.param), form.device)
            kind = Kind(form.device, self.head.config, (form.param, form.grad, *form.state), directions)
            self._kernels[form] = kernels(kind), directions
            if form.device.type != "cpu":  # where each small operation is a launch
                self.head.compiled[form.device] = compiled_head(head_pass)
        return self._kernels[form]

    def buckets(self, params: list[ParamState]) -> Iterator[Bucket]:
        kinds: dict[tuple[Format, bool, int], list[ParamState]] = {}
        times: dict[int, int] = {}  # that a parameter was given: two programs of a launch must not move the same one
        for p in params:
            if p.numel > 0:
                address = p.param.data_ptr()
                times[address] = time = times.get(address, -1) + 1
                aligned = not any(t.data_ptr() % ALIGNMENT for t in p.tensors)
                kinds.setdefault((p.format, aligned, time), []).append(p)
        for (form, aligned, time), alike in kinds.items():
            flats = (_Flat(p, self.settings.matrix_shape(p.shape, p.role) is not None) for p in alike)
            for number, some in enumerate(bins(flats, lambda flat: flat.copied, limit(COPIED, form.device))):
                table = self._tables.setdefault((form, aligned, time, number), _Table())
                yield _GpuBucket(self, form, some, table, aligned)

    def weights(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The cell's weights in one vector, as the kernels take them."""
        if (dtype, device) not in self._weights:
            flat = self.head.flat_weights(self.head.config.coordinate_weights())
            self._weights[dtype, device] = flat.to(device, dtype)
        return self._weights[dtype, device]


class _Flat:
    """A parameter's tensors as vectors in one order, which is that of their memory where they share it."""

    def __init__(self, param: ParamState, as_matrix: bool) -> None:
        self.param, self.as_matrix, self.views = param, as_matrix, FlatViews(param)
        self.addresses = [t.data_ptr() for t in self.views.tensors]
        #: Coordinates that a step copies: directions are kept until they are orthogonal.
        self.copied = param.numel if as_matrix or self.views.copied else 0

    def in_order(self, directions: Tensor, begin: int) -> Tensor:
        """A direction, [numel] in the order of the indices, out of those of all."""
        like = self.views.tensors[0]
        return directions.as_strided(like.shape, like.stride(), begin).reshape(-1)


class _Pieces:
    """Tensors cut into the pieces that the programs of a launch take."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        counts = [math.ceil(size / PIECE) for size in sizes]
        rows = [(owner, i * PIECE) for owner, count in enumerate(counts) for i in range(count)]
        self.count = len(rows)
        self.table = to_device(rows, torch.int64, device)
        #: Of the pieces of each tensor, once for each sum.
        self.lengths = to_device(counts * len(TensorSums._fields), torch.int64, device)


class _Table:
    """Where the tensors of a bucket are and how they are cut, on the GPU; sent again when it has changed.

    A replay of a graph reads whatever lies where the capture found it. What a capture uses is therefore never written
    again and stays as long as the graph; and since memory of the host cannot be had while one is under way, some is
    kept ready.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._sent: Tensor | None = None
        self._pieces: _Pieces | None = None
        self._captured: dict[int, object] = {}  #: by identity
        self._spare: Tensor | None = None

    def release(self) -> None:
        """Let go of what graphs read that are gone."""
        self._captured.clear()

    def pieces(self, sizes: tuple[int, ...], device: torch.device) -> _Pieces:
        """How tensors of these sizes are cut."""
        if self._pieces is None or (self._pieces.sizes, self._pieces.device) != (sizes, device):
            self._pieces = _Pieces(sizes, device)
        if is_capturing(device):
            self._captured[id(self._pieces)] = self._pieces
        return self._pieces

    def holding(self, rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
        """[len(rows), columns] int64.

        Raises:
            RuntimeError: they are captured, and nothing was kept ready.
        """
        shape, sent = (len(rows), len(rows[0])), self._sent
        if not is_capturing(device):
            if rows != self._rows or sent is None or sent.device != device:
                self._rows, self._sent = rows, to_device(rows, torch.int64, device)
            if device.type == "cuda" and (self._spare is None or self._spare.shape != shape):
                with torch.inference_mode(False):
                    self._spare = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)
            return self._sent  # pyright: ignore[reportReturnType]
        if rows != self._rows or sent is None:
            host = self._spare
            if host is None or host.shape != shape:
                raise RuntimeError(
                    "step() is being captured in a CUDA graph again, or with other parameters than before. Run a step "
                    "that is not captured in between"
                )
            self._spare = None
            host.copy_(torch.tensor(rows, device="cpu"))
            sent = torch.empty(shape, dtype=torch.int64, device=device)
            sent.copy_(host, non_blocking=True)
            self._captured[id(host)] = host
        self._captured[id(sent)] = sent
        return sent


def is_capturing(device: torch.device) -> bool:
    """Whether the GPU's work is being recorded instead of done."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class _GpuBucket:
    """Tensors of the same dtypes on the same device.

    Args:
        backend: of the policy.
        form: of the tensors.
        flats: the tensors.
        table: of the bucket in this place in the last step.
        aligned: whether all addresses are.
    """

    def __init__(self, backend: GpuBackend, form: Format, flats: list[_Flat], table: _Table, aligned: bool) -> None:
        self.backend, self.form, self.flats, self.aligned = backend, form, flats, aligned
        self.params = [flat.param for flat in flats]
        self.copied = sum(flat.copied for flat in flats)
        self.kernels, self.directions_dtype = backend.load(form)
        padded = [-(-flat.param.numel // DIRECTION_ALIGNMENT) * DIRECTION_ALIGNMENT * flat.as_matrix for flat in flats]
        *self.begins, self.total = accumulate(padded, initial=0)
        contexts, which = contexts_of(self.params)
        rows = [
            (flat.param.numel, row, begin if flat.as_matrix else -DIRECTION_ALIGNMENT, *flat.addresses)
            for flat, row, begin in zip(flats, which, self.begins, strict=True)
        ]
        self.table = table.holding(rows, form.device)
        self.pieces = table.pieces(tuple([p.numel for p in self.params]), form.device)
        self.arithmetic = arithmetic_dtype(form.param)
        self.scalars = to_device([context.scalars for context in contexts], self.arithmetic, form.device)

    def measure(self) -> TensorSums:
        pieces, count = self.pieces, len(TensorSums._fields)
        sums = self.scalars.new_empty(count, pieces.count)
        self.kernels.measure(self.table, pieces.table, self.scalars, sums, aligned=self.aligned)
        # A GPU has a block of threads for each segment of a vector, for those of a matrix one thread; and would be
        # waited for without `unsafe`.
        by_tensor = torch.segment_reduce(sums.double().flatten(), "sum", lengths=pieces.lengths, unsafe=True)
        return TensorSums(*by_tensor.view(count, -1).unbind())

    def apply(self, coefficients: Tensor) -> list[Tensor | None]:
        device = self.form.device
        directions = torch.empty(self.total, dtype=self.directions_dtype, device=device)
        self.kernels.apply(
            self.table, self.pieces.table, self.scalars, coefficients.T.to(self.arithmetic).contiguous(),
            self.backend.weights(self.arithmetic, device), directions, aligned=self.aligned,
        )  # fmt: skip
        for flat in self.flats:
            flat.views.write_back()
        have_changed([flat.param for flat in self.flats if not flat.as_matrix])
        return [
            flat.in_order(directions, begin) if flat.as_matrix else None
            for flat, begin in zip(self.flats, self.begins, strict=True)
        ]
