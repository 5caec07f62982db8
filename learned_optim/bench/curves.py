"""What is kept of a run, and the figures that are taken from it. The definition of *speedup* stands here.

Smoothing
    ``S(t)`` is the mean of the training losses over the last tenth of the first t steps, ``(0.9 t, t]`` (but no
    fewer than 2% of the run, which matters in its first fifth only). The window grows with t so that a run which is
    twice as fast has the same smoothed curve, twice as fast. The *final loss* is S at the end of the run.

Reaching
    A run reaches a loss at the first t at which its smoothed curve is at or below it; between two points of the curve
    t is interpolated linearly. What the curve does afterwards does not matter, so a curve need not be monotone.

Speedup of ours over a reference, both of T steps
    ``t_ref(L) / t_ours(L)`` with L the final loss of the reference, where ``t_x(L)`` is the step at which x reaches L.
    A reference that is at its final loss before its end is credited with that, so that equal curves have speedup 1.
    If ours never reaches L: ``t_ref(L') / T`` with L' the final loss of ours, the part of its run that the reference
    needs for what took ours all of it; below 1, and continuous with the first case.
    A run that diverged has speedup 0.01, and every speedup lies within [0.01, 100]. There is none (``None``) over a
    reference that diverged.

Held-out speedup
    The same with held-out losses, unsmoothed, which are known at some points along the run; between them linear.

Held-out loss at the end, and the lowest along the run
    Each is compared with that of the reference's setting whose own is the lowest: a user who stops early, or who looks
    at held-out data at all, chooses by that figure and not by the training loss.

Diverged
    A loss that is not finite, or a final loss above 1.5 times the first one.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

BINS = 400
SMOOTHING = 0.1
LEAST_WINDOW = 0.02
FLOOR = 0.01
DIVERGED_ABOVE = 1.5


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Args:
        steps: its length in inner steps.
        losses: training losses before each step, averaged into at most 400 bins of equal width; ``inf`` from the first
            one that is not finite.
        first_loss: the loss of the first batch.
        evaluated_at: steps after which the held-out loss was taken, from 0 to the end; empty if there is no such data.
        held_out: those losses; ``inf`` once the run had diverged.
        step_seconds: processor seconds per step (gradient and update), typical of the run, one thread.
        update_seconds: processor seconds of the optimizer's part of it.
        parameters: coordinates of the model.
    """

    steps: int
    losses: Values
    first_loss: float
    evaluated_at: Values
    held_out: Values
    step_seconds: float
    update_seconds: float
    parameters: int

    @property
    def diverged(self) -> bool:
        """See the module's docstring."""
        end = final_loss(self)
        return not math.isfinite(end) or end > max(DIVERGED_ABOVE * self.first_loss, 0.0)

    @property
    def final_held_out(self) -> float | None:
        """The held-out loss at the end."""
        return float(self.held_out[-1]) if len(self.held_out) else None

    @property
    def lowest_held_out(self) -> float | None:
        """The lowest held-out loss along the run, its start included: what the best checkpoint would have."""
        return float(self.held_out.min()) if len(self.held_out) else None


def bin_edges(steps: int) -> Values:
    """Edges of the bins that the losses of a run are averaged into, in steps."""
    return np.round(np.linspace(0.0, steps, min(BINS, steps) + 1))


def binned(losses: Values) -> Values:
    """Mean losses per bin, as they are stored."""
    edges = bin_edges(len(losses)).astype(int)
    with np.errstate(over="ignore", invalid="ignore"):
        means = np.add.reduceat(losses, edges[:-1]) / np.diff(edges)
        means = means.astype(np.float32).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(means))
    if len(bad):
        means[bad[0] :] = math.inf
    return means


def smoothed_curve(run: Run) -> tuple[Values, Values]:
    """``(t, S(t))`` at the bins' right edges; ``inf`` from where the losses are."""
    edges = bin_edges(run.steps)
    finite = int(np.isfinite(run.losses).sum())
    summed = np.concatenate([[0.0], np.cumsum(run.losses[:finite] * np.diff(edges)[:finite])])
    t = edges[1:]
    width = np.minimum(np.maximum(SMOOTHING * t, LEAST_WINDOW * run.steps), t)[:finite]
    before = np.interp(t[:finite] - width, edges[: finite + 1], summed)
    smooth = np.full(len(t), math.inf)
    smooth[:finite] = (summed[1:] - before) / width
    return t, smooth


def final_loss(run: Run) -> float:
    """The smoothed training loss at the end; ``inf`` or more than that (NaN never) where it diverged."""
    return float(smoothed_curve(run)[1][-1])


def first_reaches(t: Values, values: Values, target: float) -> float | None:
    """The first t at which a curve is at or below ``target``, or ``None``; never before its first positive t."""
    hits = np.flatnonzero(values <= target)
    if not len(hits):
        return None
    i = int(hits[0])
    least = float(t[t > 0.0][0])
    if i == 0:
        return least
    high, low = float(values[i - 1]), float(values[i])
    part = (high - target) / (high - low) if math.isfinite(high) else 1.0
    # At least one step: a curve given at 0 may have its target just behind it.
    return max(float(t[i - 1]) + part * float(t[i] - t[i - 1]), min(1.0, least))


def speedup(ours: Run, reference: Run) -> float | None:
    """Speedup in training loss, as defined in the module's docstring."""
    return _ratio(smoothed_curve(ours), smoothed_curve(reference), ours.diverged, reference.diverged)


def held_out_speedup(ours: Run, reference: Run) -> float | None:
    """The same in held-out loss; ``None`` too where there is none."""
    if not len(ours.held_out) or not len(reference.held_out):
        return None
    return _ratio(
        (ours.evaluated_at, ours.held_out), (reference.evaluated_at, reference.held_out),
        ours.diverged, reference.diverged,
    )  # fmt: skip


def _ratio(
    ours: tuple[Values, Values], reference: tuple[Values, Values], ours_diverged: bool, reference_diverged: bool
) -> float | None:
    target = float(reference[1][-1])
    if reference_diverged or not math.isfinite(target):
        return None
    if ours_diverged:
        return FLOOR
    mine = first_reaches(*ours, target)
    if mine is not None:
        its = first_reaches(*reference, target)
        ratio = (its or float(reference[0][-1])) / mine
    else:
        its = first_reaches(*reference, float(ours[1][-1]))
        ratio = (its or float(reference[0][-1])) / float(reference[0][-1])
    return min(max(ratio, FLOOR), 1.0 / FLOOR)


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers; NaN for none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def spread(values: list[float]) -> float | None:
    """Standard deviation (n - 1); ``None`` for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
