"""The compiled unroll is the eager one, faster; and it is compiled once."""

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from helpers.small_tasks import regression
from learned_optim import Policy, PolicyConfig
from learned_optim.engine.kernels import find_compiler
from learned_optim.meta_train import MetaTrainConfig
from learned_optim.meta_train.backend import chosen_backend, planned_inner_steps
from learned_optim.meta_train.problem import ROW, Problem
from learned_optim.meta_train.unroll import unroll
from learned_optim.rule.types import Hyperparameters
from learned_optim.tasks import get_families

HYPER = Hyperparameters(3e-2, 0.9, 0.999, 1e-8, 0.01)


def wide(width):
    return lambda: nn.Sequential(
        nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )


def meta_gradient(policy, width, compiled, lr=HYPER.lr):
    problem = Problem(regression(module=wide(width)), seed=5, compiled=compiled)
    batches = problem.batches()
    state, losses = unroll(
        policy.weights(), policy.config, problem, problem.start(policy.config), [next(batches) for _ in range(5)],
        HYPER._replace(lr=lr),
    )  # fmt: skip
    grads = torch.autograd.grad(losses.log().mean(), list(policy.weights().values()))
    return state, losses.detach(), grads


@pytest.mark.skipif(find_compiler("cpu") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "config",
    [pytest.param(PolicyConfig(), marks=pytest.mark.slow), PolicyConfig(orthogonal=0.7)],
    ids=["gated", "orthogonal"],
)
def test_the_compiled_unroll_is_the_eager_one_and_is_compiled_once(config):
    policy = Policy(config)
    with torch.no_grad():
        for w in policy.parameters():
            w.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    compilations = torch._dynamo.utils.counters["stats"]
    graphs = None
    for width, lr in ((72, 3e-2), (90, 1e-2), (101, 3e-3)):
        expected_state, expected, expected_grads = meta_gradient(policy, width, compiled=False, lr=lr)
        state, losses, grads = meta_gradient(policy, width, compiled=True, lr=lr)
        if config.orthogonal:  # which makes what is small some ten times as large, rounding errors too
            torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-6)
            assert (state.params - expected_state.params).norm() <= 1e-3 * expected_state.params.norm()
        else:
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state.params, expected_state.params, rtol=1e-4, atol=1e-5)
        atol = 2e-3 if config.orthogonal else 1e-3
        for grad, wanted in zip(grads, expected_grads, strict=True):
            # Relative to the largest entry: single precision, and many entries are sums that nearly cancel.
            torch.testing.assert_close(grad / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0, atol=atol)
        graphs = graphs or compilations["unique_graphs"]
        assert compilations["unique_graphs"] == graphs


def test_padding_stays_zero_and_is_not_counted():
    policy, problem = Policy(), Problem(regression(), seed=5)
    start = problem.start(policy.config)
    assert start.params.numel() % ROW == 0
    batches = problem.batches()
    with torch.no_grad():
        end, _ = unroll(policy.weights(), policy.config, problem, start, [next(batches) for _ in range(6)], HYPER)
    used = problem.flatten(dict.fromkeys(problem.names, torch.zeros(())) | {
        name: torch.ones_like(t) for name, t in problem.views(start.params).items()
    }) > 0  # fmt: skip
    assert int(used.sum()) == sum(p.numel() for p in problem.views(start.params).values())
    for vector in (end.params, *end.coordinate_state.tensors):
        assert not vector[~used].any()
    assert problem.layout.tensor_shapes.numel.tolist() == [p.numel() for p in problem.views(start.params).values()]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MetaTrainConfig(outer_steps=3), "eager"),
        (MetaTrainConfig(outer_steps=400), "compiled"),
        (MetaTrainConfig(outer_steps=400, backend="eager"), "eager"),
        (MetaTrainConfig(outer_steps=400, estimator="backprop", unroll_length=5), "eager"),
        (MetaTrainConfig(outer_steps=4000, estimator="backprop", unroll_length=20), "compiled"),
    ],
)
def test_long_runs_are_compiled(monkeypatch, config, expected):
    families = get_families(("train",))
    monkeypatch.setattr("learned_optim.meta_train.backend.find_compiler", lambda device: "c++")
    assert chosen_backend(config, PolicyConfig(), families) == expected
    assert chosen_backend(config, PolicyConfig.gru(), families) == config.backend.replace("auto", "eager")
    monkeypatch.setattr("learned_optim.meta_train.backend.find_compiler", lambda device: None)
    assert chosen_backend(config, PolicyConfig(), families) == config.backend.replace("auto", "eager")


class Long(NamedTuple):
    """As much of a task as planning sees."""

    length: int


def test_planned_inner_steps_count_both_runs_of_a_pair_and_the_tasks_own_lengths() -> None:
    config = MetaTrainConfig(outer_steps=3, meta_batch=2, unroll_length=7)
    tasks: Any = [Long(30), Long(90)]
    assert planned_inner_steps(config, tasks) == 3 * 2 * 2 * 60
    assert planned_inner_steps(dataclasses.replace(config, max_length=50), tasks) == 3 * 2 * 2 * 40
    assert planned_inner_steps(dataclasses.replace(config, estimator="backprop"), tasks) == 42
