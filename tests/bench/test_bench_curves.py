"""Speedup on curves whose speedup is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learned_optim.bench.curves import (
    FLOOR,
    Run,
    bin_edges,
    binned,
    final_loss,
    first_reaches,
    geometric_mean,
    held_out_speedup,
    smoothed_curve,
    speedup,
    spread,
)
from learned_optim.tasks.rollout import smoothed

STEPS = 1000


def make(losses: np.ndarray, held_out: np.ndarray | None = None) -> Run:
    at = np.linspace(0.0, len(losses), 17) if held_out is not None else np.array([])
    return Run(len(losses), binned(losses), float(losses[0]), at, held_out if held_out is not None else at, 1.0, 0.5, 7)


def power_law(rate: float, steps: int = STEPS, exponent: float = 0.5) -> np.ndarray:
    return 0.2 + (1.0 + rate * np.arange(steps)) ** -exponent


@given(st.floats(1.0, 5.0), st.floats(0.3, 1.0))
def test_a_curve_run_x_times_as_fast_has_speedup_x(x: float, exponent: float) -> None:
    ours, reference = make(power_law(0.1 * x, exponent=exponent)), make(power_law(0.1, exponent=exponent))
    assert speedup(ours, reference) == pytest.approx(x, rel=0.03)


@given(st.floats(1.2, 5.0))
def test_a_curve_that_is_too_slow_has_the_part_of_the_run_that_the_reference_needs(x: float) -> None:
    ours, reference = make(power_law(0.1 / x)), make(power_law(0.1))
    assert speedup(ours, reference) == pytest.approx(1.0 / x, rel=0.05)


@given(st.integers(1, 50), st.integers(20, 900))
def test_identical_curves_have_speedup_1_whatever_their_noise(seed: int, steps: int) -> None:
    losses = power_law(0.1, steps) + np.abs(np.random.default_rng(seed).normal(0.0, 0.3, steps))
    assert speedup(make(losses), make(losses)) == 1.0


@given(st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_a_lower_curve_is_at_least_as_fast_and_a_higher_one_is_not(a: float, b: float) -> None:
    lower, higher = make(power_law(0.1) + min(a, b)), make(power_law(0.1) + max(a, b))
    faster, slower = speedup(lower, higher), speedup(higher, lower)
    assert faster is not None
    assert slower is not None
    assert faster >= 1.0 >= slower
    if abs(a - b) > 1e-4:
        assert slower < 1.0


def test_the_speedup_is_continuous_where_ours_just_reaches_the_reference() -> None:
    reference = make(power_law(0.1))
    just, not_quite = make(power_law(0.1) - 1e-5), make(power_law(0.1) + 1e-5)
    assert speedup(just, reference) == pytest.approx(speedup(not_quite, reference), abs=0.01)


def test_a_diverged_run_has_the_lowest_speedup_and_a_diverged_reference_gives_none() -> None:
    losses = power_law(0.1)
    broken = losses.copy()
    broken[300:] = math.inf
    run = make(broken)
    assert run.diverged
    assert speedup(run, make(losses)) == FLOOR
    assert speedup(make(losses), run) is None
    assert math.isinf(final_loss(run))


def test_a_run_that_ends_far_above_its_start_has_diverged_and_one_that_learns_nothing_has_not() -> None:
    assert make(np.linspace(1.0, 5.0, STEPS)).diverged
    assert not make(np.full(STEPS, 1.0)).diverged
    assert make(np.full(STEPS, math.inf)).diverged
    assert make(np.full(STEPS, math.nan)).diverged


def test_the_first_time_counts_even_if_the_curve_rises_again() -> None:
    t, values = np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 1.0, 2.0, 0.5])
    assert first_reaches(t, values, 2.0) == 1.5
    assert first_reaches(t, values, 1.0) == 2.0
    assert first_reaches(t, values, 0.75) == pytest.approx(3.0 + 1.25 / 1.5)
    assert first_reaches(t, values, 0.4) is None
    assert first_reaches(t, values, 9.0) == 1.0


def test_a_reference_that_was_at_its_final_loss_before_its_end_is_credited_with_that() -> None:
    early = np.where(np.arange(STEPS) < 500, power_law(0.1), power_law(0.1)[500])
    # Smoothing sees the end of a plateau a little later than its beginning; without the credit it would be 1.9.
    assert 1.0 <= (speedup(make(power_law(0.1)), make(early)) or 0.0) < 1.1


@given(st.integers(1, 3000))
def test_bins_cover_the_run_and_the_final_loss_is_that_of_the_last_tenth(steps: int) -> None:
    losses = power_law(0.05, steps)
    edges = bin_edges(steps)
    assert (edges[0], edges[-1]) == (0.0, steps)
    assert len(edges) <= 401
    assert bool((np.diff(edges) >= 1.0).all())
    assert final_loss(make(losses)) == pytest.approx(smoothed(losses.tolist(), steps), rel=1e-2)


def test_the_smoothed_curve_of_a_constant_is_that_constant() -> None:
    _, values = smoothed_curve(make(np.full(777, 3.0)))
    assert values == pytest.approx(np.full(400, 3.0))


def test_losses_after_one_that_is_not_finite_do_not_count() -> None:
    losses = np.full(100, 2.0)
    losses[50] = math.nan
    values = binned(losses)
    assert values[:50].tolist() == [2.0] * 50
    assert bool(np.isinf(values[50:]).all())


def test_held_out_speedup_follows_the_same_definition_and_needs_held_out_data() -> None:
    def held_out(rate: float) -> np.ndarray:
        return 1.0 / (1.0 + rate * np.linspace(0.0, STEPS, 17))

    ours, reference = make(power_law(0.1), held_out(0.02)), make(power_law(0.1), held_out(0.01))
    assert held_out_speedup(ours, reference) == pytest.approx(2.0, rel=0.01)
    assert held_out_speedup(reference, ours) == pytest.approx(0.5, rel=0.05)
    assert held_out_speedup(make(power_law(0.1)), reference) is None


def test_a_target_above_the_held_out_loss_of_the_start_does_not_divide_by_zero() -> None:
    rising = make(power_law(0.1), np.linspace(1.0, 1.2, 17))
    assert held_out_speedup(rising, rising) == 1.0


def test_means_and_spreads_of_nothing_are_nothing() -> None:
    assert math.isnan(geometric_mean([]))
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert spread([1.0]) is None
    assert spread([1.0, 3.0]) == pytest.approx(math.sqrt(2.0))
