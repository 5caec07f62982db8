"""Unrolled steps are the optimizer's steps, and their derivatives are right."""

import pytest
import torch

from helpers.small_tasks import Quadratic, Tied, normalised, regression
from helpers.support import POLICIES
from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.meta_train.problem import Problem
from learned_optim.meta_train.unroll import UnrollOptions, unroll
from learned_optim.rule.layouts import Whole
from learned_optim.rule.types import Hyperparameters
from learned_optim.rule.update import initial_state, update
from learned_optim.tasks import FAMILIES

ORTHOGONAL = POLICIES["orthogonal"].config
HYPER = Hyperparameters(3e-2, 0.9, 0.999, 1e-8, 0.01)


def policy_of(config, dtype=torch.float64, std=0.1):
    policy = Policy(config, generator=torch.Generator().manual_seed(1)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for w in policy.parameters():
            w.add_(torch.randn(w.shape, generator=generator, dtype=dtype) * std)
    return policy


def take(problem, count):
    batches = problem.batches()
    return [next(batches) for _ in range(count)]


def one_step(policy, optimizer, problem, params, buffers, batch):
    loss = problem.task.loss(params, buffers, batch)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
    for p, g in zip(params.values(), grads, strict=True):
        p.grad = g
    optimizer.step()


def assert_unroll_equals_steps(task, steps, lockstep, dtype=torch.float32, tolerance=1e-4, config=None):
    """``lockstep``: the optimizer's parameters are set to the unroll's before every step.

    A bias in front of a BatchNorm has a gradient of nothing but rounding errors, which Adam's normalisation blows up:
    free runs of such networks drift apart in single precision, whoever computes them.
    """
    policy = policy_of(config or PolicyConfig(), dtype)
    problem = Problem(task, seed=5)
    state = problem.start(policy.config)
    params = {n: t.clone().requires_grad_() for n, t in problem.views(state.params).items()}
    buffers = {n: b.clone() for n, b in state.buffers.items()}
    optimizer = LearnedOptimizer(
        list(params.values()), lr=HYPER.lr, weight_decay=HYPER.weight_decay, policy=policy, backend="eager"
    )
    batches = take(problem, steps + 1)
    for t in range(steps):
        if lockstep:
            with torch.no_grad():
                for name, value in problem.views(state.params).items():
                    params[name].copy_(value)
        one_step(policy, optimizer, problem, params, buffers, batches[t])
        with torch.no_grad():
            state, losses = unroll(policy.weights(), policy.config, problem, state, batches[t : t + 2], HYPER)
        assert losses.shape == (1,)
    for name, value in problem.views(state.params).items():
        torch.testing.assert_close(value, params[name].detach(), rtol=tolerance, atol=tolerance)
    for name, value in state.buffers.items():
        torch.testing.assert_close(value, buffers[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", [None, ORTHOGONAL], ids=["gated", "orthogonal"])
@pytest.mark.parametrize("module", [None, Tied, normalised], ids=["plain", "tied", "batchnorm"])
def test_unrolled_steps_are_the_optimizers_steps(module, config):
    assert_unroll_equals_steps(regression(torch.float64, module), 10, False, torch.float64, 1e-6, config)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_unrolled_steps_are_the_optimizers_steps_in_every_family(name):
    assert_unroll_equals_steps(FAMILIES[name].task(1), 4, lockstep=True)


def meta_gradient(policy, task, options, steps=7, loss=lambda losses: losses.log().mean(), compiled=False):
    problem = Problem(task, seed=5, compiled=compiled)
    weights = policy.weights()
    start = problem.start(policy.config)
    _, losses = unroll(weights, policy.config, problem, start, take(problem, steps + 1), HYPER, options)
    value = loss(losses)
    grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(weights, grads, strict=True))


@pytest.mark.parametrize("config", [PolicyConfig(), PolicyConfig.gru(), ORTHOGONAL], ids=["gated", "gru", "orthogonal"])
@pytest.mark.parametrize(
    ("module", "held_out"), [(None, False), (None, True), (Tied, False), (Tied, True), (normalised, False)]
)
def test_second_order_meta_gradients_equal_finite_differences(config, held_out, module):
    # BatchNorm's running statistics carry no gradient, in torch as here: its held-out loss is left out.
    policy, task = policy_of(config), regression(torch.float64, module=module)
    options = UnrollOptions(second_order=True, held_out_share=0.3 * held_out)
    _, gradient = meta_gradient(policy, task, options)
    generator = torch.Generator().manual_seed(7)
    direction = {n: torch.randn(w.shape, generator=generator, dtype=torch.float64) for n, w in policy.weights().items()}
    # Caution jumps where a coordinate changes sides, so the difference must be small.
    values = []
    for sign in (1.0, -1.0):
        moved = Policy(config).double()
        moved.load_state_dict({n: w.detach() + sign * 1e-7 * direction[n] for n, w in policy.weights().items()})
        values.append(meta_gradient(moved, task, options)[0])
    expected = float(values[0] - values[1]) / 2e-7
    slope = sum(float((g * direction[n]).sum()) for n, g in gradient.items())
    assert slope == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert abs(slope) > 1e-4


def slow_first_order(policy, task, steps=7):
    """Tensor by tensor, with a second forward pass for every loss: nothing is shared with the unroll but the rule."""
    problem = Problem(task, seed=5)
    config, weights = policy.config, policy.weights()
    start = problem.start(config)
    params = {n: t.clone() for n, t in problem.views(start.params).items()}
    state = {n: initial_state(config, p.reshape(-1)) for n, p in params.items()}
    buffers, losses = start.buffers, []
    batches = take(problem, steps + 1)
    for t, batch in enumerate(batches[:-1], start=1):
        leaf = {n: p.detach().requires_grad_() for n, p in params.items()}
        loss = task.loss(leaf, buffers, batch)
        grads = torch.autograd.grad(loss, list(leaf.values()), allow_unused=True, materialize_grads=True)
        for (n, p), g in zip(params.items(), grads, strict=True):
            new, *state[n] = update(
                weights, config, Whole(p.shape), p.reshape(-1), g.reshape(-1), *state[n], float(t), HYPER
            )
            params[n] = new.view(p.shape)
        after = {name: b.clone() for name, b in buffers.items()}
        losses.append(task.loss(params, after, batches[t]))
    value = torch.stack(losses).log().mean()
    grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(weights, grads, strict=True))


@pytest.mark.parametrize("config", [PolicyConfig(), PolicyConfig.gru(), ORTHOGONAL], ids=["gated", "gru", "orthogonal"])
@pytest.mark.parametrize("module", [None, Tied, normalised], ids=["plain", "tied", "batchnorm"])
def test_first_order_meta_gradients_equal_a_slow_implementation(config, module):
    policy, task = policy_of(config), regression(torch.float64, module=module)
    value, gradient = meta_gradient(policy, task, UnrollOptions())
    expected_value, expected = slow_first_order(policy, task)
    torch.testing.assert_close(value, expected_value)
    for name in expected:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-8, atol=1e-10)
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-4


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("segment", [1, 3, 7, 100])
@pytest.mark.parametrize("module", [None, normalised], ids=["plain", "batchnorm"])
def test_checkpointed_unrolls_give_the_same_meta_gradients(second_order, segment, module):
    policy, task = policy_of(PolicyConfig()), regression(torch.float64, module=module)
    value, gradient = meta_gradient(policy, task, UnrollOptions(second_order))
    value_again, again = meta_gradient(policy, task, UnrollOptions(second_order, segment=segment))
    torch.testing.assert_close(value_again, value, rtol=1e-12, atol=0)
    for name in gradient:
        torch.testing.assert_close(again[name], gradient[name], rtol=1e-9, atol=1e-12)


def test_a_checkpointed_unroll_ends_in_the_same_state():
    policy, problem = policy_of(PolicyConfig()), Problem(regression(torch.float64, module=normalised), seed=5)
    ends = []
    for segment in (0, 3):
        start = problem.start(policy.config)
        options = UnrollOptions(segment=segment)
        end, _ = unroll(policy.weights(), policy.config, problem, start, take(problem, 9), HYPER, options)
        ends.append(end.detached())
    assert ends[0].step == ends[1].step == 8
    torch.testing.assert_close(ends[0].params, ends[1].params, rtol=0, atol=0)
    torch.testing.assert_close(ends[0].buffers, ends[1].buffers, rtol=0, atol=0)


def test_the_buffers_a_window_begins_with_are_left_as_they_are():
    policy, problem = policy_of(PolicyConfig()), Problem(regression(torch.float64, module=normalised), seed=5)
    start = problem.start(policy.config)
    before = {n: b.clone() for n, b in start.buffers.items()}
    unroll(policy.weights(), policy.config, problem, start, take(problem, 4), HYPER)
    torch.testing.assert_close(start.buffers, before, rtol=0, atol=0)


def test_two_windows_are_one_long_one():
    policy, problem = policy_of(PolicyConfig()), Problem(regression(torch.float64, module=normalised), seed=5)
    batches = take(problem, 11)
    with torch.no_grad():
        whole, losses = unroll(policy.weights(), policy.config, problem, problem.start(policy.config), batches, HYPER)
        half, first = unroll(policy.weights(), policy.config, problem, problem.start(policy.config), batches[:6], HYPER)
        end, second = unroll(policy.weights(), policy.config, problem, half.detached(), batches[5:], HYPER)
    torch.testing.assert_close(end.params, whole.params, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([first, second]), losses, rtol=0, atol=0)
    torch.testing.assert_close(end.buffers, whole.buffers, rtol=0, atol=0)


def test_gradients_reach_the_initial_parameters():
    policy, problem = policy_of(PolicyConfig()), Problem(Quadratic(torch.float64), seed=5)
    batches, start = take(problem, 6), problem.start(policy.config)

    def final_loss(params):
        state = start._replace(params=params)
        options = UnrollOptions(second_order=True)
        return unroll(policy.weights(), policy.config, problem, state, batches, HYPER, options)[1][-1]

    params = start.params.clone().requires_grad_()
    (grad,) = torch.autograd.grad(final_loss(params), params)
    for i in range(params.numel()):
        shift = torch.zeros_like(params)
        shift[i] = 1e-6
        with torch.no_grad():
            expected = (final_loss(params + shift) - final_loss(params - shift)) / 2e-6
        assert float(grad[i]) == pytest.approx(float(expected), rel=1e-4, abs=1e-7)


def test_a_fixed_scale_changes_no_value_and_takes_the_step_size_out_of_the_gradient():
    policy, task = policy_of(PolicyConfig()), regression(torch.float64)
    value, gradient = meta_gradient(policy, task, UnrollOptions())
    same, fixed = meta_gradient(policy, task, UnrollOptions(fixed_scale=True))
    torch.testing.assert_close(same, value, rtol=1e-12, atol=0)
    scale_row = 0  # of the head: the log of the tensor's step scale
    assert float(gradient["head"][scale_row].abs().max()) > 1e-4
    assert float(fixed["head"][scale_row].abs().max()) < 1e-10
    assert float(fixed["gate_features"].abs().max()) > 1e-6


def test_recomputed_segments_of_which_only_the_last_loss_is_wanted_give_the_same_gradient():
    policy, task = policy_of(PolicyConfig()), regression(torch.float64)
    whole, segments = (
        meta_gradient(policy, task, UnrollOptions(segment=segment, last_only=True), loss=lambda losses: losses[-1])
        for segment in (0, 3)
    )
    torch.testing.assert_close(whole, segments)
