"""The rule against its scalar transcription, and against itself in other arrangements of the coordinates."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from helpers.rule_checks import HYPER, assert_follows_reference, hyperparameters
from helpers.support import POLICIES, give_gradients, leaves, make, random_policy
from learned_optim import Policy, PolicyConfig
from learned_optim.rule import update
from learned_optim.rule.features import FEATURES
from learned_optim.rule.layouts import Segments, Whole
from learned_optim.rule.types import CoordinateState, Hyperparameters

SHAPES = [(), (5,), (3, 4), (2, 3, 2), (1, 1), (4, 1, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", POLICIES)
def test_the_rule_equals_its_transcription(name, shape):
    assert_follows_reference(POLICIES[name], [shape], Whole(shape))


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("name", POLICIES)
def test_tensors_side_by_side_equal_the_transcription_of_each(name, align):
    layout = Segments(SHAPES, align=align)
    assert_follows_reference(POLICIES[name], SHAPES, layout, sizes=layout.sizes)


@pytest.mark.parametrize("seed", range(3))
def test_large_weights_drive_every_bound_and_still_equal_the_transcription(seed):
    assert_follows_reference(random_policy(seed=seed, std=3.0), [(4, 3)], Whole((4, 3)), steps=12)
    assert_follows_reference(random_policy(PolicyConfig.gru(), seed=seed, std=3.0), [(4, 3)], Whole((4, 3)), steps=12)


@pytest.mark.parametrize(
    "changes",
    [
        {"caution": 0.0},
        {"caution": 1.0},
        {"features": ("u_h",)},
        {"features": tuple(reversed(FEATURES))},
        {"windows": (), "rates": (0.5, 0.1, 0.03, 1.0)},
        {"windows": (1.0, 2.0, 8.0), "rates": (), "hidden_size": 3, "hidden_weights": (0.3, 0.2, 0.1)},
        {"feature_bound": 0.5, "context_bound": 0.2, "head_bound": 0.1},
        {"gate_bound": 1.0, "amplitude_bound": 1.0},
        {"cosine_decays": (0.0, 0.5)},
        {"pace_rate": 0.0},
        {"pace_gain": 0.2},
        {"pace_gain": 0.2, "pace_rate": 0.0},
        {"pace_rate": 0.5, "pace_growth": 0.2, "pace_bound": 0.3},
        {"orthogonal": 0.5},
        {"orthogonal": 1.0, "orthogonal_iterations": 5},
        {"orthogonal": 0.7, "orthogonal_damping": 2.5},
        {"orthogonal": 0.9, "orthogonal_block": 2, "orthogonal_damping": 1.0},
        {"orthogonal": 0.7, "orthogonal_damping": 2.5, "orthogonal_damping_threshold": 0.95},
        {"orthogonal": 0.7, "orthogonal_coefficients": (1.5, -0.5, 0.0), "orthogonal_iterations": 8},
    ],
)
def test_every_field_of_the_configuration_means_what_the_transcription_says(changes):
    policy = random_policy(PolicyConfig(**changes))
    assert_follows_reference(policy, [(3, 4)], Whole((3, 4)))


def test_updates_of_few_directions_are_damped_as_the_transcription_says():
    def of_few_directions(shapes, steps, generator):
        for _ in range(steps):
            rows, columns, noise = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (8, 9, 72))
            yield [torch.outer(rows, columns) + 0.1 * noise.view(8, 9)]

    policy = random_policy(PolicyConfig(orthogonal=0.7, orthogonal_damping=2.5))
    assert_follows_reference(policy, [(8, 9)], Whole((8, 9)), gradients=of_few_directions)
    other = random_policy(dataclasses.replace(policy.config, orthogonal_damping_threshold=0.6))
    assert_follows_reference(other, [(8, 9)], Whole((8, 9)), gradients=of_few_directions)
    with pytest.raises(AssertionError):  # so it is damped here
        assert_follows_reference(other, [(8, 9)], Whole((8, 9)), gradients=of_few_directions, reference_policy=policy)


@pytest.mark.parametrize(
    "changes",
    [
        {"betas": (0.0, 0.5)},
        {"betas": (0.95, 0.0)},
        {"eps": 0.1},
        {"lr": 0.0},
        {"weight_decay": 0.0},
        {"lr": 5.0, "weight_decay": 1.0},
    ],
)
def test_every_hyperparameter_means_what_the_transcription_says(changes):
    assert_follows_reference(random_policy(), [(3, 4)], Whole((3, 4)), hyper={**HYPER, **changes})


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 2, 3, 3)])
def test_step_equals_the_pure_rule(name, shape):
    policy = POLICIES[name]
    (param,) = leaves(shape, dtype=torch.float64)
    optimizer = make([param], name, lr=0.01, weight_decay=0.1)
    flat = param.detach().clone().view(-1)
    state, tensor_state = update.initial_state(policy.config, flat)
    hyper = Hyperparameters(0.01, *policy.config.betas, policy.config.eps, 0.1)
    weights = {k: w.detach() for k, w in policy.weights().items()}
    for t in range(1, 6):
        give_gradients([param], t)
        flat, state, tensor_state = update.update(
            weights, policy.config, Whole(shape), flat, param.grad.view(-1), state, tensor_state, t, hyper
        )
        optimizer.step()
        torch.testing.assert_close(param.detach().view(-1), flat, rtol=1e-12, atol=1e-14)
        slow = optimizer.state[param]["cosine_slow"]
        torch.testing.assert_close(slow, tensor_state.cosine_slow[0], rtol=1e-12, atol=1e-14)


def test_the_rule_leaves_its_inputs_as_they_were():
    policy = random_policy()
    param, grad = torch.randn(5), torch.randn(5)
    state, tensor_state = update.initial_state(policy.config, param)
    before = [x.clone() for x in (param, grad, *state.tensors, *tensor_state.tensors)]
    update.update(
        policy.weights(), policy.config, Whole((5,)), param, grad, state, tensor_state, 1, hyperparameters(**HYPER)
    )
    after = (param, grad, *state.tensors, *tensor_state.tensors)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("config", [PolicyConfig(), PolicyConfig.gru()], ids=["gated", "gru"])
def test_every_meta_parameter_has_a_finite_gradient_that_is_not_zero(config):
    policy = random_policy(config, std=0.05)
    weights = {k: w.detach().clone().requires_grad_() for k, w in policy.weights().items()}
    param = torch.randn(12, dtype=torch.float64)
    state, tensor_state = update.initial_state(policy.config, param)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(1, 61):
        grad = torch.randn(12, generator=generator, dtype=torch.float64) + 0.3
        param, state, tensor_state = update.update(
            weights, policy.config, Whole((3, 4)), param, grad, state, tensor_state, t, hyperparameters(**HYPER)
        )
        total = total + (param * torch.arange(12)).sum()
    total.backward()
    for key, weight in weights.items():
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all()), key
        live = weight.grad.abs().sum(-1) if weight.grad.ndim > 1 else weight.grad
        if key == "head" and policy.config.caution == 0.0:
            live = live[[i for i in range(len(live)) if i != 3]]
        assert bool((live != 0).all()), key


def test_gradients_through_the_rule_are_those_of_finite_differences():
    policy = Policy()
    names, values = zip(*random_policy(std=0.1).weights().items(), strict=True)
    grads = [torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def final(*weights):
        param = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
        state, tensor_state = update.initial_state(policy.config, param)
        for t, grad in enumerate(grads, start=1):
            param, state, tensor_state = update.update(
                dict(zip(names, weights, strict=True)), policy.config, Whole((2, 3)), param, grad, state,
                tensor_state, t, hyperparameters(**HYPER),
            )  # fmt: skip
        return param

    inputs = tuple(value.detach().double().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(final, inputs, eps=1e-6, atol=1e-7, rtol=1e-4, nondet_tol=0.0)


def test_the_first_hidden_unit_is_the_mean_of_the_normalised_gradients_over_a_growing_window():
    """With k = 1 the window grows with t: h_1 is the plain mean of all u so far."""
    policy = Policy(PolicyConfig(windows=(1.0, 16.0)))
    param = torch.zeros(4, dtype=torch.float64)
    state, tensor_state = update.initial_state(policy.config, param)
    seen = []
    for t in range(1, 20):
        grad = torch.randn(4, dtype=torch.float64)
        v = 0.999 * state.exp_avg_sq + 0.001 * grad**2
        seen.append(grad / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
        _, state, tensor_state = update.update(
            {k: w.detach() for k, w in policy.weights().items()}, policy.config, Whole((4,)), param, grad, state,
            tensor_state, t, Hyperparameters(0.0, 0.9, 0.999, 1e-8, 0.0),
        )  # fmt: skip
        torch.testing.assert_close(state.hidden[0], torch.stack(seen).mean(0), rtol=1e-12, atol=1e-14)


def test_padding_between_tensors_stays_zero():
    layout = Segments([(3,), (2, 2)], align=16)
    policy = random_policy()
    param = torch.zeros(32)
    param[:3], param[16:20] = 1.0, -1.0
    grad = param.clone()
    state, tensor_state = update.initial_state(policy.config, param, 2)
    weights = {k: w.detach() for k, w in policy.weights().items()}
    for t in (1, 2, 3):
        param, state, tensor_state = update.update(
            weights, policy.config, layout, param, grad, state, tensor_state, t, hyperparameters(**HYPER)
        )
    assert isinstance(state, CoordinateState)
    for vector in (param, *state.tensors):
        assert torch.count_nonzero(vector[3:16]) == 0
        assert torch.count_nonzero(vector[20:]) == 0
        assert torch.count_nonzero(vector) == 7


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (0.0, 1.0, 0.0, 0.0)),
        ((8,), (math.log(8), 1.0, 0.0, 0.0)),
        ((6, 3), (math.log(18), 0.0, 0.0, math.log(2))),
        ((4, 2, 3, 3), (math.log(72), 0.0, 1.0, math.log(2))),
        ((0,), (0.0, 1.0, 0.0, 0.0)),
        ((0, 3), (0.0, 0.0, 0.0, math.log(1 / 3))),
    ],
)
def test_what_the_head_knows_about_a_shape(shape, expected):
    assert Whole(shape).tensor_shapes.context[:4, 0].tolist() == pytest.approx(expected)
