"""Runs that begin with second moments known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from helpers.small_tasks import Quadratic
from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.meta_train.problem import FromInit, Problem
from learned_optim.meta_train.trajectories import Plan
from learned_optim.meta_train.unroll import unroll
from learned_optim.meta_train.vectorized import run_vectorized
from learned_optim.rule.types import Hyperparameters
from learned_optim.tasks.rollout import train
from learned_optim.tasks.warm import WarmStart, begin_warm

HYPER = Hyperparameters(0.01, 0.9, 0.99, 1e-8, 0.0)


class Warm(Quadratic):
    """A quadratic whose gradients were measured before."""

    def __init__(self) -> None:
        super().__init__(torch.float64)
        self.warm_start = WarmStart({"w": torch.tensor([1.0, 4.0, 0.25, 9.0], dtype=torch.float64)}, 50)


def policy(kind: str) -> Policy:
    """The hand-set base, with an age that forgets nothing or without, or what the package comes with."""
    if kind == "bundled":
        return Policy.from_pretrained("default")
    betas: Any = (HYPER.beta1, HYPER.beta2)
    eps: Any = HYPER.eps
    return Policy(PolicyConfig(betas=betas, eps=eps, age_rate=1.0 if kind == "age" else 0.0))


def optimizer(params: list[torch.Tensor], kind: str = "base") -> LearnedOptimizer:
    options: Any = {"betas": (HYPER.beta1, HYPER.beta2), "eps": HYPER.eps}
    return LearnedOptimizer(params, lr=0.01, weight_decay=0.0, policy=policy(kind), backend="eager", **options)


@pytest.mark.parametrize("kind", ["base", "age", "bundled"])
def test_a_warm_unroll_makes_the_same_steps_as_a_warm_optimizer(kind: str) -> None:
    task, rule, steps = Warm(), policy(kind), 6
    losses = train(task, 5, partial(optimizer, kind=kind), steps + 1).losses
    if kind == "age":
        torch.testing.assert_close(losses, train(task, 5, optimizer, steps + 1).losses)
    weights = {name: w.detach().unsqueeze(0) for name, w in rule.weights().items()}
    vectorized, _ = run_vectorized(rule.config, weights, Plan("warm", task, 5, steps + 1, HYPER), steps + 1)
    torch.testing.assert_close(vectorized[0].tolist(), losses)
    problem = Problem(task, 5)
    batches = [batch for batch, _ in zip(problem.batches(), range(steps + 1), strict=False)]
    state, along = unroll(rule.weights(), rule.config, problem, problem.start(rule.config), batches, HYPER)
    torch.testing.assert_close(along.detach(), torch.tensor(losses[1:], dtype=torch.float64))
    assert state.step == steps, "steps made before the run are not steps of the run"
    cold = train(Quadratic(torch.float64), 5, partial(optimizer, kind=kind), steps + 1).losses
    assert abs(cold[-1] - losses[-1]) > 1e-6


def test_a_warm_optimizer_knows_nothing_but_the_moments() -> None:
    """Neither the tensor head nor the safeguard has made anything of the step in which state is made."""
    p = torch.ones(3, 4, requires_grad=True)
    made = LearnedOptimizer([p], lr=0.1, safeguard=True)
    begin_warm(made, [p], [torch.ones(3, 4)], 10)
    state = made.state[p]
    assert {key for key, value in state.items() if bool(value.any())} == {"step", "age", "exp_avg_sq"}


#: The base mixture: an amplitude that was learned would see which coordinate is the larger one.
BASE = partial(LearnedOptimizer, policy=Policy())


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, BASE], ids=["Adam", "AdamW", "ours"])
def test_a_warm_first_step_is_divided_by_the_given_moments(make: Callable[..., torch.optim.Optimizer]) -> None:
    gradients = torch.tensor([1e-3, 1e-3])
    moments = torch.tensor([1.0, 100.0])
    steps = []
    for value in gradients:
        p = torch.zeros(2, requires_grad=True)
        made = make([p], lr=0.1)
        begin_warm(made, [p], [moments], 10**6)
        assert not p.detach().any(), "beginning warm changes no parameter"
        p.grad = torch.full_like(p, float(value))
        made.step()
        steps.append(p.detach())
    assert steps[0][0] / steps[0][1] == pytest.approx(10.0, rel=1e-3)
    assert made.param_groups[0]["lr"] == 0.1  # pyright: ignore[reportPossiblyUnboundVariable]


def test_parameters_that_are_not_named_are_left_alone() -> None:
    p, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    other.grad = torch.ones(2)
    made = torch.optim.Adam([p, other], lr=0.1)
    begin_warm(made, [p], [torch.ones(2)], 10)
    assert not made.state[other]
    assert other.tolist() == other.grad.tolist() == [1.0, 1.0]


def test_an_optimizer_whose_step_fails_is_as_it_was() -> None:
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.full((2,), 3.0)
    made = torch.optim.LBFGS([p], lr=0.1)  # which wants a closure
    with pytest.raises(TypeError):
        begin_warm(made, [p], [torch.ones(2)], 10)
    assert made.param_groups[0]["lr"] == 0.1
    assert p.grad.tolist() == [3.0, 3.0]


def test_an_optimizer_without_second_moments_is_left_alone() -> None:
    p = torch.ones(2, requires_grad=True)
    made = torch.optim.SGD([p], lr=0.1)
    begin_warm(made, [p], [torch.ones(2)], 10)
    assert p.tolist() == [1.0, 1.0]
    assert p.grad is None


@pytest.mark.parametrize(
    ("moments", "steps", "said"),
    [
        (torch.ones(3), 1, "shape"),
        (torch.tensor([1.0, -1.0]), 1, "negative"),
        (torch.tensor([1.0, float("nan")]), 1, "not finite"),
        (torch.ones(2), 0, "steps must be 1 or more"),
    ],
)
def test_moments_that_do_not_fit_are_refused(moments: torch.Tensor, steps: int, said: str) -> None:
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=said):
        begin_warm(torch.optim.Adam([p]), [p], [moments], steps)


def test_learned_initial_parameters_keep_a_task_warm() -> None:
    task = Warm()
    assert FromInit(task, {"w": torch.ones(4, dtype=torch.float64)}).warm_start is task.warm_start
