"""Small tasks, half of them built to break an update rule. Each is made from a generator of random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Params = list[Tensor]


class HardTask(NamedTuple):
    start: Params
    loss: Callable[[Params, int, torch.Generator], Tensor]  #: of parameters, step and noise: what is descended
    measured: Callable[[Params, int], Tensor]  #: the loss that counts, without noise


def log_uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low * (high / low) ** float(torch.rand((), generator=rng))


def _normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)


def _plain(start: Params, measured: Callable[[Params], Tensor]) -> HardTask:
    return HardTask(start, lambda p, t, rng: measured(p), lambda p, t: measured(p))


def quadratic(rng: torch.Generator, noise: float = 0.0) -> HardTask:
    d, condition = int(log_uniform(rng, 4, 100)), log_uniform(rng, 1, 1e4)
    scales = torch.exp(torch.linspace(0, math.log(condition) / 2, d))
    root = torch.linalg.qr(_normal(rng, d, d))[0] * scales

    def measured(p: Params) -> Tensor:
        return 0.5 * (root.T @ p[0]).square().sum() + 1e-3

    def loss(p: Params, t: int, rng: torch.Generator) -> Tensor:
        return measured(p) + noise * (_normal(rng, d) * p[0]).sum()

    return HardTask([_normal(rng, d)], loss, lambda p, t: measured(p))


def noisy_quadratic(rng: torch.Generator) -> HardTask:
    return quadratic(rng, noise=log_uniform(rng, 0.3, 10.0))


def _network(
    rng: torch.Generator, inputs: int, activation: Callable[[Tensor], Tensor], label_noise: float, density: float
) -> HardTask:
    start = [_normal(rng, 16, inputs) / math.sqrt(inputs), torch.zeros(16), _normal(rng, 1, 16) / 4, torch.zeros(1)]
    x = _normal(rng, 256, inputs) * (torch.rand(256, inputs, generator=rng) < density)
    y = torch.tanh(x @ _normal(rng, inputs, 12)) @ _normal(rng, 12, 1) + label_noise * _normal(rng, 256, 1)

    def error(p: Params, rows: Tensor | slice) -> Tensor:
        return F.mse_loss(F.linear(activation(F.linear(x[rows], p[0], p[1])), p[2], p[3]), y[rows])

    return HardTask(
        start,
        lambda p, t, rng: error(p, torch.randint(256, (16,), generator=rng)),
        lambda p, t: error(p, slice(None)),
    )


def network(rng: torch.Generator) -> HardTask:
    return _network(rng, 6, torch.tanh, 0.0, 1.0)


def network_on_noisy_labels(rng: torch.Generator) -> HardTask:
    return _network(rng, 6, torch.relu, 1.0, 1.0)


def network_on_sparse_inputs(rng: torch.Generator) -> HardTask:
    return _network(rng, 40, torch.tanh, 0.0, 0.1)


def logistic_regression(rng: torch.Generator) -> HardTask:
    d = int(log_uniform(rng, 5, 60))
    x = _normal(rng, 300, d) * torch.exp(_normal(rng, d))
    y = ((x @ _normal(rng, d) + 2 * _normal(rng, 300)) > 0).float()

    def error(p: Params, rows: Tensor | slice) -> Tensor:
        return F.binary_cross_entropy_with_logits(x[rows] @ p[0] + p[1], y[rows])

    return HardTask(
        [torch.zeros(d), torch.zeros(1)],
        lambda p, t, rng: error(p, torch.randint(300, (20,), generator=rng)),
        lambda p, t: error(p, slice(None)),
    )


def rosenbrock(rng: torch.Generator) -> HardTask:
    d = int(log_uniform(rng, 2, 20))
    return _plain(
        [_normal(rng, d)],
        lambda p: (100 * (p[0][1:] - p[0][:-1] ** 2) ** 2 + (1 - p[0][:-1]) ** 2).sum() + 1e-3,
    )


def exploding_curvature(rng: torch.Generator) -> HardTask:
    d = int(log_uniform(rng, 2, 20))
    return _plain(
        [2 + _normal(rng, d)],
        lambda p: torch.cosh(3 * p[0].clamp(-9, 9)).sum().log() + 0.1 * p[0].abs().sum(),
    )


def sign_flips(rng: torch.Generator) -> HardTask:
    """A small slope under a large one that changes its sign with every step."""
    d = int(log_uniform(rng, 2, 50))

    def measured(p: Params) -> Tensor:
        return 0.5 * p[0].square().sum() + 1e-3

    return HardTask(
        [_normal(rng, d)], lambda p, t, rng: measured(p) + (3 if t % 2 else -3) * p[0].sum(), lambda p, t: measured(p)
    )


def moving_target(rng: torch.Generator) -> HardTask:
    d = int(log_uniform(rng, 2, 50))
    phase, period = 3 * _normal(rng, d), log_uniform(rng, 20, 100)

    def measured(p: Params, t: int) -> Tensor:
        return 0.5 * (p[0] - torch.sin(phase + t / period)).square().sum() + 1e-3

    return HardTask([_normal(rng, d)], lambda p, t, rng: measured(p, t), measured)


def policy_gradient(rng: torch.Generator) -> HardTask:
    """A bandit by the score function's gradient, one action at a time, rewards in noise; measured is the regret."""
    rewards = _normal(rng, int(log_uniform(rng, 3, 20)))

    def loss(p: Params, t: int, rng: torch.Generator) -> Tensor:
        probabilities = p[0].softmax(0)
        action = int(torch.multinomial(probabilities.detach(), 1, generator=rng))
        reward = float(rewards[action] + 2 * _normal(rng, 1))
        return -reward * probabilities[action].log()

    return HardTask(
        [torch.zeros_like(rewards)], loss, lambda p, t: rewards.max() - (p[0].softmax(0) * rewards).sum() + 0.05
    )


def sparse_gradients(rng: torch.Generator) -> HardTask:
    target = _normal(rng, 200, 4)
    return HardTask(
        [_normal(rng, 200, 4)],
        lambda p, t, rng: (p[0] - target)[torch.randint(200, (4,), generator=rng)].square().mean(),
        lambda p, t: (p[0] - target).square().mean() + 1e-3,
    )


KINDS: dict[str, Callable[[torch.Generator], HardTask]] = {
    "quadratic": quadratic,
    "noisy quadratic": noisy_quadratic,
    "network": network,
    "network, noisy labels": network_on_noisy_labels,
    "network, sparse inputs": network_on_sparse_inputs,
    "logistic regression": logistic_regression,
    "Rosenbrock": rosenbrock,
    "exploding curvature": exploding_curvature,
    "sign-flipping gradients": sign_flips,
    "moving target": moving_target,
    "policy gradient": policy_gradient,
    "sparse gradients": sparse_gradients,
}
