"""The age of a tensor: the number of steps, until its gradients say that the problem has changed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from helpers.support import POLICIES, give_gradients, leaves, make
from learned_optim import LearnedOptimizer, Policy, PolicyConfig


def several_units():
    """``default``'s age, beside four hidden units."""
    policy = Policy(PolicyConfig(age_rate=1.0))
    with torch.no_grad():
        for column, weight in (("bias", -3.0), ("log_rms_u", 3.0)):
            policy.weights()["age"][0, policy.config.context.index(column)] = weight
    return policy


BOTH = pytest.mark.parametrize("policy", ["default", several_units()], ids=["default", "several units"])


def ages(optimizer):
    return [float(state["age"]) for state in optimizer.state.values()]


def stepped(policy, scales, shapes=((8, 6), (5,)), **options):
    """The optimizer after gradients of these scales, and the ages after each step."""
    params = leaves(*shapes)
    optimizer = LearnedOptimizer(params, policy=policy, **options)
    seen = []
    for step, scale in enumerate(scales):
        give_gradients(params, step, scale)
        optimizer.step()
        seen.append(ages(optimizer))
    return optimizer, seen


@BOTH
def test_the_age_is_the_number_of_steps_while_gradients_keep_their_size(policy):
    _, seen = stepped(policy, [1.0] * 30 + [0.5] * 30)
    assert seen == [[float(step)] * 2 for step in range(1, 61)]


@BOTH
def test_gradients_that_are_suddenly_larger_make_a_tensor_young_and_it_grows_again(policy):
    _, seen = stepped(policy, [1.0] * 40 + [300.0] + [1.0] * 10)
    assert max(seen[40]) < 8.0
    for earlier, later in pairwise(seen[40:]):
        assert later == pytest.approx([age + 1.0 for age in earlier])


def test_only_the_tensor_whose_gradients_changed_becomes_young():
    params = leaves((8, 6), (8, 6))
    optimizer = LearnedOptimizer(params)
    for step in range(41):
        give_gradients(params, step)
        if step == 40:
            params[1].grad.mul_(300.0)
        optimizer.step()
    first, second = ages(optimizer)
    assert (first, second < 8.0) == (41.0, True)


def test_a_young_tensor_forgets_the_old_gradients():
    """With age 1 the hidden unit is the present normalised gradient, whatever it was before."""
    policy = Policy.from_pretrained("default")
    with torch.no_grad():
        policy.weights()["age"].zero_()[0, policy.config.context.index("bias")] = 1e3  # always young
    params = leaves((8, 6))
    optimizer = LearnedOptimizer(params, policy=policy, weight_decay=0.0)
    for step in range(10):
        give_gradients(params, step)
        optimizer.step()
    (state,) = optimizer.state.values()
    u = params[0].grad / ((state["exp_avg_sq"] / (1.0 - 0.999**10)).sqrt() + 1e-8)
    torch.testing.assert_close(state["hidden_0"], u, rtol=1e-5, atol=1e-6)


def test_without_an_age_rate_nothing_makes_it_young():
    params = leaves((8, 6))
    optimizer = make(params, "base")
    for step, scale in enumerate([1.0] * 20 + [1e4] * 5):
        give_gradients(params, step, scale)
        optimizer.step()
    assert POLICIES["base"].config.age_rate == 0.0
    assert ages(optimizer) == [25.0]


def test_a_target_that_switches_is_followed_faster():
    """Mean loss over 100 steps after the second switch, with the age and without."""

    def after_switches(policy):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.zeros(10, 4))
        optimizer = LearnedOptimizer([w], policy=policy, weight_decay=0.0)
        rng = torch.Generator().manual_seed(1)
        total = 0.0
        for turn in range(3):
            target = torch.randn(10, 4, generator=rng)
            for step in range(300):
                x = torch.randn(32, 10, generator=rng)
                loss = (x @ (w - target)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() / 100 if turn == 2 and step < 100 else 0.0
        return total

    young, old = Policy.from_pretrained("default"), Policy.from_pretrained("default")
    with torch.no_grad():
        old.weights()["age"].zero_()
    assert after_switches(young) < 0.8 * after_switches(old)
