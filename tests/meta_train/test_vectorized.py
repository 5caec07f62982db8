"""Vectorized runs are the runs one by one."""

from __future__ import annotations

import math
import random
from itertools import islice

import pytest
import torch

from helpers.small_tasks import Quadratic, regression
from helpers.support import POLICIES, random_policy
from learned_optim import LearnedOptimizer, PolicyConfig
from learned_optim.meta_train import MetaTrainConfig
from learned_optim.meta_train.estimators import ES, run_plan, shifted, with_weights
from learned_optim.meta_train.problem import Problem
from learned_optim.meta_train.time_ratio import held_out_steps
from learned_optim.meta_train.trajectories import Plan, TaskSource
from learned_optim.meta_train.unroll import unroll
from learned_optim.meta_train.vectorized import UnequalBatches, run_vectorized
from learned_optim.rule.types import Hyperparameters
from learned_optim.tasks import FAMILIES
from learned_optim.tasks.recipe import SCHEDULES, TrainingRecipe, draw_recipe
from learned_optim.tasks.rollout import train

STEPS = 6
HYPER = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.01)
SETTINGS = MetaTrainConfig(estimator="es", parts=("tensor_head", "gates"), sigma=0.05, max_length=12, backend="eager")


def plan_of(task, policy, length=STEPS, lr=1e-3):
    return Plan(task.name, task, 3, length, HYPER._replace(lr=lr))


def stacked(policies):
    return {name: torch.stack([p.weights()[name].detach() for p in policies]) for name in policies[0].weights()}


def both_ways(task, policies, steps=STEPS, lr=1e-3, **options):
    plan = plan_of(task, policies[0], steps, lr)
    together, _ = run_vectorized(policies[0].config, stacked(policies), plan, steps, **options)
    return together, torch.tensor([run_plan(p, plan, steps, "eager").losses for p in policies], dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.split == "train"])
def test_each_run_is_what_it_is_alone(name):
    policies = [random_policy(seed=seed, std=0.05) for seed in range(3)]
    together, alone = both_ways(FAMILIES[name].task(0), policies)
    torch.testing.assert_close(together, alone, rtol=2e-3, atol=1e-5)
    assert not torch.equal(together[0], together[1])


#: Tasks of families with several kinds of networks, one of each kind that task 0 is not.
OTHER_KINDS = {
    "sparse_recommender": (1, 2, 3, 6, 8),
    "large_embeddings": (1, 2),
    "seq2seq_recurrent": (1, 7),
    "graphs_full_batch": (1, 2, 4),
    "forecasting": (1, 2, 3, 5, 8),
    "categorical_tables": (1, 2),
}


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, seeds in OTHER_KINDS.items() for seed in seeds])
def test_the_other_networks_of_a_family_are_vectorized_too(name, seed):
    policies = [random_policy(seed=seed, std=0.05) for seed in range(2)]
    together, alone = both_ways(FAMILIES[name].task(seed), policies, steps=3)
    torch.testing.assert_close(together, alone, rtol=2e-3, atol=1e-5)


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


class GrowingSets(Quadratic):
    """Batches of 4, 5, 6, ... rows."""

    def batches(self, rng):
        for size, batch in enumerate(super().batches(rng), start=4):
            yield torch.stack([batch] * size)

    def loss(self, params, buffers, batch):
        return torch.stack([super(GrowingSets, self).loss(params, buffers, one) for one in batch]).mean()


def test_batches_of_unequal_shapes_are_refused_and_evolution_strategies_run_them_alone():
    policy, task = random_policy(std=0.05), GrowingSets()
    with pytest.raises(UnequalBatches, match="same shapes"):
        run_vectorized(policy.config, stacked([policy]), plan_of(task, policy, 20), 20)
    config = MetaTrainConfig(**{**vars(SETTINGS), "pairs": 3})
    several = ES(TaskSource([task], config, policy.config), config, None, "eager").estimate(policy, ["head"], 0, 0)
    one = ES(TaskSource([task], SETTINGS, policy.config), SETTINGS, None, "eager").estimate(policy, ["head"], 0, 0)
    assert torch.equal(several.gradient["head"], one.gradient["head"])
    assert several.inner_steps == one.inner_steps


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_recipe_does_the_same_to_the_optimizer_the_unroll_and_vectorized_runs(schedule):
    policies = [random_policy(seed=seed, std=0.05) for seed in range(2)]
    recipe = TrainingRecipe(schedule, weight_decay=0.1, clip_norm=0.02)
    task, steps = regression(), 12
    plan = plan_of(task, policies[0], steps, lr=3e-2)._replace(recipe=recipe)
    plan = plan._replace(hyper=plan.hyper._replace(weight_decay=0.1))
    evaluate_at = held_out_steps(steps)
    weights = stacked(policies)
    together, held_out = run_vectorized(policies[0].config, weights, plan, steps, evaluate_at=evaluate_at)
    for i, policy in enumerate(policies):
        curve = run_plan(policy, plan, steps, "eager", held_out=True)
        torch.testing.assert_close(together[i].tolist(), curve.losses, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(held_out[i].tolist(), list(curve.held_out_along), rtol=1e-3, atol=1e-5)
        problem = Problem(task, plan.seed, clip_norm=recipe.clip_norm)
        window = list(islice(problem.batches(), steps + 1))
        start = problem.start(policy.config)
        _, losses = unroll(policy.weights(), policy.config, problem, start, window, plan.hyper_at)
        torch.testing.assert_close(losses[:-1].tolist(), curve.losses[1:], rtol=1e-3, atol=1e-5)
    plain = run_plan(policies[0], plan._replace(recipe=TrainingRecipe()), steps, "eager").losses
    assert abs(plain[-1] / together[0, -1] - 1.0) > 0.02  # clipping at least has been at work


def test_schedules_stay_within_0_and_1_and_only_some_end_at_nothing():
    for name, schedule in SCHEDULES.items():
        factors = [schedule(step / 100) for step in range(100)]
        assert all(0.0 < factor <= 1.0 for factor in factors)
        assert (factors[-1] < 0.06) == (name in ("cosine", "warmup_cosine", "decay"))
        assert (factors[0] < 0.02) == name.startswith("warmup")
    drawn = {draw_recipe(random.Random(seed)) for seed in range(200)}
    assert {recipe.schedule for recipe in drawn} == set(SCHEDULES)


@pytest.mark.parametrize("name", ["vae_images", "sine_regression", "contrastive_tables", "forecasting", "pure_noise"])
def test_held_out_data_may_be_drawn_at_their_first_use(name):
    policy, task = random_policy(std=0.05), FAMILIES[name].task(0)
    plan = plan_of(task, policy, 2)
    _, held_out = run_vectorized(policy.config, stacked([policy]), plan, 2, evaluate_at=[1, 2])
    curve = train(
        task, plan.seed, lambda params: LearnedOptimizer(params, policy=policy, backend="eager"), 2, evaluate_at=[1, 2]
    )
    torch.testing.assert_close(held_out[0].tolist(), list(curve.held_out_along), rtol=1e-3, atol=1e-5)


def test_held_out_losses_of_a_task_without_such_data_are_none():
    policy = random_policy(std=0.05)
    _, held_out = run_vectorized(policy.config, stacked([policy]), plan_of(Quadratic(), policy), STEPS, evaluate_at=[2])
    assert held_out.shape == (1, 0)


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
