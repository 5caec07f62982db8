"""The rule's own weight decay, and which matrices count as large."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers.support import give_gradients, leaves
from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.rule.layouts import ShapeContext

SHAPES = (160, 130), (64, 48, 3, 3), (30, 20), (300, 16), (50,), ()
LARGE = (160, 130), (160, 130), (256, 256)
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


@BACKENDS
def test_every_matrix_of_a_batch_decays_by_its_own(backend):
    """Two of one shape, which are orthogonalised together, and one whose step is a single product."""
    with_decay, without = decaying(3.0, column="log_rms_p"), decaying(0.0)
    before = [p.detach() * scale for p, scale in zip(leaves(*LARGE), (1.0, 0.2, 1.0), strict=True)]
    moved, decays = [], []
    for policy in (with_decay, without):
        params = [p.clone().requires_grad_() for p in before]
        give_gradients(params, 0)
        optimizer = LearnedOptimizer(params, lr=0.01, policy=policy, backend=backend)
        optimizer.step()
        moved.append([p.detach() for p in params])
        decays.append([row["decay"] for row in optimizer.diagnostics().values()])
    assert decays[0][0] > decays[0][1] + 1.0
    assert decays[1] == [0.0, 0.0, 0.0]
    for old, decay, one, other in zip(before, decays[0], *moved, strict=True):
        torch.testing.assert_close(one - other, -0.01 * decay * old, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(1e-4)])
def test_pretraining_is_default_where_matrices_are_small(lr):
    made = []
    for policy in ("default", "pretraining"):
        params = leaves((64, 300), (64, 16, 3, 3), (1024, 100), (7,), ())
        optimizer = LearnedOptimizer(params, lr=lr, policy=policy)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        made.append(params)
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


def test_without_a_learning_rate_nothing_moves():
    params = leaves((160, 130), (256, 256))
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    LearnedOptimizer(params, lr=0.0, policy="pretraining").step()
    assert all(map(torch.equal, params, before))
