"""Checks that cannot fail prove nothing: each fault here is planted, and the check that must catch it does."""

from __future__ import annotations

import pytest
import torch

from helpers.optimizer_checks import (
    assert_arithmetic_is_float32,
    assert_chunks_leave_no_seam,
    assert_resumes_bit_exactly,
    assert_same_compiled,
)
from helpers.rule_checks import assert_follows_reference, assert_is_adamw
from helpers.support import POLICIES, assert_same_bits, copies, give_gradients, leaves, make
from learned_optim import optimizer
from learned_optim.engine.param_state import ParamState
from learned_optim.rule import update
from learned_optim.rule.layouts import Segments, Whole
from learned_optim.rule.types import StepScalars


@pytest.fixture(params=["bias_correction1", "root_bias_correction2"])
def lost_correction(request, monkeypatch):
    original = StepScalars.at

    def faulty(step, hyper):
        return original(step, hyper)._replace(**{request.param: 1.0})

    monkeypatch.setattr(StepScalars, "at", faulty)


@pytest.mark.usefixtures("lost_correction")
def test_a_lost_bias_correction_is_caught_by_the_comparison_with_adamw():
    with pytest.raises(AssertionError, match="not close"):
        assert_is_adamw(3, torch.float64, lr=1e-2)


@pytest.mark.usefixtures("lost_correction")
@pytest.mark.parametrize("policy", ["random", "gru"])
def test_a_lost_bias_correction_is_caught_by_the_transcription(policy):
    with pytest.raises(AssertionError, match="not close"):
        assert_follows_reference(POLICIES[policy], [(3, 4)], Whole((3, 4)))


@pytest.mark.parametrize("edge", [0, -1], ids=["first", "last"])
def test_a_coordinate_left_out_at_a_chunk_border_is_caught(edge, monkeypatch):
    original = update.move

    def faulty(param, d, scalars, decay):
        moved = original(param, d, scalars, decay)
        if len(moved) > 1:
            moved[edge] = param[edge]
        return moved

    monkeypatch.setattr(update, "move", faulty)
    with pytest.raises(AssertionError, match="not close"):
        assert_chunks_leave_no_seam("random", 16, 100, monkeypatch)


@pytest.mark.parametrize("policy", ["random", "gru"])
def test_a_coordinate_left_out_of_the_sums_at_a_chunk_border_is_caught(policy, monkeypatch):
    original = update.measure

    def faulty(layout, param, grad, state, scalars):
        grad = grad.clone()
        grad[-1] = 0.0
        return original(layout, param, grad, state, scalars)

    monkeypatch.setattr(update, "measure", faulty)
    with pytest.raises(AssertionError, match="not close"):
        assert_chunks_leave_no_seam(policy, 16, 100, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lost_dtype_of_restored_state_is_caught(dtype, monkeypatch):
    def faulty(keys, p, key, value):
        return value if key == "step" else value.to(p.dtype)

    assert_resumes_bit_exactly(dtype)
    monkeypatch.setattr(optimizer, "restored", faulty)
    with pytest.raises(AssertionError, match="dtype"):
        assert_resumes_bit_exactly(dtype)


def test_restored_state_that_went_through_the_parameters_dtype_is_caught(monkeypatch):
    original = optimizer.restored

    def faulty(keys, p, key, value):
        restored = original(keys, p, key, value)
        return restored if key == "step" else restored.to(p.dtype).to(restored.dtype)

    monkeypatch.setattr(optimizer, "restored", faulty)
    with pytest.raises(AssertionError, match="differs by up to"):
        assert_resumes_bit_exactly(torch.bfloat16)


def test_an_ignored_maximize_is_caught(monkeypatch):
    original = ParamState.own_grad
    monkeypatch.setattr(ParamState, "own_grad", lambda self, grad, maximize: original(self, grad, False))
    with pytest.raises(AssertionError, match="not close"):
        assert_is_adamw(3, torch.float64, lr=1e-2, maximize=True)


def assert_neighbours_do_not_matter():
    together = leaves((5,), (7,), (3, 4))
    alone = copies(together)
    optimizer, each = make(together), [make([p]) for p in alone]
    for step in range(3):
        give_gradients(together, step)
        give_gradients(alone, step)
        optimizer.step()
        for o in each:
            o.step()
    assert_same_bits(together, alone)


def test_statistics_that_leak_between_tensors_are_caught(monkeypatch):
    assert_neighbours_do_not_matter()
    original = Segments.inner

    def faulty(self, x, y):
        sums = original(self, x, y)
        return sums + 1e-3 * sums.sum()

    monkeypatch.setattr(Segments, "inner", faulty)
    with pytest.raises(AssertionError, match="differs by up to"):
        assert_neighbours_do_not_matter()


def test_arithmetic_in_the_parameters_dtype_is_caught(monkeypatch):
    original = update.move

    def faulty(param, d, scalars, decay):
        return param + (original(param, d, scalars, decay) - param).bfloat16().float()

    params = leaves((5, 4), dtype=torch.bfloat16)
    reference = [p.detach().float().requires_grad_() for p in params]
    assert_arithmetic_is_float32(params, reference, "random", lr=0.05)

    calls = []

    def only_the_first(*args):
        calls.append(0)
        return (faulty if len(calls) % 2 else original)(*args)

    monkeypatch.setattr(update, "move", only_the_first)
    with pytest.raises(AssertionError, match="differs by up to"):
        assert_arithmetic_is_float32(params, reference, "random", lr=0.05)


def test_scalars_frozen_by_a_compiler_are_caught():
    """What tracing through the step would do: the count of steps stays what it was at first."""

    def compile_step(optimizer):
        def step():
            optimizer.step()
            for state in optimizer.state.values():
                state["step"].fill_(1.0)

        return step

    with pytest.raises(AssertionError):
        assert_same_compiled(compile_step)
