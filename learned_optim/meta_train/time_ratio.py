"""The time that one training run takes over another's: what evolution strategies and validation compare.

A difference of log-losses means little by itself: at the end of a run that fits its data exactly it is large, for a
language model small, and either may be a tenth of the time. Divided by the slope of the log-loss against the logarithm
of time it becomes a log-speedup, which is alike for tasks of unlike losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from learned_optim.tasks.rollout import smoothed

#: When losses are compared, in parts of the run.
TIMES = (0.25, 0.35, 0.5, 0.7, 1.0)

#: Slope below which a task counts as standing still: its differences are not blown up beyond this.
MIN_SLOPE = 0.1

#: Of the difference at each time, so that a divergence counts as slow and not as infinite.
BOUND = 1.5


#: When held-out losses are taken, in parts of the run: at each of ``TIMES`` and at half of it.
HELD_OUT_TIMES = tuple(sorted({part for time in TIMES for part in (time / 2, time)}))


class Outcome(NamedTuple):
    """What is kept of a run to compare it with another of the same task and length."""

    training: list[float]  #: :func:`marks` of the training losses
    held_out: list[float]  #: log-losses at ``HELD_OUT_TIMES``; empty where the task has no held-out data

    @classmethod
    def of(cls, losses: Sequence[float], held_out: Sequence[float]) -> Outcome:
        """From the losses before each step, and the held-out losses at :func:`held_out_steps`."""
        return cls(marks(losses), [log_loss(loss) for loss in held_out])


def held_out_steps(length: int) -> list[int]:
    """After how many steps of a run of this length held-out losses are taken: one for each of ``HELD_OUT_TIMES``."""
    return [max(1, round(length * part)) for part in HELD_OUT_TIMES]


def log_loss(loss: float) -> float:
    """Infinite for a run that has diverged."""
    return math.log(max(loss, 1e-10)) if math.isfinite(loss) else math.inf


def marks(losses: Sequence[float]) -> list[float]:
    """The smoothed log-loss at half of each of ``TIMES``, and at it: all that :func:`log_time_ratio` needs of a run."""
    ends = (max(1, round(len(losses) * part)) for time in TIMES for part in (time / 2, time))
    return [log_loss(smoothed(losses, end)) for end in ends]


def compare(first: Outcome, second: Outcome, held_out_share: float = 0.0) -> float:
    """The logarithm of the time that one run takes over that of another, in [-BOUND, BOUND].

    Args:
        first: the one run.
        second: the other, of the same task and length.
        held_out_share: the part of the comparison that is made on held-out losses, in [0, 1], where the task has any.
            Half of that is the time to the lowest held-out loss so far, half the held-out loss at the end: a run that
            over-fits early has a low one on the way, and a high one at its end.
    """
    ratio = log_time_ratio(first.training, second.training)
    if held_out_share == 0.0 or not (first.held_out and second.held_out):
        return ratio
    a, b = (list(accumulate(run.held_out, min)) for run in (first, second))
    pairs = [HELD_OUT_TIMES.index(part) for time in TIMES for part in (time / 2, time)]
    lowest = log_time_ratio([a[i] for i in pairs], [b[i] for i in pairs])
    half, whole = HELD_OUT_TIMES.index(0.5), HELD_OUT_TIMES.index(1.0)
    end = _one_time((a[half], first.held_out[-1]), (b[half], second.held_out[-1]), (a[whole], b[whole]))
    return (1.0 - held_out_share) * ratio + held_out_share * (lowest + end) / 2.0


def log_time_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The same from :func:`marks` alone, the mean over ``TIMES``."""
    ratios = [_one_time(first[i : i + 2], second[i : i + 2]) for i in range(0, len(first), 2)]
    return sum(ratios) / len(TIMES)


def _one_time(first: Sequence[float], second: Sequence[float], lowest: Sequence[float] | None = None) -> float:
    """At one of ``TIMES``, from the log-losses at half of it and at it.

    Args:
        first: of the one run.
        second: of the other.
        lowest: the log-losses that the slopes lead to, where those are not the losses that are compared.
    """
    (a0, a), (b0, b) = first, second
    if not (math.isfinite(a) or math.isfinite(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.copysign(BOUND, a - b)
    ends = (a, b) if lowest is None else lowest
    drops = [drop / math.log(2.0) for drop in (a0 - ends[0], b0 - ends[1]) if math.isfinite(drop)]
    slope = max(sum(drops) / len(drops) if drops else 0.0, MIN_SLOPE)
    return min(max((a - b) / slope, -BOUND), BOUND)
