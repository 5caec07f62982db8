"""Automatic mixed precision: gradient scaling, autocast, and the step that is skipped."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.support import POLICIES, assert_same_bits, assert_unchanged, make, regression, run, snapshot, train


def test_with_a_scaler_the_update_is_the_same():
    """Scales are powers of two, so unscaling is exact and so is the comparison."""
    model, loss = regression()
    plain_model, plain_loss = regression()
    optimizer = make(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()
    train(plain_model, plain_loss, make(plain_model.parameters(), lr=0.01), 5)
    assert_same_bits(list(model.parameters()), list(plain_model.parameters()))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_step_with_gradients_that_are_not_finite_is_skipped_as_a_whole(bad, unscale_first):
    model, loss = regression()
    optimizer = make(model.parameters(), lr=0.01)
    run(optimizer, list(model.parameters()), 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    model[0].weight.grad[0, 0] = bad
    before = snapshot(optimizer)
    if unscale_first:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert scaler.step(optimizer) is None
    scaler.update()
    assert_unchanged(optimizer, before)
    assert scaler.get_scale() == 512.0
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    scaler.step(optimizer)
    assert optimizer.state[model[0].weight]["step"] == 2


def test_clipping_after_unscaling_works():
    model, loss = regression()
    optimizer = make(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(optimizer)
    squares = sum(optimizer.state[p]["exp_avg"].square().sum() for p in model.parameters())
    assert squares.sqrt().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_closure_is_refused_by_the_scaler_not_by_the_optimizer():
    model, loss = regression()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss()).backward()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)


def test_a_disabled_scaler_is_no_trouble():
    model, loss = regression()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss()).backward()
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_trains_under_autocast(policy):
    model, loss = regression()
    optimizer = make(model.parameters(), policy, lr=0.01)

    def autocast_loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    losses = train(model, autocast_loss, optimizer, 60)
    assert losses[-1] < 0.9 * losses[0]
    assert all(value.dtype == torch.float32 for p in model.parameters() for value in optimizer.state[p].values())


def test_a_step_inside_autocast_computes_in_full_precision():
    model, loss = regression()
    other, other_loss = regression()
    inside, outside = make(model.parameters()), make(other.parameters())
    for m, l, o, enabled in ((model, loss, inside, True), (other, other_loss, outside, False)):
        l().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            o.step()
        assert m[0].weight.dtype == torch.float32
    assert_same_bits(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_low_precision_trains(dtype):
    model, _ = regression()
    model = model.to(dtype)
    x, y = torch.randn(32, 6).to(dtype), torch.randn(32, 1).to(dtype)
    losses = train(model, lambda: torch.nn.functional.mse_loss(model(x), y), make(model.parameters(), lr=0.01), 60)
    assert losses[-1] < 0.8 * losses[0]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
