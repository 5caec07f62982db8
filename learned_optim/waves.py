"""The three passes of a step: measure, head, apply.

The sums of every tensor (:func:`~learned_optim.update_rule.measure`), the head for many tensors at once
(:func:`~learned_optim.update_rule.coefficients`), then every coordinate (:func:`~learned_optim.update_rule.apply`).
Sums of a tensor's parts, be they chunks or the shards of several processes, add up between the first two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from learned_optim import update_rule
from learned_optim.balance import Squares
from learned_optim.cells import Hyperparameters
from learned_optim.coordinates import tensor_shape_context
from learned_optim.features import TensorSums
from learned_optim.policy import Policy
from learned_optim.safeguard import guarded

if TYPE_CHECKING:
    from learned_optim.backends import Backend, Job, Unit

#: Coordinates copied side by side, or copied because of their strides, before the passes are run over them.
COPIED = 1 << 19
#: Per-tensor numbers are computed for a multiple of this many tensors, the missing ones being empty: whole SIMD vectors
#: again, so that a tensor's bits do not depend on how many tensors are run with it.
COLUMNS = 16


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


class Head:
    """The policy's tensor head over all tensors of a wave."""

    def __init__(self, policy: Policy) -> None:
        self.config = policy.config
        self.weights = {name: w.detach().clone() for name, w in policy.weights().items()}

    def __call__(self, jobs: list[Job], sums: TensorSums) -> tuple[Tensor, Record]:
        """[C, len(jobs)] in float64; the jobs' memories and trusts are updated."""
        device = sums.u_u.device
        layout = _columns(tuple(job.shape for job in jobs), device)
        missing = layout.numel.numel() - len(jobs)
        padded = TensorSums(*torch.nn.functional.pad(torch.stack(sums), (0, missing)).unbind())
        memory = torch.zeros(3, len(jobs) + missing, dtype=torch.float64, device=device)
        for i, row in enumerate(memory):
            copy_all(list(row.unbind()[: len(jobs)]), [job.memory[i] for job in jobs])
        steps = [job.step for job in jobs]
        step = torch.tensor(steps + [1.0] * missing, dtype=torch.float64, device=device)
        weights = {k: w.to(device) for k, w in self.weights.items()}
        values, memory = update_rule.coefficients(weights, self.config, layout, padded, memory, step)
        for i, row in enumerate(memory):
            copy_all([job.memory[i] for job in jobs], list(row.unbind()[: len(jobs)]))
        trust = None
        trusts = [job.trust for job in jobs if job.trust is not None]
        if trusts:
            trust = torch.zeros_like(memory[0])
            copy_all(list(trust.unbind()[: len(jobs)]), trusts)
            values, trust = guarded(self.config, values, layout.numel, memory[0], trust)
            copy_all(trusts, list(trust.unbind()[: len(jobs)]))
        values = values[:, : len(jobs)]
        return values, Record(
            [job.place for job in jobs], steps, [job.hyper for job in jobs], layout.numel, sums, values, memory, trust
        )


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
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
        if wave and (copied + size > COPIED or unit.jobs[0].param.device != wave[0].jobs[0].param.device):
            yield _run_wave(backend.head, wave)
            wave, copied = [], 0
        wave.append(unit)
        copied += size
    if wave:
        yield _run_wave(backend.head, wave)


def _run_wave(head: Head, wave: list[Unit]) -> Record:
    jobs = [job for unit in wave for job in unit.jobs]
    squares = None
    if size := Squares.size(head.config, (job.shape for job in jobs)):
        zeros = torch.zeros(size, dtype=torch.float64, device=jobs[0].param.device)
        squares = Squares({job.place: job.shape for job in jobs}, jobs, zeros)
    sums = TensorSums(*(torch.cat(s) for s in zip(*(unit.measure(squares) for unit in wave), strict=True)))
    values, record = head(jobs, sums)
    shares = squares and squares.shares(head.config)
    for unit, columns in zip(wave, values.split([len(unit.jobs) for unit in wave], dim=1), strict=True):
        unit.apply(columns, shares)
    return record


def run_shards(
    backend: Backend,
    jobs: list[Job],
    shapes: dict[tuple[int, int], torch.Size],
    device: torch.device,
    add_up: Callable[[Tensor], None],
) -> Iterator[Record]:
    """Like :func:`run`, for tensors of which every process holds a part: all are measured before one is updated.

    Units are made a second time where keeping them would copy more than ``COPIED`` coordinates.

    Args:
        backend: makes the units.
        jobs: shards, empty ones among them: their per-tensor numbers are those of the whole tensor all the same.
        shapes: of the whole parameters that may have a job, the same in all processes and in the same order.
        device: of the shards.
        add_up: adds the other processes' sums, a vector in float64, in place. Called once, whatever the jobs.
    """
    columns = {place: number for number, place in enumerate(shapes)}
    of_squares = Squares.size(backend.head.config, shapes.values())
    of_tensors = len(TensorSums._fields) * len(columns)
    both = torch.zeros(of_tensors + of_squares, dtype=torch.float64, device=device)
    sums = both[:of_tensors].view(-1, len(columns))
    squares = Squares(shapes, jobs, both[of_tensors:]) if of_squares else None
    kept: list[Unit] = []
    copied = 0
    for unit, size in backend.units(jobs):
        sums[:, [columns[job.place] for job in unit.jobs]] = torch.stack(unit.measure(squares))
        copied += size
        if copied <= COPIED:
            kept.append(unit)
    add_up(both)
    if not jobs:
        return
    shares = squares and squares.shares(backend.head.config)
    values, record = backend.head(jobs, TensorSums(*sums[:, [columns[job.place] for job in jobs]].unbind()))
    position = {job.place: i for i, job in enumerate(jobs)}
    for unit in kept if copied <= COPIED else (unit for unit, _ in backend.units(jobs)):
        unit.apply(values[:, [position[job.place] for job in unit.jobs]], shares)
    yield record
