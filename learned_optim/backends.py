"""How the one update rule is run over a model's tensors, without gradients and in place.

Everything here is bookkeeping: which coordinates are shown to :mod:`learned_optim.update_rule` together. Results do
not depend on it: a tensor's update is bit-identical whatever other tensors are in its group, and in what order.

A step goes in three passes: the sums of every tensor (:func:`~learned_optim.update_rule.measure`), the head for all
tensors at once (:func:`~learned_optim.update_rule.coefficients`), then every coordinate
(:func:`~learned_optim.update_rule.apply`). Sums of a tensor's parts add up between the first two.
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
from learned_optim.coordinates import Segments, Whole, tensor_shape_context
from learned_optim.features import TensorSums
from learned_optim.policy import Policy
from learned_optim.rounding import rounded_state

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
#: Coordinates copied side by side, or copied because of their strides, before the passes are run over them.
COPIED = 1 << 19


class Job(NamedTuple):
    """One parameter's tensors for one step; real, with any strides, state planes shaped like the parameter."""

    param: Tensor
    grad: Tensor
    planes: tuple[Tensor, ...]  #: exp_avg, exp_avg_sq, hidden_0, ...
    cosine: tuple[Tensor, Tensor]  #: 0-d
    step: float  #: t >= 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Parameter, gradient and planes."""
        return (self.param, self.grad, *self.planes)


class Backend(Protocol):
    @property
    def name(self) -> str:
        """What is used, and why."""
        ...

    def prepare(self, params: list[Tensor]) -> None:
        """Hear, before a step, of all parameters that it will update."""
        ...

    def run(self, jobs: list[Job], hyper: Hyperparameters) -> None:
        """Update every job's parameter, planes and cosines in place."""
        ...


class Unit(Protocol):
    """Some tensors of a step that are run together."""

    jobs: list[Job]

    def measure(self) -> TensorSums:
        """The sums of each job, [len(jobs)] each, in float64."""
        ...

    def apply(self, values: Tensor) -> None:
        """Write the update, given the coefficients [C, len(jobs)]."""
        ...


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything of lower precision."""
    return torch.promote_types(dtype, torch.float32)


class Columns(NamedTuple):
    """Shapes of K tensors, and of as many empty ones as make K a multiple of ``COLUMNS``."""

    numel: Tensor
    shape_context: Tensor


@lru_cache(maxsize=256)
def _columns(shapes: tuple[torch.Size, ...], device: torch.device) -> Columns:
    padded = (*shapes, *[torch.Size((0,))] * (-len(shapes) % COLUMNS))
    context = torch.tensor([tensor_shape_context(shape) for shape in padded], dtype=torch.float64, device=device)
    numel = torch.tensor([float(max(math.prod(s), 1)) for s in padded], dtype=torch.float64, device=device)
    return Columns(numel, context.T.contiguous())


@lru_cache(maxsize=1024)
def _whole(shape: torch.Size, device: torch.device) -> Whole:
    return Whole(shape, device)


@lru_cache(maxsize=256)
def _segments(shapes: tuple[torch.Size, ...], device: torch.device) -> Segments:
    return Segments(shapes, align=ALIGN, device=device)


class Head:
    """The policy's tensor head over all tensors of a wave."""

    def __init__(self, policy: Policy) -> None:
        self.config = policy.config
        self.weights = {name: w.detach().clone() for name, w in policy.weights().items()}

    def __call__(self, jobs: list[Job], sums: TensorSums) -> Tensor:
        """[C, len(jobs)] in float64; the jobs' cosines are updated."""
        device = sums.u_u.device
        layout = _columns(tuple(job.param.shape for job in jobs), device)
        missing = layout.numel.numel() - len(jobs)
        padded = TensorSums(*(torch.nn.functional.pad(s, (0, missing)) for s in sums))
        cosine = torch.zeros(2, len(jobs) + missing, dtype=torch.float64, device=device)
        for i in range(2):
            copy_all(list(cosine[i].unbind()[: len(jobs)]), [job.cosine[i] for job in jobs])
        step = torch.tensor([job.step for job in jobs] + [1.0] * missing, dtype=torch.float64, device=device)
        weights = {k: w.to(device) for k, w in self.weights.items()}
        values, cosine = update_rule.coefficients(weights, self.config, layout, padded, cosine, step)
        for i in range(2):
            copy_all([job.cosine[i] for job in jobs], list(cosine[i].unbind()[: len(jobs)]))
        return values[:, : len(jobs)]


class EagerBackend:
    """Plain torch operations: small tensors side by side, large ones in chunks. Needs no compiler."""

    def __init__(self, policy: Policy, why: str = "") -> None:
        self.name = f"eager ({why})" if why else "eager"
        self.head = Head(policy)
        self.numbers = {name: w.tolist() for name, w in self.head.weights.items()}

    def prepare(self, params: list[Tensor]) -> None:
        pass

    def run(self, jobs: list[Job], hyper: Hyperparameters) -> None:
        run_waves(self.head, self._units([job for job in jobs if job.param.numel() > 0], hyper))

    def _units(self, jobs: list[Job], hyper: Hyperparameters) -> Iterator[tuple[Unit, int]]:
        small: dict[tuple, list[Job]] = {}
        for job in jobs:
            if job.param.numel() > SMALL:
                unit = _Large(self, job, hyper)
                yield unit, job.param.numel() if unit.flat.copied else 0
            else:
                kept = tuple(t.dtype for t in job.planes)
                key = (job.step, job.param.device, arithmetic_dtype(job.param.dtype), kept)
                small.setdefault(key, []).append(job)
        for same_kind in small.values():
            for batch in _bins(same_kind):
                unit = _Batch(self, batch, hyper)
                yield unit, sum(unit.layout.sizes)


def run_waves(head: Head, units: Iterable[tuple[Unit, int]]) -> None:
    """The three passes, over as many units at once as one device holds and ``COPIED`` allows.

    Args:
        head: of the policy.
        units: with the coordinates that each has copied; they are made one by one, as they are wanted.
    """
    wave: list[Unit] = []
    copied = 0
    for unit, size in units:
        if wave and (copied + size > COPIED or unit.jobs[0].param.device != wave[0].jobs[0].param.device):
            _run_wave(head, wave)
            wave, copied = [], 0
        wave.append(unit)
        copied += size
    if wave:
        _run_wave(head, wave)


def _run_wave(head: Head, wave: list[Unit]) -> None:
    sums = TensorSums(*(torch.cat(s) for s in zip(*(unit.measure() for unit in wave), strict=True)))
    values = head([job for unit in wave for job in unit.jobs], sums)
    for unit, columns in zip(wave, values.split([len(unit.jobs) for unit in wave], dim=1), strict=True):
        unit.apply(columns)


class _Large:
    """One tensor, in chunks."""

    def __init__(self, backend: EagerBackend, job: Job, hyper: Hyperparameters) -> None:
        self.backend, self.jobs = backend, [job]
        self.dtype = arithmetic_dtype(job.param.dtype)
        self.layout = _whole(job.param.shape, job.param.device)
        self.now = update_rule.step_numbers(job.step, hyper)
        self.flat = Flat(job)

    def measure(self) -> TensorSums:
        parts = [update_rule.measure(self.layout, *self._inputs(chunk), self.now) for chunk in self._chunks()]
        return TensorSums(*(torch.stack(s).double().sum(0) for s in zip(*parts, strict=True)))

    def apply(self, values: Tensor) -> None:
        backend = self.backend
        coeff = update_rule.spread_coefficients(backend.head.config, self.layout, values, self.dtype)
        for chunk in self._chunks():
            p, g, state = self._inputs(chunk)
            p, state = update_rule.apply(backend.numbers, backend.head.config, coeff, p, g, state, self.now)
            state = rounded_state(state, [t.dtype for t in chunk[2:]])
            copy_all([chunk[0], *chunk[2:]], [p, state.exp_avg, state.exp_avg_sq, *state.hidden])
        self.flat.write_back()

    def _chunks(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(t.split(CHUNK) for t in self.flat.vectors), strict=True)

    def _inputs(self, chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, CoordinateState]:
        p, g, m, v, *h = (t.to(self.dtype) for t in chunk)
        return p, g, CoordinateState(m, v, tuple(h))


class _Batch:
    """Small tensors of the same dtype, device and step, side by side in one vector."""

    def __init__(self, backend: EagerBackend, jobs: list[Job], hyper: Hyperparameters) -> None:
        self.backend, self.jobs = backend, jobs
        first = jobs[0]
        self.dtype = arithmetic_dtype(first.param.dtype)
        self.layout = _segments(tuple(job.param.shape for job in jobs), first.param.device)
        self.now = update_rule.step_numbers(first.step, hyper)
        size = sum(self.layout.sizes)
        vectors = torch.zeros(len(first.tensors), size, dtype=self.dtype, device=first.param.device)
        for vector, sources in zip(vectors, zip(*(job.tensors for job in jobs), strict=True), strict=True):
            copy_all(self._pieces(vector), list(sources))
        p, g, m, v, *h = vectors.unbind()
        self.inputs = p, g, CoordinateState(m, v, tuple(h))

    def measure(self) -> TensorSums:
        return TensorSums(*(s.double() for s in update_rule.measure(self.layout, *self.inputs, self.now)))

    def apply(self, values: Tensor) -> None:
        backend = self.backend
        coeff = update_rule.spread_coefficients(backend.head.config, self.layout, values, self.dtype)
        p, state = update_rule.apply(backend.numbers, backend.head.config, coeff, *self.inputs, self.now)
        state = rounded_state(state, [t.dtype for t in self.jobs[0].planes])
        targets = zip(*((job.param, *job.planes) for job in self.jobs), strict=True)
        for vector, old in zip((p, state.exp_avg, state.exp_avg_sq, *state.hidden), targets, strict=True):
            copy_all(list(old), self._pieces(vector))

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        """The jobs' coordinates in a padded vector, each shaped like its parameter."""
        pieces = zip(vector.split(self.layout.sizes), self.jobs, strict=True)
        return [piece[: job.param.numel()].view(job.param.shape) for piece, job in pieces]


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
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


class Flat:
    """A job's tensors as vectors, all in one order of coordinates.

    Tensors that are dense and share their strides (contiguous, channels_last, transposed) are seen through views of
    their memory. Otherwise they are copied, and :meth:`write_back` copies what has changed back.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.copied = not _share_order(job.tensors)
        self.tensors = tuple(t.contiguous() for t in job.tensors) if self.copied else job.tensors

    @property
    def vectors(self) -> list[Tensor]:
        """[n] each."""
        return self.piece(0, self.job.param.numel())

    def piece(self, start: int, *shape: int) -> list[Tensor]:
        """The coordinates from ``start`` on, in one or two dimensions."""
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        return [t.as_strided(shape, stride, t.storage_offset() + start) for t in self.tensors]

    def write_back(self) -> None:
        """Must follow the last change of the vectors."""
        if self.copied:
            for i, (copy, original) in enumerate(zip(self.tensors, self.job.tensors, strict=True)):
                if i != 1 and copy is not original:  # all but the gradient
                    original.copy_(copy)


def _share_order(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensors' memory holds the same coordinates in the same order, without gaps."""
    if all(t.is_contiguous() for t in tensors):
        return True
    return _is_dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor covers its memory without gaps or overlaps, in some order of its dimensions."""
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1:
            if stride != size:
                return False
            size *= length
    return size == math.prod(tensor.shape)
