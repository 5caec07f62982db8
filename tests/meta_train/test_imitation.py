"""Imitation: the error that is learned from, whose way is gone, and that a student becomes like its teacher."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from helpers.small_tasks import regression
from helpers.support import random_policy
from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.estimators import with_weights
from learned_optim.meta_train.imitation import Imitation, error
from learned_optim.meta_train.preflight import starting_policy
from learned_optim.meta_train.trajectories import Plan, TaskSource
from learned_optim.policy.errors import UnknownPolicyError
from learned_optim.rule.layouts import Segments
from learned_optim.tasks.recipe import SCHEDULES, TrainingRecipe
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


TEACHERS = {
    "default": Policy.from_pretrained("default"),
    "other betas": Policy.from_pretrained("reader"),
    "all there is": random_policy(
        PolicyConfig(orthogonal=0.7, orthogonal_damping=1.5, age_rate=0.5, decay_rate=5.0, betas=(0.7, 0.97), eps=1e-3)
    ),
}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("recipe", [TrainingRecipe(), TrainingRecipe("cosine", 0.1, 0.5)], ids=str)
def test_the_network_is_trained_by_the_teacher_whoever_looks_on(teacher: str, recipe: TrainingRecipe) -> None:
    rule = TEACHERS[teacher]
    student = Policy(PolicyConfig.gru(hidden_size=3), generator=torch.Generator().manual_seed(1))
    estimator = make(rule, student)
    draw = estimator.source.draw

    def planned(slot: int, outer_step: int) -> Plan:
        plan = draw(slot, outer_step)
        return plan._replace(recipe=recipe, hyper=plan.hyper._replace(weight_decay=recipe.weight_decay))

    estimator.source.draw = planned
    for outer_step in range(2):
        estimator.estimate(student, learned(student), 0, outer_step)
    trajectory = estimator.trajectories[0]
    plan, ends = trajectory.plan, []

    def optimizer(params: list[torch.Tensor]) -> LearnedOptimizer:
        ends.extend(params)
        return LearnedOptimizer(
            params, lr=float(plan.hyper.lr), weight_decay=recipe.weight_decay, policy=rule, backend="eager"
        )

    schedule = SCHEDULES[recipe.schedule]
    train(  # the schedule is of the whole run, of which ten steps were made
        plan.task, plan.seed, optimizer, 10, schedule=lambda done: schedule(done * 10 / plan.length),
        clip_norm=recipe.clip_norm,
    )  # fmt: skip
    begin = trajectory.problem.views(trajectory.problem.start(rule.config).params)
    views = trajectory.problem.views(trajectory.states[0].params)
    for name, end in zip(views, ends, strict=True):
        moved = end.detach() - begin[name]
        assert moved.abs().max() > 1e-3
        assert (views[name] - end.detach()).norm() < 5e-3 * moved.norm()  # orthogonalising amplifies rounding


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
    assert losses[0] > 0.4
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_a_teacher_that_is_not_there_is_named_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(UnknownPolicyError, match="nobody"):
        meta_train(settings(teacher="nobody"), tasks=[regression()], out=tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "compiled"}, "backend must be 'auto' or 'eager' for 'imitation', found 'compiled'"),
        ({"fixed_scale": True}, "fixed_scale must be False for 'imitation', whose meta-loss is its own, found True"),
        ({"meta_loss": "sum"}, "meta_loss must be 'log_ratio' for 'imitation'"),
        ({"estimator": "es", "teacher": "reader"}, "teacher must be left out for estimators other than 'imitation'"),
    ],
)
def test_settings_that_would_not_be_heeded_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_who_is_the_teacher_already_and_other_meta_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="the start is the teacher itself, 'default': there is nothing to learn"):
        meta_train(settings(start="default"), tasks=[regression()])
    with pytest.raises(ValueError, match="meta-loss of its own: leave out meta_loss"):
        meta_train(settings(start="gru"), tasks=[regression()], meta_loss=lambda losses, reference: losses[-1])


def test_a_gru_that_begins_has_all_but_its_cell_from_the_teacher() -> None:
    default = Policy.from_pretrained("default")
    begun = starting_policy(settings(start="gru"), default).config
    assert begun.cell == "gru"
    assert begun.surroundings == default.config.surroundings
    assert starting_policy(settings(start="gru", estimator="backprop"), None).config == PolicyConfig.gru()


def test_a_run_is_not_resumed_with_another_teacher(tmp_path) -> None:
    random_policy(seed=1).save_pretrained(tmp_path / "teacher")
    config = settings(start="gru", teacher=str(tmp_path / "teacher"), outer_steps=2, save_every=1)
    meta_train(dataclasses.replace(config, outer_steps=1), tasks=[regression()], out=tmp_path / "run")
    random_policy(seed=2).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="the teacher's weights have changed since the run began"):
        meta_train(config, tasks=[regression()], out=tmp_path / "run", resume=True)
    random_policy(seed=1).save_pretrained(tmp_path / "teacher")
    assert len(meta_train(config, tasks=[regression()], out=tmp_path / "run", resume=True).history) == 2


def test_a_teacher_that_diverges_teaches_nothing() -> None:
    layout = Segments([torch.Size([2])])
    assert math.isnan(error(layout, torch.ones(2), torch.tensor([math.nan, 1.0])))
