"""Imitation: the error that is learned from, whose way is gone, and that a student becomes like its teacher."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.small_tasks import regression
from helpers.support import random_policy
from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.estimators import with_weights
from learned_optim.meta_train.imitation import Imitation, error
from learned_optim.meta_train.trajectories import TaskSource
from learned_optim.policy.errors import UnknownPolicyError
from learned_optim.rule.layouts import Segments
from learned_optim.tasks.rollout import train


def settings(**changes) -> MetaTrainConfig:
    base = {"estimator": "imitation", "max_length": 12, "unroll_length": 5, "inner_lr": 3e-2, "validate_every": 0}
    return MetaTrainConfig(**{**base, **changes})


def make(teacher: Policy, student: Policy, **changes) -> Imitation:
    config = settings(**changes)
    return Imitation(TaskSource([regression()], config, student.config), config, teacher)


def learned(policy: Policy) -> list[str]:
    return list(policy.weights())


def test_the_error_is_the_mean_over_the_tensors_that_the_teacher_moves() -> None:
    layout = Segments([torch.Size([2]), torch.Size([3]), torch.Size([1])], align=4)
    wanted = torch.tensor([3.0, 4.0, 0, 0, 0, 0, 0, 0, 2.0, 0, 0, 0])
    d = torch.tensor([3.0, 3.0, 0, 0, 9.0, 0, 0, 0, 6.0, 0, 0, 0])  # off by 1 of 5, where it should stand, 4 of 2
    expected = (math.log1p(1 / 25) + math.log1p(16 / 4)) / 2
    assert float(error(layout, d, wanted)) == pytest.approx(expected)
    assert float(error(layout, torch.zeros(12), wanted)) == pytest.approx(math.log(2))


def test_a_copy_of_the_teacher_has_nothing_to_learn() -> None:
    teacher = random_policy()
    estimator = make(teacher, teacher)
    for outer_step in range(3):  # states are carried from window to window
        estimate = estimator.estimate(teacher, learned(teacher), 0, outer_step)
        assert estimate.meta_loss == 0.0
        assert estimate.inner_steps == (5, 5, 2)[outer_step]


def test_the_network_is_trained_by_the_teacher_whoever_looks_on() -> None:
    teacher = random_policy()
    student = Policy(PolicyConfig.gru(hidden_size=3), generator=torch.Generator().manual_seed(1))
    estimator = make(teacher, student)
    for outer_step in range(2):
        estimator.estimate(student, learned(student), 0, outer_step)
    trajectory = estimator.trajectories[0]
    plan = trajectory.plan
    ends = []

    def optimizer(params: list[torch.Tensor]) -> LearnedOptimizer:
        ends.extend(params)
        return LearnedOptimizer(params, lr=float(plan.hyper.lr), weight_decay=0.01, policy=teacher, backend="eager")

    train(plan.task, plan.seed, optimizer, 10)
    views = trajectory.problem.views(trajectory.states[0].params)
    for mine, end in zip(views.values(), ends, strict=True):
        torch.testing.assert_close(mine, end.detach(), rtol=1e-4, atol=1e-6)


def test_its_gradient_is_that_of_finite_differences() -> None:
    teacher, student = random_policy(seed=1), random_policy(seed=2)
    name = "amplitude"
    estimate = make(teacher, student).estimate(student, [name], 0, 0)
    step = 1e-3
    for i in range(3):

        def at(sign: float, i: int = i) -> float:
            weights = {n: w.detach().clone() for n, w in student.weights().items()}
            weights[name].view(-1)[i] += sign * step
            moved = with_weights(student, weights)
            return make(teacher, moved).estimate(moved, [name], 0, 0).meta_loss

        difference = (at(1.0) - at(-1.0)) / (2 * step)
        assert float(estimate.gradient[name].view(-1)[i]) == pytest.approx(difference, rel=0.05, abs=1e-4)


def test_a_recurrent_network_with_random_weights_learns_what_default_does() -> None:
    config = settings(start="gru", outer_steps=60, meta_lr=0.02, unroll_length=10, max_length=0)
    losses = [m["meta_loss"] for m in meta_train(config, tasks=[regression()], show_progress=False).history]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)  # it hardly moves yet
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_a_teacher_that_is_not_there_is_named_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(UnknownPolicyError, match="nobody"):
        meta_train(settings(teacher="nobody"), tasks=[regression()], out=tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_kernels_are_not_compiled_for_it() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto' or 'eager' for 'imitation', found 'compiled'"):
        settings(backend="compiled")
