"""The time that one training run takes over another's: what evolution strategies and validation compare.

A difference of log-losses means little by itself: at the end of a run that fits its data exactly it is large, for a
language model small, and either may be a tenth of the time. Divided by the slope of the log-loss against the logarithm
of time it becomes a log-speedup, which is alike for tasks of unlike losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from learned_optim.tasks.rollout import smoothed

#: When losses are compared, in parts of the run.
TIMES = (0.25, 0.35, 0.5, 0.7, 1.0)

#: Slope below which a task counts as standing still: its differences are not blown up beyond this.
MIN_SLOPE = 0.1

#: Of the difference at each time, so that a divergence counts as slow and not as infinite.
BOUND = 1.5


def log_loss(loss: float) -> float:
    """Infinite for a run that has diverged."""
    return math.log(max(loss, 1e-10)) if math.isfinite(loss) else math.inf


def marks(losses: Sequence[float]) -> list[float]:
    """The smoothed log-loss at half of each of ``TIMES``, and at it: all that :func:`log_time_ratio` needs of a run."""
    ends = (max(1, round(len(losses) * part)) for time in TIMES for part in (time / 2, time))
    return [log_loss(smoothed(losses, end)) for end in ends]


def log_time_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The logarithm of the time that one run takes over that of another, in [-BOUND, BOUND].

    Args:
        first: :func:`marks` of the one run.
        second: those of the other, of the same task and length.
    """
    total = 0.0
    for i in range(0, len(first), 2):
        (a0, a), (b0, b) = first[i : i + 2], second[i : i + 2]
        if math.isfinite(a) and math.isfinite(b):
            drops = [drop / math.log(2.0) for drop in (a0 - a, b0 - b) if math.isfinite(drop)]
            slope = max(sum(drops) / len(drops) if drops else 0.0, MIN_SLOPE)
            total += min(max((a - b) / slope, -BOUND), BOUND)
        elif math.isfinite(a) or math.isfinite(b):
            total += math.copysign(BOUND, a - b)
    return total / len(TIMES)
