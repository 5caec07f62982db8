"""All estimators point the same way on a problem whose gradient is known."""

import dataclasses

import pytest
import torch

from helpers.small_tasks import Quadratic
from helpers.support import random_policy
from learned_optim import Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.aggregate import GradientAggregator, combine_by_inverse_variance
from learned_optim.meta_train.estimators import (
    ES,
    PES,
    BackpropTruncated,
    Estimate,
    Mixed,
)
from learned_optim.meta_train.meta_loss import META_LOSSES, mean_along
from learned_optim.meta_train.time_ratio import (
    BOUND,
    HELD_OUT_TIMES,
    Outcome,
    compare,
    held_out_steps,
    log_time_ratio,
    marks,
)
from learned_optim.meta_train.trajectories import TaskSource
from learned_optim.meta_train.validation import mean_difference

LEARNED = ("amplitude",)


class OneQuadratic(Quadratic):
    """The same trajectory whatever the seed: then every estimator has one gradient to find."""

    def init(self, rng):
        return super().init(torch.Generator().manual_seed(0))

    def batches(self, rng):
        return super().batches(torch.Generator().manual_seed(1))


def settings(**changes):
    return MetaTrainConfig(**{"meta_loss": "sum", "max_length": 12, "inner_lr": 3e-2, "sigma": 0.05, **changes})


def make(cls, **changes):
    config = settings(**changes)
    policy = random_policy()
    return cls(TaskSource([OneQuadratic()], config, policy.config), config, mean_along, "eager"), policy


@pytest.fixture(scope="module")
def exact():
    estimator, policy = make(BackpropTruncated, unroll_length=12, second_order=True)
    estimate = estimator.estimate(policy, LEARNED, 0, 0)
    assert estimate.inner_steps == 12
    return estimate.gradient["amplitude"].double()


def check_mean_against(samples, exact):
    """Every coordinate within four standard errors, and those errors small beside the gradient."""
    stack = torch.stack(samples).double()
    error = stack.std(0) / len(stack) ** 0.5
    assert float(error.norm()) < 0.35 * float(exact.norm())
    assert bool(((stack.mean(0) - exact).abs() < 4 * error + 0.02 * exact.norm()).all()), (stack.mean(0), exact, error)


def test_es_finds_the_known_gradient(exact):
    estimator, policy = make(ES)
    check_mean_against([estimator.estimate(policy, LEARNED, s, 0).gradient["amplitude"] for s in range(150)], exact)


def test_pes_finds_the_gradient_of_the_whole_trajectory_from_windows(exact):
    estimator, policy = make(PES, unroll_length=4)
    samples = []
    for slot in range(150):
        windows = [estimator.estimate(policy, LEARNED, slot, step).gradient["amplitude"] for step in range(3)]
        samples.append(torch.stack(windows).mean(0))
    check_mean_against(samples, exact)


def test_first_order_back_propagation_is_biased_but_points_the_right_way(exact):
    estimator, policy = make(BackpropTruncated, unroll_length=12)
    biased = estimator.estimate(policy, LEARNED, 0, 0).gradient["amplitude"].double()
    assert float(torch.cosine_similarity(biased, exact, dim=0)) > 0.5
    assert float((biased - exact).norm()) > 1e-3 * float(exact.norm())


def test_truncated_windows_walk_along_one_trajectory_and_then_begin_another():
    estimator, policy = make(BackpropTruncated, unroll_length=5)
    steps = [estimator.estimate(policy, LEARNED, 0, i).inner_steps for i in range(4)]
    assert steps == [5, 5, 2, 5]
    assert estimator.trajectories[0].begun_at == 3


def test_an_estimate_depends_on_slot_and_outer_step_alone():
    for cls in (ES, PES, BackpropTruncated):
        first, policy = make(cls)
        second, _ = make(cls)
        second.estimate(policy, LEARNED, 1, 0)
        a, b = first.estimate(policy, LEARNED, 0, 0), second.estimate(policy, LEARNED, 0, 0)
        assert torch.equal(a.gradient["amplitude"], b.gradient["amplitude"])


def test_a_diverged_run_counts_as_slow_and_not_as_infinite():
    good, bad = marks([2.0 / (t + 1) for t in range(40)]), marks([2.0, *[float("inf")] * 39])
    assert log_time_ratio(bad, good) == BOUND
    assert log_time_ratio(good, bad) == -BOUND
    assert log_time_ratio(bad, bad) == 0.0


def test_half_the_loss_exponent_counts_as_a_log_speedup():
    """Losses that fall as a power of time: twice as fast is a log-speedup of log 2, whatever the power."""
    for power in (0.3, 1.0):
        slow = marks([(t + 1) ** -power for t in range(400)])
        fast = marks([(2 * t + 2) ** -power for t in range(400)])
        assert log_time_ratio(slow, fast) == pytest.approx(0.693, rel=0.03)


def outcome(losses, held_out=None):
    """Of 400 steps, losses and held-out losses as functions of the step."""
    return Outcome.of(
        [losses(t + 1) for t in range(400)], [held_out(t) for t in held_out_steps(400)] if held_out else []
    )


def test_validation_is_the_mean_over_tasks():
    flat = outcome(lambda t: 1.0)
    fast, slow = ({"a/0": outcome(lambda t, k=k: (k * t) ** -0.5), "b/0": flat} for k in (2, 1))
    assert mean_difference(fast, slow) == pytest.approx(-0.693 / 2, rel=0.03)


def test_held_out_losses_count_with_their_share_and_only_where_there_are_any():
    fast, slow = (outcome(lambda t: t**-0.5, lambda t, k=k: (k * t) ** -0.5) for k in (2, 1))
    assert compare(fast, slow) == 0.0
    assert compare(fast, slow, 1.0) == pytest.approx(-0.693, rel=0.03)
    assert compare(fast, slow, 0.25) == pytest.approx(-0.693 / 4, rel=0.03)
    assert compare(fast, outcome(lambda t: t**-0.5), 0.5) == compare(outcome(lambda t: t**-0.5), slow, 0.5) == 0.0


def test_over_fitting_shows_at_the_end_and_a_low_loss_on_the_way_still_counts():
    def held_out(end):
        return lambda t: t**-0.5 if t <= 200 else end

    level, over_fitted = (outcome(lambda t: t**-0.5, held_out(end)) for end in (200**-0.5, 1.0))
    worse = compare(over_fitted, level, 1.0)
    assert worse == pytest.approx(BOUND / 2)  # the lowest ones are the same, the ends are far apart
    lower_on_the_way = outcome(lambda t: t**-0.5, lambda t: (2 * t) ** -0.5 if t <= 200 else 1.0)
    assert compare(lower_on_the_way, over_fitted, 1.0) < -0.2


def test_a_held_out_loss_that_is_infinite_at_the_end_counts_as_slow():
    good = outcome(lambda t: t**-0.5, lambda t: t**-0.5)
    bad = outcome(lambda t: t**-0.5, lambda t: t**-0.5 if t < 400 else float("inf"))
    assert compare(bad, good, 1.0) == pytest.approx(BOUND / 2, abs=0.05)
    assert compare(bad, bad, 1.0) == 0.0
    assert len(good.held_out) == len(HELD_OUT_TIMES)


def test_inverse_variance_trusts_the_quieter_estimator():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([1.0, -2.0])
    quiet = [{"w": truth + 0.01 * torch.randn(2, generator=generator)} for _ in range(8)]
    loud = [{"w": truth + 5.0 * torch.randn(2, generator=generator)} for _ in range(8)]
    torch.testing.assert_close(combine_by_inverse_variance([quiet, loud])["w"], truth, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="at least two"):
        combine_by_inverse_variance([quiet[:1], loud])


def estimate(value, slot=0, family="f", kind=""):
    return Estimate(slot, family, {"w": torch.full((4,), float(value))}, 0.0, 1, kind)


def test_the_mixed_estimator_alternates_and_its_kinds_are_mixed_by_inverse_variance():
    estimator, policy = make(Mixed, unroll_length=4)
    estimates = [estimator.estimate(policy, LEARNED, slot, 0) for slot in range(4)]
    assert [e.kind for e in estimates] == ["BackpropTruncated", "PES"] * 2
    assert sorted(estimator.trajectories) == [0, 1, 2, 3]
    for i, cls in enumerate((BackpropTruncated, PES)):
        alone, _ = make(cls, unroll_length=4)
        gradient = alone.estimate(policy, LEARNED, i, 0).gradient["amplitude"]
        assert torch.equal(gradient, estimates[i].gradient["amplitude"])
    # 1 +- 0.1 and 3 +- 1, two estimates each: weights in the ratio of 100 to 1.
    values = [(1.1, "a"), (0.9, "a"), (4.0, "b"), (2.0, "b")]
    batch = [estimate(value, slot, kind=kind) for slot, (value, kind) in enumerate(values)]
    mixed = GradientAggregator(clip=100.0, by_family=False)(batch, ["w"])["w"]
    torch.testing.assert_close(mixed, torch.full((4,), (100 * 1.0 + 1 * 3.0) / 101), rtol=1e-5, atol=0)
    # A single estimate has no variance: then all count alike.
    mixed = GradientAggregator(clip=100.0, by_family=False)(batch[:3], ["w"])["w"]
    torch.testing.assert_close(mixed, torch.full((4,), 2.0), rtol=1e-6, atol=0)


def test_one_exploding_task_cannot_outvote_the_others():
    aggregator = GradientAggregator(clip=5.0, by_family=False)
    for _ in range(5):
        aggregator([estimate(1.0), estimate(-1.0, 1)], ["w"])
    gradient = aggregator([estimate(1.0), estimate(-1e6, 1), estimate(1.0, 2)], ["w"])["w"]
    assert aggregator.clipped == 1
    torch.testing.assert_close(gradient, torch.full((4,), -1.0))


def test_non_finite_estimates_are_dropped_and_counted():
    aggregator = GradientAggregator(clip=5.0, by_family=False)
    gradient = aggregator([estimate(2.0), estimate(float("nan"), 1), estimate(float("inf"), 2)], ["w"])["w"]
    assert aggregator.dropped == 2
    torch.testing.assert_close(gradient, torch.full((4,), 2.0))


def test_families_of_large_gradients_do_not_drown_the_others():
    aggregator = GradientAggregator(clip=5.0, by_family=True)
    for _ in range(50):
        gradient = aggregator([estimate(1000.0, 0, "loud"), estimate(-1.0, 1, "quiet")], ["w"])["w"]
    torch.testing.assert_close(gradient, torch.zeros(4), rtol=0, atol=1e-3)


def test_meta_losses_are_what_they_say():
    losses = torch.tensor([4.0, 2.0, 1.0])
    assert float(META_LOSSES["final"](losses, 2.0)) == 1.0
    assert float(META_LOSSES["sum"](losses, 2.0)) == pytest.approx(7 / 3)
    assert float(META_LOSSES["log_ratio"](losses, 2.0)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("part", "rows"), [("step_size", [0]), ("averaging", [1, 2, 4]), ("caution", [3])])
def test_a_part_of_the_head_moves_its_rows_and_nothing_else(part, rows):
    config = MetaTrainConfig(outer_steps=2, parts=(part,), meta_batch=2, max_length=6, validate_every=0)
    for estimator in ("es", "backprop"):
        start = Policy()
        learned = meta_train(dataclasses.replace(config, estimator=estimator), [Quadratic()], start=start).policy
        moved = {name: (w - start.weights()[name]).detach() for name, w in learned.weights().items()}
        unmoved = part == "caution" and not moved["head"].any()  # where nothing disagreed
        assert unmoved or [row for row, values in enumerate(moved["head"]) if values.any()] == rows
        assert not any(w.any() for name, w in moved.items() if name != "head")
        if part == "averaging":
            torch.testing.assert_close(moved["head"][1], -moved["head"][4])
