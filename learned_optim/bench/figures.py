"""From runs to figures: one contender against another, task by task and in summary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from learned_optim.bench.curves import FLOOR, Run, final_loss, geometric_mean, held_out_speedup, speedup, spread
from learned_optim.bench.quality import CHOSEN_BY, HELD_OUT, Figure, QualityResult, TaskResult


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A held-out figure of a contender and of a reference, each at the setting whose own figure is the lowest.

    Args:
        loss: mean over the seeds; ``None`` where it is not finite.
        reference_loss: the reference's.
        reference_setting: its setting, in words.
    """

    loss: float | None
    reference_loss: float | None
    reference_setting: str

    @property
    def ratio(self) -> float | None:
        """Over the reference's; ``None`` where either is not positive."""
        return _over(self.loss, self.reference_loss)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One contender against a reference on one task; ``None`` is what is not known or has no finite value.

    Args:
        task: its name.
        speedup: geometric mean over the seeds, as defined in :mod:`learned_optim.bench.curves`.
        spread: standard deviation of the speedup over the seeds.
        log_spread: the same of its logarithm.
        held_out_speedup: the same in held-out loss, geometric mean.
        loss: final smoothed training loss, mean over the seeds.
        reference_loss: the reference's.
        held_out_loss: at the end, mean over the seeds, with the setting whose training loss is the lowest.
        reference_held_out_loss: the reference's.
        held_out: the figures of ``HELD_OUT``, each at the settings that are best by it; empty without held-out data.
        time_ratio: seconds per step over the reference's: the same gradient, each with its own update.
        diverged: runs that did.
        reference_diverged: the reference's.
    """

    task: str
    speedup: float | None
    spread: float | None
    log_spread: float | None
    held_out_speedup: float | None
    loss: float | None
    reference_loss: float | None
    held_out_loss: float | None
    reference_held_out_loss: float | None
    held_out: Mapping[Figure, HeldOut]
    time_ratio: float | None
    diverged: int
    reference_diverged: int

    @property
    def held_out_ratio(self) -> float | None:
        """Held-out loss at the end over the reference's; ``None`` where either is not positive."""
        return _over(self.held_out_loss, self.reference_held_out_loss)

    @property
    def time_speedup(self) -> float | None:
        """Speedup in processor time: that in steps over the time that a step takes, over the reference's."""
        return self.speedup / self.time_ratio if self.speedup is not None and self.time_ratio is not None else None


@dataclasses.dataclass(frozen=True)
class Summary:
    """One contender against a reference over all tasks.

    Args:
        tasks: that the mean is over: those where the reference did not diverge.
        speedup: geometric mean; runs that diverged count as 0.01.
        spread: standard deviation of its logarithm from one set of seeds to another, pooled over the tasks.
        worst: lowest speedup.
        worst_task: where.
        losses: tasks with a speedup below 1.
        held_out_speedup: geometric mean.
        held_out_ratio: held-out loss at the end over the reference's, with the settings whose training loss is the
            lowest; geometric mean over the tasks that have both.
        held_out_ratios: of the figures of ``HELD_OUT``, with the settings that are best by each; the same mean.
        time_ratio: seconds per step over the reference's, geometric mean.
        time_speedup: speedup in processor time, geometric mean.
        diverged: runs that did.
        reference_diverged: the reference's.
    """

    tasks: int
    speedup: float | None
    spread: float | None
    worst: float | None
    worst_task: str
    losses: int
    held_out_speedup: float | None
    held_out_ratio: float | None
    held_out_ratios: Mapping[Figure, float | None]
    time_ratio: float | None
    time_speedup: float | None
    diverged: int
    reference_diverged: int


def compare(task: TaskResult, contender: str, reference: str) -> Comparison:
    """Figures of a contender on a task, seed by seed against the same seed of the reference."""
    ours, its = task.choices[contender].runs, task.choices[reference].runs
    pairs = list(zip(ours, its, strict=True))
    faster = _known([speedup(a, b) for a, b in pairs])
    held_out = _known([held_out_speedup(a, b) for a, b in pairs])
    return Comparison(
        task.task, _mean(faster), spread(faster), spread([math.log(x) for x in faster]), _mean(held_out),
        _average([final_loss(run) for run in ours]), _average([final_loss(run) for run in its]),
        _average([run.final_held_out for run in ours]), _average([run.final_held_out for run in its]),
        {figure: _held_out(task, figure, contender, reference) for figure in HELD_OUT if len(ours[0].held_out)},
        _time_ratio(ours, its), sum(run.diverged for run in ours), sum(run.diverged for run in its),
    )  # fmt: skip


def compare_all(result: QualityResult, contender: str, reference: str) -> list[Comparison]:
    """:func:`compare` for every task."""
    return [compare(task, contender, reference) for task in result.tasks]


def summarise(comparisons: Sequence[Comparison]) -> Summary:
    """The summary of comparisons with one reference."""
    known = [c for c in comparisons if c.speedup is not None]
    worst = min(known, key=lambda c: c.speedup or FLOOR, default=None)
    log_spreads = [c.log_spread for c in known if c.log_spread is not None]
    return Summary(
        len(known), _mean(_known([c.speedup for c in known])),
        math.sqrt(sum(s * s for s in log_spreads)) / len(log_spreads) if log_spreads else None,
        worst.speedup if worst else None, worst.task if worst else "",
        sum((c.speedup or FLOOR) < 1.0 for c in known),
        _mean(_known([c.held_out_speedup for c in comparisons])),
        _mean(_known([c.held_out_ratio for c in comparisons])),
        {f: _mean(_known([c.held_out[f].ratio for c in comparisons if f in c.held_out])) for f in HELD_OUT},
        _mean(_known([c.time_ratio for c in comparisons])),
        _mean(_known([c.time_speedup for c in comparisons])),
        sum(c.diverged for c in comparisons), sum(c.reference_diverged for c in comparisons),
    )  # fmt: skip


def share_at_least(speedups: Sequence[float | None], x: float) -> float:
    """The performance profile at x: the part of the tasks on which the speedup is at least x (unknown ones are not)."""
    return sum(s is not None and s >= x for s in speedups) / len(speedups) if speedups else math.nan


def _held_out(task: TaskResult, figure: Figure, contender: str, reference: str) -> HeldOut:
    ours, its = task.chosen_by[figure][contender], task.chosen_by[figure][reference]
    mine, other = (_average([CHOSEN_BY[figure](run) for run in choice.runs]) for choice in (ours, its))
    return HeldOut(mine, other, str(its.setting))


def _over(ours: float | None, its: float | None) -> float | None:
    return ours / its if ours is not None and its is not None and ours > 0.0 and its > 0.0 else None


def _time_ratio(ours: Sequence[Run], its: Sequence[Run]) -> float | None:
    """The gradient is the same work for both: its quickest measurement stands for both, whatever else was running."""
    gradient = min(run.step_seconds - run.update_seconds for run in (*ours, *its))
    mine, other = (gradient + min(run.update_seconds for run in runs) for runs in (ours, its))
    return mine / other if mine > 0.0 and other > 0.0 else None


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: list[float]) -> float | None:
    return geometric_mean(values) if values else None


def _average(values: Sequence[float | None]) -> float | None:
    """Mean, if all are known and finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known and len(known) == len(values) else None
