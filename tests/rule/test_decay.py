"""The rule's own weight decay, and which matrices count as large."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers.support import give_gradients, leaves
from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.rule.layouts import ShapeContext

SHAPES = (160, 130), (64, 48, 3, 3), (30, 20), (300, 16), (50,), ()
BACKENDS = pytest.mark.parametrize("backend", ["eager", "compiled"])


def decaying(said: float, orthogonal: float = 1.0, column: str = "bias") -> Policy:
    """A policy whose own decay is ``said`` wherever the context has a 1 in that column."""
    config = PolicyConfig(decay_rate=2.0, orthogonal=orthogonal, orthogonal_block=64)
    more = {"context": "is_large", "context_center": 0.0, "context_scale": 1.0}
    policy = Policy(dataclasses.replace(config, **{k: (*getattr(config, k), v) for k, v in more.items()}))
    with torch.no_grad():
        policy.weights()["decay"][0, policy.config.context.index(column)] = said / 2.0
    return policy


def retained(policy: Policy, lr: float, **options) -> list[float]:
    """By what a step without a gradient multiplies each parameter."""
    params = leaves(*SHAPES)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    LearnedOptimizer(params, lr=lr, policy=policy, **options).step()
    factors = [p.detach() / old for p, old in zip(params, before, strict=True)]
    assert all(torch.allclose(f, f.mean().expand_as(f), rtol=1e-5) for f in factors)
    return [float(f.mean()) for f in factors]


@BACKENDS
@pytest.mark.parametrize("orthogonal", [0.0, 1.0])
def test_it_adds_to_the_users(backend, orthogonal):
    factors = retained(decaying(3.0, orthogonal), lr=0.01, weight_decay=5.0, backend=backend)
    assert factors == pytest.approx([1.0 - 0.01 * (5.0 + 3.0)] * len(SHAPES), abs=1e-6)


@BACKENDS
def test_small_learning_rates_decay_with_their_square(backend):
    factors = retained(decaying(400.0), lr=1e-4, weight_decay=0.0, backend=backend)
    assert factors == pytest.approx([1.0 - 1e-4 * 0.1 * 400.0] * len(SHAPES), abs=1e-6)


@BACKENDS
def test_it_may_concern_large_matrices_only(backend):
    factors = retained(decaying(3.0, column="is_large"), lr=0.01, weight_decay=0.0, backend=backend)
    assert factors == pytest.approx([0.97, 1.0, 1.0, 1.0, 1.0, 1.0], abs=1e-6)


def test_what_would_make_parameters_grow_is_no_decay():
    assert retained(decaying(-3.0), lr=0.01, weight_decay=0.0) == [1.0] * len(SHAPES)


def test_a_safeguard_without_trust_is_adamw_without_it():
    assert retained(decaying(3.0), lr=0.01, weight_decay=0.0, safeguard=True) == [1.0] * len(SHAPES)


def test_diagnostics_name_it():
    params = leaves((8, 6), (5,))
    optimizer = LearnedOptimizer(params, policy=decaying(3.0))
    give_gradients(params, 0)
    optimizer.step()
    assert [row["decay"] for row in optimizer.diagnostics().values()] == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize(
    ("shape", "role", "is_large"),
    [
        ((64, 4096), None, 0.0),
        ((96, 4096), None, 0.585),
        ((128, 128), None, 1.0),
        ((4096, 1024), None, 1.0),
        ((64, 64, 3, 3), None, 0.0),  # of a convolution the columns are all that is connected to one output
        ((128, 16, 3, 3), None, 1.0),
        ((1024, 128), None, 0.0),  # may be an embedding
        ((1023, 128), None, 1.0),
        ((50_000, 512), None, 0.0),
        ((50_000, 512), "matrix", 1.0),
        ((512, 512), "head", 0.0),
        ((512, 512), "vector", 0.0),
        ((512,), None, 0.0),
        ((), None, 0.0),
        ((0, 512), None, 0.0),
    ],
)
def test_large_are_matrices_of_many_rows_and_columns(shape, role, is_large):
    assert ShapeContext.of(shape, role).is_large == pytest.approx(is_large, abs=1e-3)
