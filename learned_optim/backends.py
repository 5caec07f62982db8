"""How the one update rule is run over a model's tensors, without gradients and in place.

Everything here is bookkeeping: which coordinates are shown to :mod:`learned_optim.update_rule` together. Results do
not depend on it: a tensor's update is bit-identical whatever other tensors are in its group, and in what order.

The passes of a step over what is shown together are those of :mod:`learned_optim.waves`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim import update_rule
from learned_optim.balance import Squares, rows_and_columns
from learned_optim.cells import CoordinateState, Hyperparameters
from learned_optim.coordinates import Segments, Whole
from learned_optim.features import TensorSums
from learned_optim.policy import Policy, PolicyConfig
from learned_optim.rounding import rounded_state
from learned_optim.waves import Head, copy_all, limit

#: Tensors up to this many coordinates are run side by side, in vectors of up to this many coordinates. Below torch's
#: grain size for threads, so that no thread boundary can fall differently when tensors are grouped differently.
SMALL = 1 << 15
#: Larger tensors are run in chunks of this many coordinates: temporaries stay in the cache, 256 KB each.
CHUNK = 1 << 16
#: Padding of small tensors: a multiple of every SIMD vector's length.
ALIGN = 64


#: What is kept per tensor, in the state's names and the memory's order (see ``update_rule.coefficients``).
MEMORY = ("cosine_fast", "cosine_slow", "log_pace")


class Job(NamedTuple):
    """One parameter's tensors for one step; real, with any strides, state planes shaped like the parameter."""

    param: Tensor
    grad: Tensor
    planes: tuple[Tensor, ...]  #: exp_avg, exp_avg_sq, hidden_0, ...
    memory: tuple[Tensor, ...]  #: 0-d: fast and slow cosine, logarithm of the pace
    step: float  #: t >= 1
    hyper: Hyperparameters
    shape: torch.Size  #: of the whole parameter, of which the tensors may be a shard
    place: tuple[int, int]  #: number of the parameter's group, and of the parameter in it
    trust: Tensor | None = None  #: 0-d, where there is a safeguard
    origin: tuple[int, int] = (0, 0)  #: row and column of the whole parameter at which a shard begins

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Parameter, gradient and planes."""
        return (self.param, self.grad, *self.planes)


class Backend(Protocol):
    @property
    def name(self) -> str:
        """What is used, and why."""
        ...

    @property
    def head(self) -> Head: ...

    def prepare(self, params: list[Tensor]) -> None:
        """Hear, before a step, of all parameters that it will update."""
        ...

    def units(self, jobs: list[Job]) -> Iterator[tuple[Unit, int]]:
        """All jobs that have coordinates, each in one unit, and how many coordinates the unit has copied.

        They are made one by one, as they are wanted. The same jobs give the same units again.
        """
        ...


class Unit(Protocol):
    """Some tensors of a step that are run together."""

    jobs: list[Job]

    def measure(self, squares: Squares | None) -> TensorSums:
        """The sums of each job, [len(jobs)] each, in float64; those of rows and columns are added to ``squares``."""
        ...

    def apply(self, values: Tensor, shares: Squares | None) -> None:
        """Write the update, given the coefficients [C, len(jobs)] and the shares of rows and columns, if wanted."""
        ...


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything of lower precision."""
    return torch.promote_types(dtype, torch.float32)


def is_balanced(config: PolicyConfig, job: Job) -> bool:
    """Whether rows and columns of this tensor are balanced."""
    return config.balance > 0.0 and rows_and_columns(job.shape) is not None


@lru_cache(maxsize=1024)
def _whole(shape: torch.Size, device: torch.device) -> Whole:
    return Whole(shape, device)


@lru_cache(maxsize=256)
def _segments(shapes: tuple[torch.Size, ...], device: torch.device) -> Segments:
    return Segments(shapes, align=ALIGN, device=device)


class EagerBackend:
    """Plain torch operations: small tensors side by side, large ones in chunks. Needs no compiler."""

    def __init__(self, policy: Policy, why: str = "") -> None:
        self.name = f"eager ({why})" if why else "eager"
        self.head = Head(policy)
        self.numbers = {name: w.tolist() for name, w in self.head.weights.items()}

    def prepare(self, params: list[Tensor]) -> None:
        pass

    def units(self, jobs: list[Job]) -> Iterator[tuple[Unit, int]]:
        small: dict[tuple, list[Job]] = {}
        for job in jobs:
            if job.param.numel() > limit(SMALL, job.param.device):
                unit = _Large(self, job)
                yield unit, job.param.numel() if unit.flat.copied else 0
            elif job.param.numel() > 0:
                kept = tuple(t.dtype for t in job.planes)
                key = (job.hyper, job.step, job.param.device, arithmetic_dtype(job.param.dtype), kept)
                small.setdefault(key, []).append(job)
        for same_kind in small.values():
            for batch in _bins(same_kind):
                unit = _Batch(self, batch)
                yield unit, sum(unit.layout.sizes)


class _Large:
    """One tensor, in chunks."""

    def __init__(self, backend: EagerBackend, job: Job) -> None:
        self.backend, self.jobs = backend, [job]
        self.dtype = arithmetic_dtype(job.param.dtype)
        self.layout = _whole(job.param.shape, job.param.device)
        self.now = update_rule.step_numbers(job.step, job.hyper)
        self.flat = Flat(job, is_balanced(backend.head.config, job))
        self.chunk = limit(CHUNK, job.param.device)

    def measure(self, squares: Squares | None) -> TensorSums:
        parts = []
        for number, chunk in enumerate(self._chunks()):
            sums, square = update_rule.measure(self.backend.head.config, self.layout, *self._inputs(chunk), self.now)
            parts.append(sums)
            if square is not None and squares is not None:
                squares.add(self.jobs[0], square, number * self.chunk)
        return TensorSums(*(torch.stack(s).double().sum(0) for s in zip(*parts, strict=True)))

    def apply(self, values: Tensor, shares: Squares | None) -> None:
        backend, config = self.backend, self.backend.head.config
        coeff = update_rule.spread_coefficients(config, self.layout, values, self.dtype)
        for number, chunk in enumerate(self._chunks()):
            p, g, state = self._inputs(chunk)
            factor = shares and shares.factor(self.jobs[0], number * self.chunk, len(p), self.dtype)
            p, state = update_rule.apply(backend.numbers, config, coeff, p, g, state, self.now, factor=factor)
            state = rounded_state(state, [t.dtype for t in chunk[2:]])
            copy_all([chunk[0], *chunk[2:]], [p, state.exp_avg, state.exp_avg_sq, *state.hidden])
        self.flat.write_back()

    def _chunks(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(t.split(self.chunk) for t in self.flat.vectors), strict=True)

    def _inputs(self, chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, CoordinateState]:
        p, g, m, v, *h = (t.to(self.dtype) for t in chunk)
        return p, g, CoordinateState(m, v, tuple(h))


class _Batch:
    """Small tensors of the same dtype, device and step, side by side in one vector."""

    def __init__(self, backend: EagerBackend, jobs: list[Job]) -> None:
        self.backend, self.jobs = backend, jobs
        first = jobs[0]
        self.dtype = arithmetic_dtype(first.param.dtype)
        self.layout = _segments(tuple(job.param.shape for job in jobs), first.param.device)
        self.now = update_rule.step_numbers(first.step, first.hyper)
        size = sum(self.layout.sizes)
        vectors = torch.zeros(len(first.tensors), size, dtype=self.dtype, device=first.param.device)
        for vector, sources in zip(vectors, zip(*(job.tensors for job in jobs), strict=True), strict=True):
            copy_all(self._pieces(vector), list(sources))
        p, g, m, v, *h = vectors.unbind()
        self.inputs = p, g, CoordinateState(m, v, tuple(h))

    def measure(self, squares: Squares | None) -> TensorSums:
        sums, square = update_rule.measure(self.backend.head.config, self.layout, *self.inputs, self.now)
        if square is not None and squares is not None:
            for job, piece in zip(self.jobs, square.split(self.layout.sizes), strict=True):
                squares.add(job, piece[: job.param.numel()])
        return TensorSums(*(s.double() for s in sums))

    def apply(self, values: Tensor, shares: Squares | None) -> None:
        backend, config = self.backend, self.backend.head.config
        coeff = update_rule.spread_coefficients(config, self.layout, values, self.dtype)
        factor = None
        if shares is not None:
            factor = torch.ones(sum(self.layout.sizes), dtype=self.dtype, device=self.jobs[0].param.device)
            for job, place in zip(self.jobs, factor.split(self.layout.sizes), strict=True):
                shares.write(job, place[: job.param.numel()])
        p, state = update_rule.apply(backend.numbers, config, coeff, *self.inputs, self.now, factor=factor)
        state = rounded_state(state, [t.dtype for t in self.jobs[0].planes])
        targets = zip(*((job.param, *job.planes) for job in self.jobs), strict=True)
        for vector, old in zip((p, state.exp_avg, state.exp_avg_sq, *state.hidden), targets, strict=True):
            copy_all(list(old), self._pieces(vector))

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        """The jobs' coordinates in a padded vector, each shaped like its parameter."""
        pieces = zip(vector.split(self.layout.sizes), self.jobs, strict=True)
        return [piece[: job.param.numel()].view(job.param.shape) for piece, job in pieces]


def _bins(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Jobs in order, cut where the next one would make a vector longer than ``SMALL``."""
    batch: list[Job] = []
    filled = 0
    for job in jobs:
        size = -(-job.param.numel() // ALIGN) * ALIGN
        if batch and filled + size > limit(SMALL, job.param.device):
            yield batch
            batch, filled = [], 0
        batch.append(job)
        filled += size
    if batch:
        yield batch


class Flat:
    """A job's tensors as vectors, all in one order of coordinates.

    With ``in_order`` that is the order of their indices. Tensors that are contiguous, or else dense and of the same
    strides (channels_last, transposed), are seen through views of their memory. Others are copied, and
    :meth:`write_back` copies what has changed back.
    """

    def __init__(self, job: Job, in_order: bool = False) -> None:
        self.job = job
        contiguous = all(t.is_contiguous() for t in job.tensors)
        self.copied = not (contiguous or (not in_order and _share_order(job.tensors)))
        # Views of a leaf begin to require gradients once it has been changed, and kernels would be compiled again.
        in_place = (job.param.detach(), *job.tensors[1:])
        self.tensors = tuple(t.contiguous() for t in job.tensors) if self.copied else in_place

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
