"""How the one update rule is run over a model's tensors, without gradients and in place.

Everything here is bookkeeping: which coordinates are shown to :mod:`learned_optim.update_rule` together. Results do
not depend on it: a tensor's update is bit-identical whatever other tensors are in its group, and in what order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim import update_rule
from learned_optim.cells import CoordinateState, Hyperparameters
from learned_optim.coordinates import Segments, Whole
from learned_optim.features import TensorSums
from learned_optim.policy import Policy

#: Tensors up to this many coordinates are run side by side, in vectors of up to this many coordinates. Below torch's
#: grain size for threads, so that no thread boundary can fall differently when tensors are grouped differently.
SMALL = 1 << 15
#: Larger tensors are run in chunks of this many coordinates: temporaries stay in the cache, 256 KB each.
CHUNK = 1 << 16
#: Padding of small tensors: a multiple of every SIMD vector's length.
ALIGN = 64
#: Per-tensor numbers are computed for a multiple of this many tensors, the missing ones being empty: whole SIMD vectors
#: again, so that a tensor's bits do not depend on how many tensors are run with it.
COLUMNS = 16


class Job(NamedTuple):
    """One parameter's tensors for one step; real, with any strides, state planes shaped like the parameter."""

    param: Tensor
    grad: Tensor
    planes: tuple[Tensor, ...]  #: exp_avg, exp_avg_sq, hidden_0, ...
    cosine: tuple[Tensor, Tensor]  #: 0-d
    step: float  #: t >= 1


class Backend(Protocol):
    name: str

    def run(self, jobs: list[Job], hyper: Hyperparameters) -> None:
        """Update every job's parameter, planes and cosines in place."""
        ...


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything of lower precision."""
    return torch.promote_types(dtype, torch.float32)


@lru_cache(maxsize=1024)
def _whole(shape: torch.Size, device: torch.device) -> Whole:
    return Whole(shape, device)


@lru_cache(maxsize=256)
def _segments(shapes: tuple[torch.Size, ...], device: torch.device) -> Segments:
    padding = -len(shapes) % COLUMNS
    return Segments((*shapes, *[torch.Size((0,))] * padding), align=ALIGN, device=device)


class EagerBackend:
    """Plain torch operations: small tensors side by side, large ones in chunks. Needs no compiler."""

    name = "eager"

    def __init__(self, policy: Policy) -> None:
        self.config = policy.config
        self.weights = {name: w.detach().clone() for name, w in policy.weights().items()}
        self.numbers = {name: w.tolist() for name, w in self.weights.items()}

    def run(self, jobs: list[Job], hyper: Hyperparameters) -> None:
        small: dict[tuple, list[Job]] = {}
        for job in jobs:
            if job.param.numel() == 0:
                continue
            if job.param.numel() <= SMALL:
                key = (job.step, job.param.device, arithmetic_dtype(job.param.dtype))
                small.setdefault(key, []).append(job)
            else:
                self._run_large(job, hyper)
        for same_kind in small.values():
            for batch in _bins(same_kind):
                self._run_batch(batch, hyper)

    def _coefficients(self, layout, sums: TensorSums, cosine: Tensor, step: float) -> tuple[Tensor, Tensor]:
        weights = {k: w.to(cosine.device) for k, w in self.weights.items()}
        return update_rule.coefficients(weights, self.config, layout, sums, cosine, step)

    def _run_large(self, job: Job, hyper: Hyperparameters) -> None:
        dtype = arithmetic_dtype(job.param.dtype)
        layout = _whole(job.param.shape, job.param.device)
        now = update_rule.step_numbers(job.step, hyper)
        with _flat([job.param, job.grad, *job.planes], written=[0, *range(2, 2 + len(job.planes))]) as flat:
            chunks = [tuple(c) for c in zip(*(t.split(CHUNK) for t in flat), strict=True)]

            def inputs(chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, CoordinateState]:
                p, g, m, v, *h = (t.to(dtype) for t in chunk)
                return p, g, CoordinateState(m, v, tuple(h))

            parts = [update_rule.measure(layout, *inputs(chunk), now) for chunk in chunks]
            sums = TensorSums(*(torch.stack(s).double().sum(0) for s in zip(*parts, strict=True)))
            cosine = torch.stack(job.cosine).unsqueeze(1)
            values, cosine = self._coefficients(layout, sums, cosine, job.step)
            coeff = update_rule.spread_coefficients(self.config, layout, values, dtype)
            for chunk in chunks:
                new = update_rule.apply(self.numbers, self.config, coeff, *inputs(chunk), now)
                _write(chunk, new)
        _copy_all(list(job.cosine), list(cosine[:, 0].unbind()))

    def _run_batch(self, batch: list[Job], hyper: Hyperparameters) -> None:
        first = batch[0]
        device, dtype = first.param.device, arithmetic_dtype(first.param.dtype)
        layout = _segments(tuple(job.param.shape for job in batch), device)
        tensors = [(job.param, job.grad, *job.planes) for job in batch]
        vectors = torch.zeros(len(tensors[0]), sum(layout.sizes), dtype=dtype, device=device)
        views = [_pieces(vector, layout, batch) for vector in vectors]
        for vector_views, sources in zip(views, zip(*tensors, strict=True), strict=True):
            _copy_all(vector_views, list(sources))
        p, g, m, v, *h = vectors.unbind()
        cosine = vectors.new_zeros(2, len(layout.sizes))
        for i in range(2):
            _copy_all(list(cosine[i].unbind()[: len(batch)]), [job.cosine[i] for job in batch])
        state = CoordinateState(m, v, tuple(h))
        now = update_rule.step_numbers(first.step, hyper)
        sums = update_rule.measure(layout, p, g, state, now)
        values, cosine = self._coefficients(layout, sums, cosine, first.step)
        coeff = update_rule.spread_coefficients(self.config, layout, values, dtype)
        new_p, new_state = update_rule.apply(self.numbers, self.config, coeff, p, g, state, now)
        written = (new_p, new_state.exp_avg, new_state.exp_avg_sq, *new_state.hidden)
        for vector, targets in zip(written, zip(*((t[0], *t[2:]) for t in tensors), strict=True), strict=True):
            _copy_all(list(targets), _pieces(vector, layout, batch))
        for i in range(2):
            _copy_all([job.cosine[i] for job in batch], list(cosine[i].unbind()[: len(batch)]))


def _write(chunk: tuple[Tensor, ...], new: tuple[Tensor, CoordinateState]) -> None:
    param, state = new
    _copy_all([chunk[0], *chunk[2:]], [param, state.exp_avg, state.exp_avg_sq, *state.hidden])


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _bins(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Jobs in order, cut where the next one would make a vector longer than ``SMALL``."""
    batch: list[Job] = []
    filled = 0
    for job in jobs:
        size = -(-job.param.numel() // ALIGN) * ALIGN
        if batch and filled + size > SMALL:
            yield batch
            batch, filled = [], 0
        batch.append(job)
        filled += size
    if batch:
        yield batch


def _pieces(vector: Tensor, layout: Segments, batch: list[Job]) -> list[Tensor]:
    """The jobs' coordinates in a padded vector, each shaped like its parameter."""
    pieces = vector.split(layout.sizes)[: len(batch)]
    return [piece[: job.param.numel()].view(job.param.shape) for piece, job in zip(pieces, batch, strict=True)]


class _flat:
    """Vectors over the memory of same-shaped tensors, all in one order of coordinates.

    Tensors that are dense and share their strides (contiguous, channels_last, transposed) are seen through views.
    Otherwise copies are handed out, and those ``written`` are copied back at the end.
    """

    def __init__(self, tensors: list[Tensor], written: list[int]) -> None:
        self.tensors, self.written = tensors, written
        self.copies: list[Tensor] | None = None

    def __enter__(self) -> list[Tensor]:
        first = self.tensors[0]
        size = (first.numel(),)
        if all(t.is_contiguous() for t in self.tensors):
            return [t.view(size) for t in self.tensors]
        if _is_dense(first) and all(t.stride() == first.stride() for t in self.tensors):
            return [t.as_strided(size, (1,)) for t in self.tensors]
        self.copies = [t.contiguous() for t in self.tensors]
        return [t.view(size) for t in self.copies]

    def __exit__(self, *error: object) -> None:
        if self.copies is not None:
            for i in self.written:
                if self.copies[i] is not self.tensors[i]:
                    self.tensors[i].copy_(self.copies[i])


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor covers its memory without gaps or overlaps, in some order of its dimensions."""
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1:
            if stride != size:
                return False
            size *= length
    return size == math.prod(tensor.shape)


def make_backend(name: str, policy: Policy) -> Backend:
    """The backend of that name: ``"eager"`` or ``"auto"``.

    Raises:
        ValueError: another name.
    """
    if name == "compiled":
        raise ValueError("backend 'compiled' is not available in this version; use 'eager' or 'auto'")
    if name not in ("auto", "eager"):
        raise ValueError(f"Invalid backend: {name!r}; choose 'auto', 'eager' or 'compiled'")
    return EagerBackend(policy)
