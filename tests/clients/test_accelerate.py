"""accelerate: prepare, accumulation, precision, save_state and load_state."""

from __future__ import annotations

import pytest
import torch

from helpers.support import assert_same_bits, assert_same_state, regression
from learned_optim import LearnedOptimizer

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


def start(**options):
    """Accelerator, model, optimizer, schedule and a function that makes steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model, _ = regression()
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    optimizer = LearnedOptimizer(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    def step(times):
        losses = []
        for _ in range(times):
            for half in (slice(0, 16), slice(16, 32)):
                with accelerator.accumulate(model):
                    loss = torch.nn.functional.mse_loss(model(x[half]).float(), y[half])
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return accelerator, model, optimizer, step


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}],
    ids=["plain", "accumulated", "bf16"],
)
def test_a_state_that_is_saved_and_loaded_goes_on_with_the_same_bits(tmp_path, options):
    accelerator, model, optimizer, step = start(**options)
    losses = step(6)
    accelerator.save_state(str(tmp_path / "state"))
    losses += step(6)
    assert losses[-1] < losses[0]

    accelerator, resumed, other, step = start(**options)
    accelerator.load_state(str(tmp_path / "state"))
    step(6)
    assert_same_bits(list(resumed.parameters()), list(model.parameters()))
    assert_same_state(other.optimizer, optimizer.optimizer)


def test_a_prepared_optimizer_does_what_it_does_alone():
    _, model, _, step = start(gradient_accumulation_steps=1)
    step(3)
    alone, _ = regression()
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    optimizer = LearnedOptimizer(alone.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(3):
        for half in (slice(0, 16), slice(16, 32)):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(alone(x[half]), y[half]).backward()
            torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    assert_same_bits(list(model.parameters()), list(alone.parameters()))


def test_gradients_scaled_for_fp16_train_and_a_step_that_overflows_is_skipped():
    _, model, optimizer, _ = start()
    prepared = accelerate.optimizer.AcceleratedOptimizer(optimizer.optimizer, scaler=torch.amp.GradScaler("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    for bad in (True, False):
        prepared.zero_grad()
        prepared.scaler.scale(model(torch.ones(4, 6)).square().mean()).backward()
        if bad:
            next(model.parameters()).grad[0, 0] = float("inf")
        prepared.step()
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert same == bad == prepared.step_was_skipped
