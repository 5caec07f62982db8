"""Vectorized runs are the runs one by one."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.small_tasks import Quadratic
from helpers.support import POLICIES, random_policy
from learned_optim import PolicyConfig
from learned_optim.meta_train import MetaTrainConfig
from learned_optim.meta_train.estimators import ES, run_plan, shifted, with_weights
from learned_optim.meta_train.trajectories import Plan, TaskSource
from learned_optim.meta_train.vectorized import UnequalBatches, run_vectorized
from learned_optim.rule.types import Hyperparameters
from learned_optim.tasks import FAMILIES
from learned_optim.tasks.augment import BatchSizeJumps

STEPS = 6
HYPER = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.01)
SETTINGS = MetaTrainConfig(estimator="es", parts=("tensor_head", "gates"), sigma=0.05, max_length=12, backend="eager")


def plan_of(task, policy, length=STEPS, lr=1e-3):
    return Plan(task.name, task, 3, length, HYPER._replace(lr=lr))


def stacked(policies):
    return {name: torch.stack([p.weights()[name].detach() for p in policies]) for name in policies[0].weights()}


def both_ways(task, policies, steps=STEPS, lr=1e-3, **options):
    plan = plan_of(task, policies[0], steps, lr)
    together = run_vectorized(policies[0].config, stacked(policies), plan, steps, **options)
    return together, torch.tensor([run_plan(p, plan, steps, "eager").losses for p in policies], dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.split == "train"])
def test_each_run_is_what_it_is_alone(name):
    policies = [random_policy(seed=seed, std=0.05) for seed in range(3)]
    together, alone = both_ways(FAMILIES[name].task(0), policies)
    torch.testing.assert_close(together, alone, rtol=2e-3, atol=1e-5)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("policy", ["gru", "orthogonal"])
def test_other_rules_are_vectorized_too(policy):
    policies = [POLICIES[policy], with_weights(POLICIES[policy], POLICIES[policy].weights())]
    together, alone = both_ways(FAMILIES["mlp_images"].task(0), policies)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [PolicyConfig(), PolicyConfig(orthogonal=1.0)])
def test_the_compiled_rule_does_the_same_for_tasks_of_every_shape(config):
    policies = [random_policy(config, seed=seed, std=0.05) for seed in range(3)]
    for name in ("tiny_mlp", "vit_images", "gru_char"):
        together, alone = both_ways(FAMILIES[name].task(0), policies, compiled=True)
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


def test_a_run_that_diverges_does_not_touch_its_neighbours():
    policies = [random_policy(seed=seed, std=0.05) for seed in range(2)]
    broken = with_weights(policies[1], {name: w * math.inf for name, w in policies[1].weights().items()})
    together, alone = both_ways(Quadratic(), [policies[0], broken])
    torch.testing.assert_close(together[0], alone[0])
    assert together[1].isinf()[1:].all()


def test_batches_of_unequal_shapes_are_refused_and_evolution_strategies_run_them_alone():
    policy = random_policy(std=0.05)
    task = BatchSizeJumps(FAMILIES["teacher_regression"].task(0), period=3)
    with pytest.raises(UnequalBatches, match="same shapes"):
        run_vectorized(policy.config, stacked([policy]), plan_of(task, policy, 20), 20)
    config = MetaTrainConfig(**{**vars(SETTINGS), "pairs": 3})
    several = ES(TaskSource([task], config, policy.config), config, None, "eager").estimate(policy, ["head"], 0, 0)
    one = ES(TaskSource([task], SETTINGS, policy.config), SETTINGS, None, "eager").estimate(policy, ["head"], 0, 0)
    assert torch.equal(several.gradient["head"], one.gradient["head"])
    assert several.inner_steps == one.inner_steps


def test_an_estimate_of_several_pairs_is_the_mean_of_those_of_each():
    policy = random_policy(std=0.05)
    family = FAMILIES["table_regression"]
    config = MetaTrainConfig(**{**vars(SETTINGS), "pairs": 3})
    es = ES(TaskSource([family], config, policy.config), config, None, "eager")
    estimate = es.estimate(policy, ["head", "gate_context"], 1, 2)

    from learned_optim.meta_train.estimators import perturbation
    from learned_optim.meta_train.time_ratio import log_time_ratio, marks

    plan = es.source.draw(1, 2)
    expected = {name: torch.zeros_like(policy.weights()[name]) for name in ("head", "gate_context")}
    for counters in ((1, 2), (1, 2, 1), (1, 2, 2)):
        noise = perturbation(policy, list(expected), config, *counters)
        plus, minus = (
            marks(run_plan(with_weights(policy, shifted(policy.weights(), noise, sign)), plan, 12, "eager").losses)
            for sign in (1.0, -1.0)
        )
        for name, value in noise.items():
            expected[name] += value * log_time_ratio(plus, minus) / (6.0 * config.sigma**2)
    torch.testing.assert_close(estimate.gradient, expected, rtol=0.02, atol=0.02)
    assert estimate.inner_steps == 6 * plan.length


def test_only_evolution_strategies_take_several_pairs_or_a_gpu():
    changes: tuple[dict, ...] = ({"pairs": 2}, {"device": "cuda"})
    for change in changes:
        with pytest.raises(ValueError, match=f"MetaTrainConfig.{next(iter(change))}"):
            MetaTrainConfig(estimator="backprop", **change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_does_the_same(compiled):
    policies = [random_policy(seed=seed, std=0.05) for seed in range(3)]
    for name in ("mlp_images", "conv2d_images", "lstm_char"):
        together, alone = both_ways(FAMILIES[name].task(0), policies, compiled=compiled, device="cuda")
        torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-3)
