"""With the safeguard a step lies between AdamW's and the rule's, nearer to AdamW's where gradients object."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import AdamW

from helpers.scripts import load_script
from helpers.support import copies, give_gradients, leaves, make, run
from learned_optim import Policy, PolicyConfig
from learned_optim.engine.kernels import find_compiler
from learned_optim.rule.safeguard import DOUBT, MAX_SIZE, TOLERATED, guarded
from learned_optim.rule.types import Coefficients, TensorState

SHAPES = ((6, 4), (5,), (), (2, 3, 2, 2))


def test_a_run_begins_with_adamws_steps():
    params = leaves(*SHAPES)
    theirs = copies(params)
    ours, adamw = make(params, lr=0.1, safeguard=True), AdamW(theirs, lr=0.1)
    run(ours, params, 3)
    run(adamw, theirs, 3)
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_gradients_that_turn_against_every_step_keep_the_steps_adamws():
    params = leaves(*SHAPES)
    theirs = copies(params)
    ours, adamw = make(params, lr=1e-3, safeguard=True), AdamW(theirs, lr=1e-3)
    for step in range(60):
        for optimizer, tensors in ((ours, params), (adamw, theirs)):
            give_gradients(tensors, 0)
            for p in tensors:
                p.grad *= -1.0 if step % 2 else 1.0
            optimizer.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert all(figures["trust"] <= DOUBT for figures in ours.diagnostics().values())


def test_gradients_that_agree_give_the_step_to_the_rule():
    params, free = leaves((6, 4)), leaves((6, 4))
    ours, rule = make(params, policy="base", lr=1e-3, safeguard=True), make(free, policy="base", lr=1e-3)
    for _ in range(60):
        for optimizer, tensors in ((ours, params), (rule, free)):
            give_gradients(tensors, 0)
            optimizer.step()
    (figures,) = ours.diagnostics().values()
    assert figures["trust"] == pytest.approx(1.0)
    before, expected = params[0].detach().clone(), free[0].detach().clone()
    give_gradients(params, 0), give_gradients(free, 0)
    ours.step(), rule.step()
    torch.testing.assert_close(params[0] - before, free[0] - expected, rtol=1e-2, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(trust=st.floats(0.0, 1.0), cosine=st.floats(-1.0, 1.0), scale=st.floats(0.01, 1e4), seed=st.integers(0, 99))
def test_the_mixture_lies_between_adamws_and_the_rules_and_is_bounded(trust, cosine, scale, seed):
    hidden = len(PolicyConfig().hidden_weights)
    rows = torch.rand(Coefficients.count(hidden, hidden), 3, generator=torch.Generator().manual_seed(seed),
                      dtype=torch.float64) * scale  # fmt: skip
    before = Coefficients.of_rows(rows.unbind(), hidden)._replace(caution_factor=torch.full((3,), 0.5).double())
    numel = torch.tensor([1.0, 100.0, 1e6], dtype=torch.float64)
    state = TensorState(*torch.tensor([cosine, 0.0, 0.0, 9.0, trust], dtype=torch.float64).unsqueeze(1).expand(5, 3))
    coeff, state = guarded(before, state, numel)
    new = state.trust
    total = coeff.momentum + coeff.gradient + sum(coeff.hidden)
    assert bool((total <= MAX_SIZE + 1e-9).all())
    assert bool(((new >= 0.0) & (new <= 1.0)).all())
    assert bool(((coeff.caution_factor >= 0.5) & (coeff.caution_factor <= 1.0)).all())
    without = new <= DOUBT
    for value, adamws in ((coeff.momentum, 1.0), (coeff.gradient, 0.0), (coeff.caution_factor, 1.0)):
        assert bool((value[without] == adamws).all())
    if cosine < -TOLERATED:
        assert bool((new <= max(trust, 0.0)).all())


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_guarded_run_continues_bit_for_bit(way):
    params = leaves(*SHAPES)
    optimizer = make(params, safeguard=True)
    run(optimizer, params, 20)
    if way == "state_dict":
        others = copies(params)
        other = make(others, safeguard=True)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        pair = (params, optimizer)
        others, other = pickle.loads(pickle.dumps(pair)) if way == "pickle" else copy.deepcopy(pair)
    run(optimizer, params, 5, start=20)
    run(other, others, 5, start=20)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_state_saved_without_a_safeguard_begins_with_no_trust_and_the_other_way_round_is_ignored():
    params = leaves(*SHAPES)
    free, guarded_one = make(params), make(params, safeguard=True)
    run(free, params, 3)
    guarded_one.load_state_dict(free.state_dict())
    run(guarded_one, params, 1)
    assert all(figures["trust"] < DOUBT for figures in guarded_one.diagnostics().values())
    free.load_state_dict(guarded_one.state_dict())
    run(free, params, 1)
    assert not any("trust" in figures for figures in free.diagnostics().values())


@pytest.mark.skipif(find_compiler("cpu") is None, reason="no C++ compiler")
def test_compiled_kernels_are_guarded_alike():
    params = leaves(*SHAPES)
    others = copies(params)
    eager, compiled = make(params, safeguard=True), make(others, safeguard=True, backend="compiled")
    for step in range(40):
        for optimizer, tensors in ((eager, params), (compiled, others)):
            give_gradients(tensors, step // 10)
            optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_gradient_that_is_not_a_number_takes_all_trust(backend):
    params = leaves((4, 4))
    optimizer = make(params, safeguard=True, backend=backend)
    for _ in range(30):
        give_gradients(params, 0)
        optimizer.step()
    params[0].grad.fill_(math.nan)
    optimizer.step()
    assert float(optimizer.state[params[0]]["trust"]) == 0.0


def test_hard_tasks_do_not_blow_up():
    tool = load_script("tools/measure_safeguard.py")
    rows = tool.compare(Policy.from_pretrained("default"), seeds=1, steps=200)
    assert [row["kind"] for row in rows] == list(tool.KINDS)
    # docs/safeguard.md has more and longer ones.
    assert sum(row["on"] > math.log(1.1) for row in rows) <= 3
    assert max(row["on"] for row in rows) < math.log(10.0)
    assert max(row["off"] for row in rows) > math.log(5.0)  # there is something to be guarded against
    assert sum(row["on"] for row in rows) < 0.0
    text = tool.page({"tasks": rows, "policy": "default", "steps": 200, "seeds": 1})
    assert text.count("\n| ") >= len(tool.KINDS)
