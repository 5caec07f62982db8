"""Bootstrapped targets: true values, transitions, target networks, and which gradient and value a loss has."""

from __future__ import annotations

import itertools
from inspect import getclosurevars

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss, smooth_l1_loss

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.bootstrapped import PLANTS, Decisions, WithTarget, plant_decisions, random_decisions


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def process(kind: str) -> Decisions:
    return random_decisions(seeded(3)) if kind == "random" else plant_decisions(seeded(3), kind)


EVERY_PROCESS = pytest.mark.parametrize("kind", ["random", *PLANTS])


@EVERY_PROCESS
def test_processes_are_proper(kind):
    p = process(kind)
    states, actions = p.rewards.shape
    assert p.successors.shape == p.probabilities.shape
    assert 0 <= int(p.successors.min()) <= int(p.successors.max()) < states
    assert float(p.probabilities.min()) >= -1e-6
    torch.testing.assert_close(p.probabilities.sum(2), torch.ones(states, actions))
    assert set(p.continues.unique().tolist()) <= {0.0, 1.0}
    assert bool(p.observations.isfinite().all())
    assert len(p.observations.unique(dim=0)) > 0.9 * states


@EVERY_PROCESS
def test_values_of_a_policy_solve_its_linear_equations_and_the_best_are_no_lower(kind):
    p, discount = process(kind), 0.9
    states, actions = p.rewards.shape
    policy = torch.rand(states, actions, generator=seeded(1)).softmax(1)
    transition = torch.zeros(states, actions, states, dtype=torch.float64)
    weights = (p.probabilities * p.continues[..., None]).double()
    transition.scatter_add_(2, p.successors, weights)
    following = (policy.double()[..., None] * transition).sum(1)
    reward = (policy * p.rewards).double().sum(1)
    v = torch.linalg.solve(torch.eye(states, dtype=torch.float64) - discount * following, reward)
    expected = p.rewards.double() + discount * transition @ v
    size = float(expected.abs().max())
    torch.testing.assert_close(p.values(discount, policy).double(), expected, rtol=0, atol=1e-3 * size)
    best = p.values(discount)
    assert bool((best >= expected - 1e-3 * size).all())
    greedy = nn.functional.one_hot(best.argmax(1), actions).float()
    torch.testing.assert_close(p.values(discount, greedy), best, rtol=0, atol=2e-3 * size)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", ["fitted_q", "temporal_difference"])
def test_transitions_have_the_expectation_that_the_true_values_say(name, number):
    task = FAMILIES[name].task(number)
    load = getclosurevars(task._make_batches).nonlocals["load"]  # type: ignore[attr-defined]
    known = known_values(load(), name)
    surprises = []
    for batch in itertools.islice(task.batches(seeded(1)), 60):
        following = torch.tensor([known[row.numpy().tobytes()] for row in batch["next_state"]])
        goal = batch["reward"].flatten() + batch["discount"].flatten() * following
        own = batch["values"].gather(1, batch["action"][:, None]) if name == "fitted_q" else batch["values"]
        surprises.append(goal - own.flatten())
    surprise = torch.cat(surprises)
    assert abs(float(surprise.mean())) < 5 * float(surprise.std()) / len(surprise) ** 0.5 + 2e-3


def known_values(loaded, name) -> dict[bytes, float]:
    """The true value of each state, by what a network sees of it."""
    if name == "temporal_difference":
        states, values = loaded[0].observations, loaded[2]
    else:
        states, values = (torch.cat([part[key] for part in loaded]) for key in ("state", "values"))
    return {row.numpy().tobytes(): float(v) for row, v in zip(states, values.amax(1), strict=True)}


def test_a_target_network_follows_at_the_rate_it_is_given():
    fast = nn.Linear(2, 1)
    module = WithTarget(fast)
    (slow, _) = module.target.parameters()
    assert not slow.requires_grad
    with torch.no_grad():
        fast.weight += 1.0
    start = slow.clone()
    for rate in (0.0, 0.25, 1.0):
        module.refresh(torch.tensor(rate))
        torch.testing.assert_close(slow - start, torch.full((1, 2), rate))
    assert torch.equal(slow, fast.weight)


def evaluated(task):
    """Loss and gradients of the first batch, which leaves the target network elsewhere; a module in the same state."""
    params, buffers = task.init(seeded())
    rng = seeded(2)
    buffers = {k: b + 0.5 * b.std() * torch.randn(b.shape, generator=rng) for k, b in buffers.items()}
    leaves = {k: p.requires_grad_() for k, p in params.items()}
    batch = next(task.batches(seeded(1)))
    if "rate" in batch:
        batch["rate"] = torch.tensor(0.0)
    loss = task.loss(leaves, buffers, batch)
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    module = task._make_module()
    module.load_state_dict(params | buffers)
    return float(loss.detach()), grads, module, batch


def test_temporal_difference_has_the_semi_gradient_and_the_value_of_the_error():
    loss, grads, module, batch = evaluated(FAMILIES["temporal_difference"].task(1))
    v = module(batch["state"])
    assert loss == pytest.approx(float(mse_loss(v, batch["values"]).detach()), rel=1e-5)
    mse_loss(v, (batch["reward"] + batch["discount"] * module(batch["next_state"])).detach()).backward()
    torch.testing.assert_close(grads, {k: p.grad for k, p in module.named_parameters()})


def test_fitted_q_has_the_semi_gradient_and_the_value_of_the_error():
    seen = set()
    for number in range(8):
        task = FAMILIES["fitted_q"].task(number)
        options = getclosurevars(task._loss_fn).nonlocals  # type: ignore[attr-defined]
        loss, grads, module, batch = evaluated(task)
        q = module(batch["state"])
        assert loss == pytest.approx(float(mse_loss(q, batch["values"]).detach()), rel=1e-5)
        chooser = module if options["double"] else module.target
        best = chooser(batch["next_state"]).argmax(1)
        rows = torch.arange(len(q))
        goal = batch["reward"] + batch["discount"] * module.target(batch["next_state"])[rows, best]
        options["criterion"](q[rows, batch["action"]], goal.detach()).backward()
        torch.testing.assert_close(grads, {k: p.grad for k, p in module.named_parameters() if p.requires_grad})
        seen |= {options["double"], options["criterion"]}
    assert seen == {True, False, mse_loss, smooth_l1_loss}


def test_held_out_states_begin_no_transition():
    task = FAMILIES["fitted_q"].task(0)
    held_out = {row.numpy().tobytes() for row in task._eval_source()["state"]}  # type: ignore[attr-defined]
    batches = itertools.islice(task.batches(seeded()), 20)
    assert len(held_out) > 50
    assert not any(row.numpy().tobytes() in held_out for batch in batches for row in batch["state"])


def test_the_target_network_is_refreshed_every_few_steps_or_a_little_each_time():
    patterns = set()
    for number in range(8):
        task = FAMILIES["fitted_q"].task(number)
        rates = [float(batch["rate"]) for batch in itertools.islice(task.batches(seeded()), task.length)]
        averaged = len(set(rates)) == 1
        patterns.add(averaged)
        assert 0.02 < rates[0] < 0.31 if averaged else set(rates) == {0.0, 1.0} and sum(rates) >= 25
    assert patterns == {True, False}
