"""Copies of the optimizer itself: deepcopy and pickle."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from helpers.support import DTYPES, POLICIES, assert_same_bits, assert_same_state, give_gradients, leaves, make, run
from learned_optim import Policy


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved_whole(thing):
    stream = io.BytesIO()
    torch.save(thing, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved_whole}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_a_copy_goes_on_bit_exactly(way, dtype, state_dtype):
    params = leaves((4, 3), (5,), (40_000,), dtype=dtype)
    optimizer = make(params, lr=0.05, state_dtype=state_dtype)
    run(optimizer, params, 3)
    other = WAYS[way](optimizer)
    others = other.param_groups[0]["params"]
    assert not any(a is b for a, b in zip(params, others, strict=True))
    assert_same_state(other, optimizer)
    run(optimizer, params, 3, start=3)
    run(other, others, 3, start=3)
    assert_same_bits(others, params)
    assert_same_state(other, optimizer)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_copy_has_all_public_attributes(way, policy):
    params = leaves((4, 3))
    optimizer = make(params, policy, lr=0.25, state_dtype=torch.bfloat16)
    run(optimizer, params, 2)
    other = WAYS[way](optimizer)
    assert {k for k in vars(other) if not k.startswith("_")} == {k for k in vars(optimizer) if not k.startswith("_")}
    assert repr(other) == repr(optimizer)
    assert {**other.defaults, "differentiable": False} == {**optimizer.defaults, "differentiable": False}
    assert other.backend == optimizer.backend
    assert other.state_dtype is optimizer.state_dtype
    assert other.policy.fingerprint() == optimizer.policy.fingerprint()


def test_a_model_and_its_optimizer_copied_together_stay_together():
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    assert optimizer2.param_groups[0]["params"][0] is model2.weight
    model2(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    optimizer2.step()
    assert torch.equal(model.weight, before)
    assert not torch.equal(model2.weight, before)


def test_a_copy_made_before_any_step_works():
    (p,) = leaves((3,))
    for way in WAYS.values():
        other = way(make([p]))
        (q,) = other.param_groups[0]["params"]
        give_gradients([q], 0)
        other.step()
        assert other.state[q]["step"] == 1


def test_the_state_of_a_copy_can_be_loaded_back():
    params = leaves((4, 3))
    optimizer = make(params)
    run(optimizer, params, 2)
    other = copy.deepcopy(optimizer)
    run(other, other.param_groups[0]["params"], 2)
    optimizer.load_state_dict(other.state_dict())
    assert_same_state(optimizer, other)


@pytest.mark.parametrize("way", WAYS)
def test_a_policy_that_is_changed_later_is_not_the_optimizers(way):
    params, policy = leaves((4, 3), seed=1), Policy.from_pretrained("default")
    optimizer, kept = make(params, policy=policy), leaves((4, 3), seed=1)
    same = make(kept, policy=Policy.from_pretrained("default"))
    with torch.no_grad():
        policy.get_parameter("head").zero_()
    params, optimizer = WAYS[way]((params, optimizer))
    run(optimizer, params, 3)
    run(same, kept, 3)
    assert_same_bits(params, kept)
    assert optimizer.policy.fingerprint() == same.policy.fingerprint()
