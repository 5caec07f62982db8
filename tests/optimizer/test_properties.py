"""What is true of the update whatever was learned: each promise of the class docstring, for random weights too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedulefree import AdamWScheduleFree

from helpers.rule_checks import ADAMW, SHAPES, assert_is_adamw, step_bound
from helpers.support import POLICIES, assert_same_bits, give_gradients, leaves, make, random_policy, run
from learned_optim import Policy, PolicyConfig

policies = st.sampled_from(sorted(POLICIES))
seeds = st.integers(0, 10_000)


# --- AdamW ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_adams_mixture_and_zero_weights_it_is_adamw_for_100_steps(dtype):
    assert_is_adamw(100, dtype, lr=1e-2, weight_decay=0.1)


@given(
    lr=st.floats(1e-5, 0.5),
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    eps=st.sampled_from([1e-12, 1e-8, 1e-3, 1.0]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    maximize=st.booleans(),
)
def test_with_adams_mixture_it_is_adamw_for_any_hyperparameters(lr, beta1, beta2, eps, weight_decay, maximize):
    assert_is_adamw(
        8, torch.float64, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, maximize=maximize
    )


# --- schedule-free -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_it_follows_the_gradient_point_of_schedule_free_adamw(seed):
    config = PolicyConfig(
        windows=(2.0, 16.0), step_scale=1.0, momentum_weight=0.0, gradient_weight=0.1,
        hidden_weights=(0.45, 0.0, 0.0, 0.0), caution=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 20, generator=generator) * torch.logspace(0, -1, 20)
    y = x @ torch.randn(20, 1, generator=generator) + 0.5 * torch.randn(512, 1, generator=generator)
    start = torch.randn(20, 1, generator=generator)
    batches = [torch.randint(512, (8,), generator=generator) for _ in range(600)]

    def final_loss(make_optimizer):
        w = start.clone().requires_grad_()
        optimizer = make_optimizer([w])
        if isinstance(optimizer, AdamWScheduleFree):
            optimizer.train()
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(x[batch] @ w, y[batch]).backward()
            optimizer.step()
            losses.append(torch.nn.functional.mse_loss(x @ w, y).item())
        return losses[0], sum(losses[-50:]) / 50

    first, ours = final_loss(lambda p: make(p, Policy(config), lr=0.02, weight_decay=0.0))
    _, theirs = final_loss(lambda p: AdamWScheduleFree(p, lr=0.02, weight_decay=0.0))
    assert ours == pytest.approx(theirs, rel=0.03)
    assert ours < 0.3 * first


# --- symmetries ----------------------------------------------------------------------------------------------------


def trajectory(policy, starts, grads, **options):
    """Parameters after the given gradients: ``grads[t][i]`` is that of tensor i at step t."""
    params = [s.clone().requires_grad_() for s in starts]
    optimizer = make(params, policy, **options)
    for now in grads:
        for p, g in zip(params, now, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


def problem(seed, steps=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES]
    grads = [[torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES] for _ in range(steps)]
    return starts, grads


def test_a_coordinate_without_gradient_moves_on_with_its_momentum():
    (p,) = params = leaves((5,))
    optimizer = make(params, Policy(PolicyConfig(caution=1.0)), weight_decay=0.0)  # what disagrees does not move
    for gradient in ([1.0, 1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 0.0, -0.1, 0.0]):
        before = p.detach().clone()
        p.grad = torch.tensor(gradient)
        optimizer.step()
    assert (p.detach() != before).tolist() == [True, True, True, False, True]


@given(policies, seeds)
def test_the_update_is_odd_in_gradient_and_parameter(policy, seed):
    starts, grads = problem(seed)
    plain = trajectory(policy, starts, grads, lr=0.05)
    mirrored = trajectory(policy, [-s for s in starts], [[-g for g in now] for now in grads], lr=0.05)
    for a, b in zip(plain, mirrored, strict=True):
        assert torch.equal(a, -b)


@given(policies, seeds, st.integers(-30, 30))
def test_the_update_does_not_change_when_the_loss_is_scaled(policy, seed, exponent):
    starts, grads = problem(seed)
    plain = trajectory(policy, starts, grads, lr=0.05, eps=0.0)
    scaled = trajectory(policy, starts, [[g * 2.0**exponent for g in now] for now in grads], lr=0.05, eps=0.0)
    assert_same_bits(scaled, plain)


@given(policies, seeds, st.floats(0.1, 1e3))
def test_with_the_default_eps_the_scale_of_the_loss_hardly_matters(policy, seed, scale):
    starts, grads = problem(seed, dtype=torch.float64)
    plain = trajectory(policy, starts, grads, lr=0.05)
    scaled = trajectory(policy, starts, [[g * scale for g in now] for now in grads], lr=0.05)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@given(policies, seeds)
def test_permuting_coordinates_permutes_the_update(policy, seed):
    """Any coordinates; of what is orthogonalised, whole rows and, at each place in them, what follows."""
    starts, grads = problem(seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def order_of(t):
        if policy != "orthogonal" or t.ndim < 2:
            return torch.randperm(t.numel(), generator=generator)
        rows = torch.randperm(t.shape[0], generator=generator)
        columns = torch.randperm(t[0].numel(), generator=generator)
        return (rows[:, None] * len(columns) + columns).flatten()

    orders = [order_of(s) for s in starts]

    def permuted(tensors):
        return [t.reshape(-1)[order].reshape(t.shape) for t, order in zip(tensors, orders, strict=True)]

    plain = trajectory(policy, starts, grads, lr=0.05)
    shuffled = trajectory(policy, permuted(starts), [permuted(now) for now in grads], lr=0.05)
    for a, b in zip(permuted(plain), shuffled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@given(policies, seeds)
def test_maximize_is_the_update_for_the_negated_gradient(policy, seed):
    starts, grads = problem(seed)
    ascending = trajectory(policy, starts, grads, lr=0.05, maximize=True)
    assert_same_bits(ascending, trajectory(policy, starts, [[-g for g in now] for now in grads], lr=0.05))


@pytest.mark.parametrize("policy", POLICIES)
def test_lr_scales_the_whole_update(policy):
    starts, grads = problem(0, steps=1, dtype=torch.float64)
    small = trajectory(policy, starts, grads, lr=1e-3, weight_decay=0.1)
    large = trajectory(policy, starts, grads, lr=1e-2, weight_decay=0.1)
    for a, b, start in zip(small, large, starts, strict=True):
        torch.testing.assert_close(10.0 * (a - start), b - start, rtol=1e-9, atol=1e-14)


# --- nothing to do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("eps", [None, 0.0])
def test_zero_gradients_from_the_start_change_nothing(policy, dtype, eps):
    params = leaves(*SHAPES, (70_000,), dtype=dtype)
    before = [p.detach().clone() for p in params]
    optimizer = make(params, policy, lr=0.1, weight_decay=0.0, eps=eps)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same_bits(params, before)


@pytest.mark.parametrize("policy", POLICIES)
def test_zero_gradients_leave_weight_decay_to_itself(policy):
    params = leaves(*SHAPES, dtype=torch.float64)
    before = [p.detach().clone() for p in params]
    optimizer = make(params, policy, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, start in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), start * (1 - 0.1 * 0.5) ** 3, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
def test_lr_zero_leaves_the_parameters_bit_identical(policy, dtype):
    params = leaves(*SHAPES, (70_000,), dtype=dtype)
    before = [p.detach().clone() for p in params]
    optimizer = make(params, policy, lr=0.0, weight_decay=0.1)
    run(optimizer, params, 3)
    assert_same_bits(params, before)
    assert all(bool(optimizer.state[p]["exp_avg"].any()) for p in params)


# --- bounds --------------------------------------------------------------------------------------------------------


@given(policies, seeds, st.lists(st.floats(-30, 30), min_size=1, max_size=6), st.sampled_from([0.0, 1e-8]))
def test_the_step_is_bounded_for_gradients_of_any_size(policy, seed, exponents, eps):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(9, generator=generator).requires_grad_(), torch.zeros(3, 4).requires_grad_()]
    optimizer = make(params, policy, lr=1e-3, weight_decay=0.0, eps=eps)
    bound = step_bound(POLICIES[policy])
    for exponent in exponents:
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 10.0**exponent
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            assert bool(p.isfinite().all())
            assert (p.detach() - old).abs().max() <= 1e-3 * bound


@given(policies, seeds)
def test_the_step_is_bounded_where_sizes_are_mixed_within_a_tensor(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.zeros(61, requires_grad=True)
    optimizer = make([p], policy, lr=1e-3, weight_decay=0.0)
    bound = step_bound(POLICIES[policy])
    for _ in range(5):
        before = p.detach().clone()
        p.grad = 10.0 ** torch.linspace(-30, 30, 61) * torch.randn(61, generator=generator).sign()
        optimizer.step()
        assert bool(p.isfinite().all())
        assert (p.detach() - before).abs().max() <= 1e-3 * bound


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e-8, 1e-4, 1.0, 1e4, 1e18])
def test_the_step_has_the_size_of_adams_over_48_orders_of_magnitude(magnitude):
    p = torch.zeros(5, requires_grad=True)
    optimizer = make([p], ADAMW, lr=1e-3, eps=0.0, weight_decay=0.0)
    for _ in range(3):
        p.grad = torch.full((5,), magnitude)
        optimizer.step()
    if magnitude < 1e-19:  # their squares are zero in float32
        assert p.abs().max() < 1e-2
    else:
        torch.testing.assert_close(p.detach(), torch.full((5,), -3e-3), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_parameter_far_from_zero_is_no_trouble(policy):
    p = torch.full((4,), 1e25, requires_grad=True)
    optimizer = make([p], policy, weight_decay=0.0)
    run(optimizer, [p], 3)
    assert bool(p.isfinite().all())


def test_a_policy_with_large_weights_stays_within_its_bounds():
    policy = random_policy(std=100.0)
    p = torch.zeros(50, requires_grad=True)
    optimizer = make([p], policy, lr=1e-3, weight_decay=0.0)
    for step in range(30):
        before = p.detach().clone()
        give_gradients([p], step)
        optimizer.step()
        assert (p.detach() - before).abs().max() <= 1e-3 * step_bound(policy)
