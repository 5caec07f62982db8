"""How the one update rule is run over a model's tensors, without gradients and in place.

Everything here is bookkeeping: which coordinates are shown to :mod:`learned_optim.update_rule` together. Results do
not depend on it: a tensor's update is bit-identical whatever other tensors are in its group, and in what order.

The passes of a step over what is shown together are those of :mod:`learned_optim.waves`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from learned_optim import update_rule
from learned_optim.cells import CoordinateState
from learned_optim.coordinates import Pieces, Segments, Whole
from learned_optim.features import TensorSums
from learned_optim.jobs import Flat, Job
from learned_optim.orthogonal import rows_and_columns
from learned_optim.policy import Policy, PolicyConfig
from learned_optim.rounding import rounded_state
from learned_optim.waves import Head, Tensors, copy_all, limit

#: Tensors up to this many coordinates are run side by side, in vectors of up to this many coordinates. Below torch's
#: grain size for threads, so that no thread boundary can fall differently when tensors are grouped differently.
SMALL = 1 << 15
#: Larger tensors are run in chunks of this many coordinates: temporaries stay in the cache, 256 KB each.
CHUNK = 1 << 16
#: Padding of small tensors: a multiple of every SIMD vector's length.
ALIGN = 64


class Backend(Protocol):
    @property
    def name(self) -> str:
        """What is used, and why."""
        ...

    @property
    def head(self) -> Head: ...

    def prepare(self, jobs: list[Job]) -> None:
        """Hear, before a step, of all of its jobs."""
        ...

    def units(self, jobs: list[Job]) -> Iterator[tuple[Unit, int]]:
        """All jobs that have coordinates, each in one unit, and how many coordinates the unit has copied.

        They are made one by one, as they are wanted. The same jobs give the same units again.
        """
        ...


class Unit(Protocol):
    """Some tensors of a step that are run together."""

    jobs: list[Job]

    def measure(self) -> TensorSums:
        """The sums of each job, [len(jobs)] each, in float64."""
        ...

    def apply(self, values: Tensor) -> dict[tuple[int, int], Tensor]:
        """Write the update, given the coefficients [C, len(jobs)].

        Parameters that :func:`is_orthogonalised` are left as they are; their d, [numel] in the order of the indices and
        in the dtype of the arithmetic, is returned by the place of the job.
        """
        ...


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything of lower precision."""
    return torch.promote_types(dtype, torch.float32)


def is_orthogonalised(config: PolicyConfig, job: Job) -> bool:
    """Whether this tensor's update is orthogonalised, in parts or as a whole."""
    return config.orthogonal > 0.0 and rows_and_columns(job.shape, config.orthogonal_aspect) is not None


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

    def prepare(self, jobs: list[Job]) -> None:
        pass

    def units(self, jobs: list[Job]) -> Iterator[tuple[Unit, int]]:
        small: dict[tuple, list[Job]] = {}
        for job in jobs:
            if job.numel > limit(SMALL, job.format.device):
                unit = _Large(self, job)
                yield unit, job.numel if unit.flat.copied else 0
            elif job.numel > 0:
                as_matrix = is_orthogonalised(self.head.config, job)
                small.setdefault((job.moment, job.format, as_matrix), []).append(job)
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
        self.as_matrix = is_orthogonalised(backend.head.config, job)
        self.now = job.moment.for_directions if self.as_matrix else job.moment.numbers
        self.flat = Flat(job, self.as_matrix)
        self.chunk = limit(CHUNK, job.param.device)

    def measure(self) -> TensorSums:
        parts = [update_rule.measure(self.layout, *self._inputs(chunk), self.now) for chunk in self._chunks()]
        return TensorSums(*(torch.stack(s).double().sum(0) for s in zip(*parts, strict=True)))

    def apply(self, values: Tensor) -> dict[tuple[int, int], Tensor]:
        backend, config = self.backend, self.backend.head.config
        coeff = update_rule.spread_coefficients(config, self.layout, values, self.dtype)
        first = self.flat.vectors[0]
        written = torch.empty_like(first, dtype=self.dtype) if self.as_matrix else first
        for chunk, target in zip(self._chunks(), written.split(self.chunk), strict=True):
            p, state = update_rule.apply(backend.numbers, config, coeff, *self._inputs(chunk), self.now)
            state = rounded_state(state, [t.dtype for t in chunk[2:]])
            copy_all([target, *chunk[2:]], [p, state.exp_avg, state.exp_avg_sq, *state.hidden])
        self.flat.write_back()
        return {self.jobs[0].place: written} if self.as_matrix else {}

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
        device, self.dtype = first.format.device, arithmetic_dtype(first.format.param)
        self.layout = _segments(tuple([job.param.shape for job in jobs]), device)
        self.packing = packing(tuple([job.numel for job in jobs]), ALIGN, device)
        self.as_matrices = is_orthogonalised(backend.head.config, first)
        self.now = first.moment.for_directions if self.as_matrices else first.moment.numbers
        self.vectors = [_vectors(job) for job in jobs]
        planes = list(zip(*(vectors.planes for vectors in self.vectors), strict=True))
        p, g, m, v, *h = self.packing.pack(planes, [self.dtype] * len(planes))
        self.inputs = p, g, CoordinateState(m, v, tuple(h))

    def measure(self) -> TensorSums:
        return TensorSums(*(s.double() for s in update_rule.measure(self.layout, *self.inputs, self.now)))

    def apply(self, values: Tensor) -> dict[tuple[int, int], Tensor]:
        backend, config = self.backend, self.backend.head.config
        coeff = update_rule.spread_coefficients(config, self.layout, values, self.dtype)
        p, state = update_rule.apply(backend.numbers, config, coeff, *self.inputs, self.now)
        state = rounded_state(state, [t.dtype for t in self.jobs[0].planes])
        written, _, *state_old = zip(*(vectors.planes for vectors in self.vectors), strict=True)
        if self.as_matrices:
            written = [torch.empty_like(vector, dtype=self.dtype) for vector in written]
        self.packing.write([written, *state_old], [p, state.exp_avg, state.exp_avg_sq, *state.hidden])
        for vectors in self.vectors:
            if vectors.flat is not None:
                vectors.flat.write_back()
        return {job.place: d for job, d in zip(self.jobs, written, strict=True)} if self.as_matrices else {}


class _Vectors:
    """A small job's tensors as vectors, in the order of their indices; kept with it where they need no copies."""

    def __init__(self, job: Job) -> None:
        flat = Flat(job, in_order=True)
        self.flat, self.planes = flat if flat.copied else None, flat.vectors

    def let_go(self) -> None:
        self.planes[1] = self.planes[0]


def _vectors(job: Job) -> _Vectors:
    vectors = job.kept
    if isinstance(vectors, _Vectors):
        vectors.planes[1] = job.grad.reshape(-1)
        return vectors
    vectors = _Vectors(job)
    job.kept = None if vectors.flat else vectors
    return vectors


class Packing:
    """Vectors side by side in one, each with zeros behind up to a multiple of ``align``, the last with some more.

    Args:
        sizes: of the vectors, 1 or more.
        align: see above.
        device: where they are.
        spare: further zeros at the end.
    """

    def __init__(self, sizes: Sequence[int], align: int, device: torch.device, spare: int = 0) -> None:
        self.sizes = sizes
        self._gaps = [-size % align for size in sizes]
        self._gaps[-1] += spare
        self.total = sum(sizes) + sum(self._gaps)
        self._pieces = Pieces(sizes, self._gaps)
        self._device = device
        self._zeros: dict[torch.dtype, list[Tensor]] = {}

    def pack(self, planes: Sequence[Sequence[Tensor]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Each plane's vectors as one, [total], of a dtype to which theirs can be promoted."""
        packed: list[Any] = [None] * len(planes)
        for dtype, which in _numbers_of(dtypes).items():
            if dtype not in self._zeros:
                zeros = torch.zeros(max(self._gaps), dtype=dtype, device=self._device)
                self._zeros[dtype] = [zeros[:gap] for gap in self._gaps]
            gaps = self._zeros[dtype]
            parts = [part for i in which for both in zip(planes[i], gaps, strict=True) for part in both]
            for i, plane in zip(which, torch.cat(parts).to(dtype).view(len(which), -1).unbind(), strict=True):
                packed[i] = plane
        return packed

    def write(self, planes: Sequence[Sequence[Tensor]], packed: Sequence[Tensor]) -> None:
        """Copy what was packed, and has changed since, into vectors."""
        kinds = [(plane[0].dtype, one.dtype) for plane, one in zip(planes, packed, strict=True)]
        for which in _numbers_of(kinds).values():
            targets = [part for i in which for part in planes[i]]
            copy_all(targets, [part for i in which for part in self.unpack(packed[i])])

    def unpack(self, vector: Tensor) -> Tensors:
        """Views of the vectors in one of length ``total``."""
        return self._pieces.of(vector)


def _numbers_of(kinds: Sequence[Hashable]) -> dict[Any, list[int]]:
    """At which numbers of a sequence each of its values stands."""
    found: dict[Any, list[int]] = {}
    for i, kind in enumerate(kinds):
        found.setdefault(kind, []).append(i)
    return found


@lru_cache(maxsize=256)
def packing(sizes: tuple[int, ...], align: int, device: torch.device, spare: int = 0) -> Packing:
    return Packing(sizes, align, device, spare)


def _bins(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Jobs in order, cut where the next one would make a vector longer than ``SMALL``."""
    batch: list[Job] = []
    filled = 0
    for job in jobs:
        size = -(-job.numel // ALIGN) * ALIGN
        if batch and filled + size > limit(SMALL, job.format.device):
            yield batch
            batch, filled = [], 0
        batch.append(job)
        filled += size
    if batch:
        yield batch
