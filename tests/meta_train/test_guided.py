"""Guided evolution strategies: the covariance of the perturbations, the windows of the guides, and what is kept."""

from __future__ import annotations

import random
from itertools import islice

import pytest
import torch

from helpers.small_tasks import Quadratic, regression
from helpers.support import random_policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.estimators import ES, Estimate, Weights
from learned_optim.meta_train.guided import GuidedES, free_dimensions, orthonormal, remember, window
from learned_optim.meta_train.problem import Problem
from learned_optim.meta_train.trajectories import TaskSource
from learned_optim.meta_train.unroll import unroll
from learned_optim.policy.policy import Policy

LEARNED = ("amplitude",)


def settings(**changes):
    base = {"estimator": "guided", "max_length": 12, "unroll_length": 4, "inner_lr": 3e-2, "sigma": 0.05,
            "backend": "eager", "parts": ("amplitude",)}  # fmt: skip
    return MetaTrainConfig(**{**base, **changes})


def make(config: MetaTrainConfig, guides: list[Weights] | None = None, task=None):
    policy = random_policy()
    source = TaskSource([task or regression()], config, policy.config)
    return GuidedES(source, config, "eager", [] if guides is None else guides), policy


def flat(weights: Weights) -> torch.Tensor:
    return torch.cat([w.reshape(-1) for w in weights.values()]).double()


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_perturbations_have_the_covariance_of_the_docstring(share):
    size = 7
    guides = [{"amplitude": torch.randn(size, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    estimator, policy = make(settings(guide_share=share), guides)
    draws = torch.stack([flat(estimator.perturbation(policy, LEARNED, i, 0)) for i in range(20_000)])
    basis = torch.linalg.qr(torch.stack([g["amplitude"].double() for g in guides], 1)).Q
    wanted = (1.0 - share) * torch.eye(size) + share * (size / 2) * basis @ basis.T
    torch.testing.assert_close(draws.T @ draws / len(draws) / 0.05**2, wanted.double(), rtol=0.0, atol=0.06)


def test_without_guides_or_share_it_is_plain_evolution_strategies():
    guides = [{"amplitude": torch.ones(7)}]
    for share, known in ((0.5, []), (0.0, guides)):
        config = settings(guide_share=share)
        estimator, policy = make(config, known)
        plain = ES(estimator.source, config, None, "eager").estimate(policy, LEARNED, 1, 2)
        assert torch.equal(estimator.estimate(policy, LEARNED, 1, 2).gradient["amplitude"], plain.gradient["amplitude"])


def test_wrong_guides_still_leave_an_ascent_direction():
    """With a linear M the mean estimate is S grad M, whatever the guides are."""
    gradient = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    wrong = [{"amplitude": torch.eye(7)[5]}, {"amplitude": torch.eye(7)[6]}]
    estimator, policy = make(settings(guide_share=0.5), wrong)
    noises = torch.stack([flat(estimator.perturbation(policy, LEARNED, i, 0)) for i in range(20_000)])
    mean = (noises * (noises @ gradient).unsqueeze(1)).mean(0) / 0.05**2
    torch.testing.assert_close(mean, 0.5 * gradient, rtol=0.0, atol=0.06)


def test_a_guide_is_the_gradient_of_the_windows_last_log_loss_from_where_the_rule_got_to():
    config = settings(held_out_share=0.25)
    estimator, policy = make(config)
    plan = estimator.source.draw(0, 3)
    seen = set()
    for slot in range(8):
        guide, steps = estimator.guide(policy, LEARNED, plan, slot, 3)
        from learned_optim.meta_train.trajectories import seed_of

        begin, length = window(random.Random(seed_of("window", config.seed, slot, 3)), plan.length, config)
        seen.add(begin > 0)
        assert steps == begin + length
        problem = Problem(plan.task, plan.seed)
        weights = {name: w.detach().requires_grad_(name in LEARNED) for name, w in policy.weights().items()}
        batches = list(islice(problem.batches(), steps + 1))
        state = problem.start(policy.config)
        for t in range(begin):  # one step at a time
            with torch.no_grad():
                state, _ = unroll(weights, policy.config, problem, state, batches[t : t + 2], plan.hyper)
        state, _ = unroll(weights, policy.config, problem, state, batches[begin:], plan.hyper)
        on_batch = plan.task.loss(problem.views(state.params), state.buffers, batches[-1])
        held_out = plan.task.eval_loss(problem.views(state.params), state.buffers)  # type: ignore[attr-defined]
        (0.75 * on_batch + 0.25 * held_out).log().backward()
        expected = weights["amplitude"].grad
        assert expected is not None
        torch.testing.assert_close(guide["amplitude"], expected / expected.norm(), rtol=1e-3, atol=1e-4)
    assert seen == {True, False}


def test_windows_lie_within_the_run_and_some_are_long():
    config = settings(unroll_length=20)
    drawn = [window(random.Random(i), 400, config) for i in range(2000)]
    assert all(0 <= begin <= 400 - length for begin, length in drawn)
    lengths = [length for _, length in drawn]
    assert {20, 40, 80, 160, 320, 400} == set(lengths)
    assert 0.45 < lengths.count(20) / 2000 < 0.55
    assert 0.02 < lengths.count(320) / 2000 + lengths.count(400) / 2000 < 0.12
    assert window(random.Random(0), 7, config) == (0, 7)


def test_the_last_guides_are_kept_and_those_that_say_nothing_span_nothing():
    guides: list[Weights] = []
    for i in range(5):
        remember(guides, [Estimate(0, "f", {}, 0.0, 1, guide={"w": torch.full((3,), float(i))})] * 2, 2)
    assert [float(g["w"][0]) for g in guides] == [3.0, 4.0]
    basis = orthonormal(guides, {"w": torch.zeros(3)})
    assert basis is not None
    assert basis.shape == (3, 1)  # they are parallel
    assert orthonormal([{"w": torch.zeros(3)}], {"w": torch.zeros(3)}) is None
    assert orthonormal([], {"w": torch.zeros(3)}) is None


def test_only_the_free_dimensions_of_the_head_count():
    policy = Policy()
    weights = {"head": policy.weights()["head"], "pace": policy.weights()["pace"]}
    context = weights["pace"].numel()
    assert free_dimensions(weights, settings(parts=("pace", "step_size"))) == 2 * context
    assert free_dimensions(weights, settings(parts=("pace", "tensor_head"))) == 8 * context + context


def test_a_run_improves_and_refuses_nonsense():
    config = settings(outer_steps=10, meta_batch=2, parts=("step_size",), validate_every=5, meta_lr=0.1, guides=3)
    result = meta_train(config, tasks=[Quadratic()], show_progress=False)
    assert min(m["validation"] for m in result.history if "validation" in m) < -0.02
    for change in ({"guide_share": 1.0}, {"guides": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            settings(**change)
