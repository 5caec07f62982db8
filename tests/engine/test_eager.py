"""How plain operations run the rule: passes, chunks, memory, state in two bytes."""

from __future__ import annotations

import pytest
import torch

from helpers.support import assert_same_bits, give_gradients, leaves, make, run
from learned_optim.engine import eager
from learned_optim.rule import update


def test_the_head_is_evaluated_once_for_all_tensors_of_a_group(monkeypatch):
    calls = []
    original = update.coefficients

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(update, "coefficients", counted)
    params = leaves(*[(300, 200)] * 5, *[(n,) for n in range(1, 60)])
    run(make(params), params, 1)
    assert len(calls) == 1


def test_many_copied_tensors_are_run_in_several_passes_with_the_same_bits(monkeypatch):
    shapes = [(n, 100) for n in range(20, 50)] + [(400, 200)]
    plain, params = leaves(*shapes), leaves(*shapes)
    run(make(plain), plain, 2)
    monkeypatch.setattr("learned_optim.engine.step.COPIED", 10_000)
    run(make(params), params, 2)
    assert_same_bits(params, plain)


def test_chunks_of_another_length_give_the_same_update(monkeypatch):
    plain, params = leaves((500, 300)), leaves((500, 300))
    run(make(plain), plain, 3)
    monkeypatch.setattr(eager, "CHUNK", 1 << 12)
    run(make(params), params, 3)
    torch.testing.assert_close(params[0], plain[0], rtol=1e-5, atol=1e-6)


def test_two_byte_state_follows_the_loss_of_four_byte_state():
    losses = []
    for state_dtype in (None, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(300, generator=generator)
        (p,) = params = leaves((300,))
        optimizer = make(params, "base", lr=1e-2, state_dtype=state_dtype)
        for _ in range(300):
            p.grad = p.detach() - target + torch.randn(300, generator=generator)
            optimizer.step()
        losses.append(float((p.detach() - target).square().mean()))
    assert losses[1] == pytest.approx(losses[0], rel=0.15)


def test_two_byte_state_is_resumed_bit_for_bit_and_does_not_depend_on_neighbours():
    shapes = [(40, 30), (7,), (200, 200)]
    straight, alone = leaves(*shapes), leaves(*shapes)
    run(make(straight, state_dtype=torch.bfloat16), straight, 4)
    separate = [make([p], state_dtype=torch.bfloat16) for p in alone]
    for i in range(4):
        give_gradients(alone, i)
        for k, optimizer in enumerate(separate):
            optimizer.step()
            if i == 1:
                resumed = make([alone[k]], state_dtype=torch.bfloat16)
                resumed.load_state_dict(optimizer.state_dict())
                separate[k] = resumed
    assert_same_bits(alone, straight)
    state = separate[0].state[alone[0]]
    assert {state["exp_avg"].dtype, state["hidden_3"].dtype} == {torch.bfloat16}
    assert state["exp_avg_sq"].dtype == torch.float32


def test_strided_tensors_are_updated_in_place_as_contiguous_ones_are():
    strided = [torch.randn(300, 400, generator=torch.Generator().manual_seed(0))[:, ::2].requires_grad_()]
    plain = [strided[0].detach().clone(memory_format=torch.contiguous_format).requires_grad_()]
    address = strided[0].data_ptr()
    for params in (strided, plain):
        run(make(params), params, 2)
    assert strided[0].data_ptr() == address
    torch.testing.assert_close(strided[0], plain[0], rtol=1e-5, atol=1e-6)
