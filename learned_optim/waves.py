"""The three passes of a step: measure, head, apply.

The sums of every tensor (:func:`~learned_optim.update_rule.measure`), the head for many tensors at once
(:func:`~learned_optim.update_rule.coefficients`), then every coordinate (:func:`~learned_optim.update_rule.apply`).
Where matrices are orthogonalised their parameters follow after that.
Sums of a tensor's parts, be they chunks or the shards of several processes, add up between the first two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from learned_optim import update_rule
from learned_optim.cells import ORTHOGONAL, Hyperparameters
from learned_optim.coordinates import Shapes, tensor_shape_context
from learned_optim.features import TensorSums
from learned_optim.orthogonal import alike, as_configured, rows_and_columns
from learned_optim.policy import Policy, PolicyConfig
from learned_optim.safeguard import guarded

if TYPE_CHECKING:
    from learned_optim.backends import Backend, Unit
    from learned_optim.jobs import Job
    from learned_optim.sharding import Shards

#: Coordinates copied side by side, or copied because of their strides, before the passes are run over them.
COPIED = 1 << 19
#: On a GPU all limits of this kind are so many times as large: what is gained there is launches, each of which costs as
#: much as some hundred thousand coordinates.
ON_GPU = 32
#: Coordinates of equal matrices that are multiplied as one batch: more of them only leave the processor's cache.
MULTIPLIED = 1 << 16
#: Per-tensor numbers are computed for a multiple of this many tensors, the missing ones being empty: whole SIMD vectors
#: again, so that a tensor's bits do not depend on how many tensors are run with it.
COLUMNS = 16


Tensors = list[Tensor] | tuple[Tensor, ...]


class Lengths(NamedTuple):
    """How long updates are over what they were before orthogonalising."""

    places: list[tuple[int, int]]
    factors: Tensor  #: [len(places)]


class Record(NamedTuple):
    """What the head saw and said of K tensors in their last step: a few dozen numbers each."""

    places: list[tuple[int, int]]  #: see :class:`~learned_optim.backends.Job`
    steps: list[float]
    hypers: list[Hyperparameters]
    numel: Tensor  #: [K], and more than K as ``memory``
    sums: TensorSums  #: [K] each
    coefficients: Tensor  #: [C, K]
    memory: Tensor  #: [3, K]
    trust: Tensor | None  #: [K], and more, where there is a safeguard
    lengths: list[Lengths]  #: of those that were orthogonalised


class _Columns(NamedTuple):
    """Shapes of K tensors, and of as many empty ones as make K a multiple of ``COLUMNS``."""

    numel: Tensor
    shape_context: Tensor


@lru_cache(maxsize=256)
def _columns(shapes: tuple[torch.Size, ...], device: torch.device) -> _Columns:
    padded = (*shapes, *[torch.Size((0,))] * (-len(shapes) % COLUMNS))
    context = torch.tensor([tensor_shape_context(shape) for shape in padded], dtype=torch.float64, device=device)
    numel = torch.tensor([float(max(math.prod(s), 1)) for s in padded], dtype=torch.float64, device=device)
    return _Columns(numel, context.T.contiguous())


def limit(coordinates: int, device: torch.device) -> int:
    """A limit that is meant for CPUs, as it is on this device."""
    return coordinates if device.type == "cpu" else coordinates * ON_GPU


def to_device(numbers: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of them, without waiting for what a GPU still has to do."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def tensor_numbers(
    config: PolicyConfig,
    weights: Mapping[str, Tensor],
    layout: Shapes,
    sums: TensorSums,
    memory: Tensor,
    step: Tensor,
    trust: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Coefficients [C, K], memory [3, K] and, where there is a safeguard, trust [1, K] after a step."""
    values, memory = update_rule.coefficients(weights, config, layout, sums, memory, step)
    if trust is not None:
        values, trust = guarded(config, values, layout.numel, memory[0], trust[0])
        trust = trust.unsqueeze(0)
    return values, memory, trust


class Head:
    """The policy's tensor head over all tensors of a wave."""

    def __init__(self, policy: Policy) -> None:
        self.config = policy.config
        self.weights = {name: w.detach().to(torch.float64, copy=True) for name, w in policy.weights().items()}
        self.compute: dict[torch.device, Callable] = {}  #: in place of :func:`tensor_numbers`
        self._weights: dict[torch.device, dict[str, Tensor]] = {}
        self._kept: dict[tuple[int, torch.device], tuple[Tensor, list[Tensor]]] = {}

    def _numbers(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """A matrix in float64 to write into, and views of its numbers: those of the last call, if they fit."""
        kept = self._kept.get((rows, device))
        if kept is None or kept[0].shape[1] != columns:
            with torch.inference_mode(False), torch.no_grad():
                matrix = torch.zeros(rows, columns, dtype=torch.float64, device=device)
                kept = self._kept[rows, device] = matrix, list(matrix.view(-1).unbind())
        return kept

    def __call__(self, jobs: list[Job], sums: TensorSums) -> tuple[Tensor, Record]:
        """[C, len(jobs)] in float64; the jobs' memories and trusts are updated."""
        device, count = sums.u_u.device, len(jobs)
        layout = _columns(tuple([job.shape for job in jobs]), device)
        total = layout.numel.numel()
        padded = TensorSums(*torch.nn.functional.pad(torch.stack(sums), (0, total - count)).unbind())
        kept = [value for values in zip(*(job.memory for job in jobs), strict=True) for value in values]
        memory = _gathered(*self._numbers(3, count, device), kept, total)
        moments = [job.moment for job in jobs]
        steps = [moment.step for moment in moments]
        step = to_device(steps + [1.0] * (total - count), torch.float64, device)
        trusts = [job.trust for job in jobs if job.trust is not None]
        trust = _gathered(*self._numbers(1, count, device), trusts, total) if trusts else None
        if device not in self._weights:
            self._weights[device] = {k: w.to(device) for k, w in self.weights.items()}
        compute = self.compute.get(device, tensor_numbers)
        values, memory, trust = compute(self.config, self._weights[device], layout, padded, memory, step, trust)
        _scattered(*self._numbers(3, count, device), kept, memory)
        if trust is not None:
            _scattered(*self._numbers(1, count, device), trusts, trust)
            trust = trust[0]
        values = values[:, :count]
        places, hypers = [job.place for job in jobs], [moment.hyper for moment in moments]
        return values, Record(places, steps, hypers, layout.numel, sums, values, memory, trust, [])


def _gathered(matrix: Tensor, views: list[Tensor], numbers: list[Tensor], columns: int) -> Tensor:
    """0-d tensors, one row after the other, as [rows, columns] with zeros at the end of each row."""
    copy_all(views, numbers)
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))


def _scattered(matrix: Tensor, views: list[Tensor], numbers: list[Tensor], new: Tensor) -> None:
    """The reverse, in place of what was gathered."""
    matrix.copy_(new[:, : matrix.shape[1]])
    copy_all(numbers, views)


def copy_all(targets: Tensors, sources: Tensors) -> None:
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def run(backend: Backend, jobs: list[Job]) -> Iterator[Record]:
    """Update every job's parameter, planes and memory in place, as many units at once as ``COPIED`` allows.

    Args:
        backend: makes the units.
        jobs: those of tensors that this process holds as a whole.
    """
    wave: list[Unit] = []
    copied = 0
    for unit, size in backend.units(jobs):
        device = unit.jobs[0].param.device
        if wave and (copied + size > limit(COPIED, device) or device != wave[0].jobs[0].param.device):
            yield _run_wave(backend.head, wave)
            wave, copied = [], 0
        wave.append(unit)
        copied += size
    if wave:
        yield _run_wave(backend.head, wave)


def _run_wave(head: Head, wave: list[Unit]) -> Record:
    jobs = [job for unit in wave for job in unit.jobs]
    parts = [unit.measure() for unit in wave]
    sums = parts[0] if len(parts) == 1 else TensorSums(*map(torch.cat, zip(*parts, strict=True)))
    values, record = head(jobs, sums)
    most = limit(COPIED, values.device)
    matrices: list[_Matrix] = []
    waiting = 0
    for unit, columns in zip(wave, values.split([len(unit.jobs) for unit in wave], dim=1), strict=True):
        if found := unit.apply(columns):  # of all of its jobs or of none
            shares = columns[ORTHOGONAL].unbind()
            matrices += [_Matrix(j, found[j.place], share) for j, share in zip(unit.jobs, shares, strict=True)]
            waiting += sum(j.numel for j in unit.jobs)
        if waiting > most:
            record.lengths.extend(_step_along(head.config, matrices))
            matrices, waiting = [], 0
    record.lengths.extend(_step_along(head.config, matrices))
    return record


class _Matrix(NamedTuple):
    """A parameter that moves when its update has been orthogonalised."""

    job: Job
    d: Tensor  #: [numel]
    share: Tensor  #: 0-d


def _step_along(config: PolicyConfig, matrices: list[_Matrix]) -> Iterator[Lengths]:
    """Orthogonalise updates and move the parameters, equal ones at once: which, and how long they are over before."""
    for numbers in alike((job.param.shape, d.dtype, job.moment) for job, d, _ in matrices):
        numel = matrices[numbers[0]].job.numel
        at_once = max(1, limit(MULTIPLIED, matrices[0].d.device) // numel)
        for start in range(0, len(numbers), at_once):
            jobs, ds, shares = zip(*(matrices[i] for i in numbers[start : start + at_once]), strict=True)
            d = _stacked(ds).view(len(jobs), jobs[0].param.shape[0], -1)
            d, factors = as_configured(config, d, _stacked(shares).to(d.dtype).view(-1, 1, 1))
            _step(jobs, d)
            yield Lengths([job.place for job in jobs], factors.flatten())


def _step(jobs: Sequence[Job], d: Tensor) -> None:
    """Move parameters of one shape, dtype and moment along d, [len(jobs), ...]."""
    params = [job.param.detach() for job in jobs]
    before = _stacked(params).to(d.dtype)
    copy_all(params, update_rule.stepped(before, d.reshape(before.shape), jobs[0].moment.numbers).unbind())


def _stacked(tensors: Tensors) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def run_shards(backend: Backend, jobs: list[Job], shards: Shards) -> Iterator[Record]:
    """Like :func:`run`, for tensors of which every process holds a part: all are measured before one is updated.

    Units are made a second time where keeping them would copy more than ``COPIED`` coordinates. Sums are added up once,
    whatever the jobs; where updates are orthogonalised every process then adds up each matrix's and sees it as a whole.

    Args:
        backend: makes the units.
        jobs: shards, empty ones among them: their per-tensor numbers are those of the whole tensor all the same.
        shards: the parameters that may have a job.
    """
    columns = {place: number for number, place in enumerate(shards.shapes)}
    sums = torch.zeros(len(TensorSums._fields), len(columns), dtype=torch.float64, device=shards.device)
    kept: list[Unit] = []
    copied, most = 0, limit(COPIED, shards.device)
    for unit, size in backend.units(jobs):
        sums[:, [columns[job.place] for job in unit.jobs]] = torch.stack(unit.measure())
        copied += size
        if copied <= most:
            kept.append(unit)
    shards.add_up(sums)
    position = {job.place: i for i, job in enumerate(jobs)}
    found: dict[tuple[int, int], Tensor] = {}
    share = sums.new_zeros(len(jobs))
    lengths: list[Lengths] = []
    if jobs:
        values, record = backend.head(jobs, TensorSums(*sums[:, [columns[job.place] for job in jobs]].unbind()))
        share = values[ORTHOGONAL]
        for unit in kept if copied <= most else (unit for unit, _ in backend.units(jobs)):
            found |= unit.apply(values[:, [position[job.place] for job in unit.jobs]])
        lengths = record.lengths
        yield record
    config = backend.head.config
    if config.orthogonal:
        for place, shape in shards.shapes.items():
            if (matrix := rows_and_columns(shape, config.orthogonal_aspect)) is not None:
                d = torch.zeros(matrix, dtype=shards.dtypes[place], device=shards.device)
                if place not in found:  # nothing of it is here, or no gradient
                    shards.add_up(d)
                    continue
                job = jobs[position[place]]
                part = found[place].view(job.param.shape[0], -1)
                (row, column), (rows, width) = job.origin, part.shape
                here = d[row : row + rows, column : column + width]
                here.copy_(part)
                shards.add_up(d)
                d, factor = as_configured(config, d, share[position[place]].to(d.dtype))
                lengths.append(Lengths([place], factor.flatten()))
                _step([job], d[row : row + rows, column : column + width])
