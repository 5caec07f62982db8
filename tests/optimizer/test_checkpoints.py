"""Saving and resuming: bit-exact in every dtype, and refused in words where the state does not fit."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from helpers.optimizer_checks import SHAPES, assert_resumes_bit_exactly, through_a_file
from helpers.support import (
    DTYPES,
    POLICIES,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    copies,
    give_gradients,
    leaves,
    make,
    random_policy,
    run,
    snapshot,
)
from learned_optim import LearnedOptimizer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_resuming_from_a_file_is_bit_exact(dtype, state_dtype, policy):
    assert_resumes_bit_exactly(dtype, policy, state_dtype=state_dtype, lr=0.05)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda s: s], ids=["deepcopy", "directly"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_resuming_in_memory_is_bit_exact(dtype, through):
    assert_resumes_bit_exactly(dtype, through=through)


def test_resuming_complex_parameters_is_bit_exact():
    z = torch.randn(4, 3, dtype=torch.complex64).requires_grad_()
    optimizer = make([z])
    run(optimizer, [z], 3)
    (w,) = copies([z])
    resumed = make([w])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, [z], 3, start=3)
    run(resumed, [w], 3, start=3)
    assert_same_bits([w], [z])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_in_a_fresh_process_is_bit_exact(dtype, tmp_path):
    policy = random_policy()
    policy.save_pretrained(tmp_path / "policy")
    params = leaves(*SHAPES, dtype=getattr(torch, dtype))
    optimizer = make(params, tmp_path / "policy" and policy, lr=0.05)
    run(optimizer, params, 3)
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, tmp_path / "before.pt")
    grads = []
    for step in range(3, 6):
        give_gradients(params, step)
        grads.append([p.grad for p in params])
        optimizer.step()
    torch.save(grads, tmp_path / "grads.pt")
    program = f"""
import torch
from learned_optim import LearnedOptimizer
torch.set_num_threads(1)
saved = torch.load("before.pt", weights_only=True)
params = [p.requires_grad_() for p in saved["params"]]
optimizer = LearnedOptimizer(params, policy={str(tmp_path / "policy")!r}, backend="eager")
optimizer.load_state_dict(saved["optimizer"])
for grads in torch.load("grads.pt", weights_only=True):
    for p, g in zip(params, grads):
        p.grad = g
    optimizer.step()
torch.save([[p.detach() for p in params], optimizer.state_dict()], "after.pt")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    resumed_params, state = torch.load(tmp_path / "after.pt", weights_only=True)
    assert_same_bits(resumed_params, params)
    for key, values in optimizer.state_dict()["state"].items():
        assert_same_bits(list(state["state"][key].values()), list(values.values()))


def test_what_was_saved_is_the_same_after_loading_from_a_file():
    params = leaves(*SHAPES)
    optimizer = make(params)
    run(optimizer, params, 2)
    saved = optimizer.state_dict()
    loaded = through_a_file(saved)
    assert loaded["param_groups"] == saved["param_groups"]
    assert loaded["state"].keys() == saved["state"].keys()


def test_a_state_can_be_loaded_before_any_step():
    params = leaves((3,), (4,))
    optimizer = make(params)
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.state) == 0
    fresh = leaves((3,), (4,))
    plain = make(fresh)
    run(optimizer, params, 2)
    run(plain, fresh, 2)
    assert_same_bits(params, fresh)


def test_loading_does_not_touch_or_share_what_was_loaded():
    params = leaves((4, 3))
    optimizer = make(params)
    run(optimizer, params, 2)
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state)
    other_params = copies(params)
    other = make(other_params)
    other.load_state_dict(state)
    run(other, other_params, 2)
    assert state["param_groups"] == before["param_groups"]
    for key, values in before["state"].items():
        assert_same_bits(list(state["state"][key].values()), list(values.values()))


def test_loading_replaces_state_that_was_there():
    first, second = leaves((4, 3)), leaves((4, 3), seed=1)
    one, two = make(first, lr=0.1), make(second, lr=0.2)
    run(one, first, 2)
    run(two, second, 5)
    two.load_state_dict(one.state_dict())
    assert_same_state(two, one)
    assert two.param_groups[0]["lr"] == 0.1


def test_a_partial_state_leaves_the_other_parameters_fresh():
    p, q = leaves((3,), (4,))
    optimizer = make([p, q])
    give_gradients([p], 0)
    optimizer.step()
    other = make(leaves((3,), (4,)))
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == 1


def test_state_follows_the_dtype_of_the_optimizer_that_loads_it():
    params = leaves((4, 3), dtype=torch.bfloat16)
    optimizer = make(params, state_dtype=torch.bfloat16)
    run(optimizer, params, 2)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        others = [p.detach().to(dtype).requires_grad_() for p in params]
        other = make(others)
        other.load_state_dict(optimizer.state_dict())
        assert {other.state[others[0]][k].dtype for k in ("exp_avg", "exp_avg_sq", "hidden_2")} == {expected}
        assert other.state[others[0]]["step"].dtype == torch.float32
        run(other, others, 2)


def test_a_step_that_is_no_tensor_can_be_loaded():
    params = leaves((4, 3))
    optimizer = make(params)
    run(optimizer, params, 3)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["step"] = 3
    other_params = copies(params)
    other = make(other_params)
    other.load_state_dict(state)
    assert isinstance(other.state[other_params[0]]["step"], torch.Tensor)
    run(optimizer, params, 2, start=3)
    run(other, other_params, 2, start=3)
    assert_same_bits(other_params, params)


def test_a_state_without_a_newer_option_can_be_loaded():
    params = leaves((4, 3))
    optimizer = make(params)
    run(optimizer, params, 2)
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["maximize"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["maximize"] is False
    run(optimizer, params, 2)


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)])
def test_named_and_unnamed_states_can_be_exchanged(named):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1), torch.nn.BatchNorm2d(2))

    def parameters(with_names):
        return model.named_parameters() if with_names else model.parameters()

    optimizer = make(parameters(named[0]))
    model(torch.rand(1, 4, 8, 8)).square().sum().backward()
    optimizer.step()
    other = make(parameters(named[1]))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    other.step()


def test_channels_last_state_resumes():
    p = torch.randn(60, 70, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    optimizer = make([p])
    run(optimizer, [p], 2)
    (q,) = copies([p])
    resumed = make([q])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, [p], 2, start=2)
    run(resumed, [q], 2, start=2)
    assert_same_bits([q], [p])


# --- hooks ---------------------------------------------------------------------------------------------------------


def test_state_dict_hooks_run():
    optimizer = make(leaves((2, 3)))
    optimizer.register_state_dict_pre_hook(lambda opt: opt.state.__setitem__("test", 1))
    assert optimizer.state_dict()["state"]["test"] == 1

    def post(opt, state):
        state["state"].pop("test")
        state["seen"] = True
        return state

    optimizer.register_state_dict_post_hook(post)
    state = optimizer.state_dict()
    assert state["seen"]
    assert "test" not in state["state"]


def test_load_hooks_run_before_the_check_and_after_the_loading():
    params = leaves((2, 3))
    optimizer = make(params)
    run(optimizer, params, 1)
    foreign = copy.deepcopy(optimizer.state_dict())
    fingerprint = foreign["param_groups"][0].pop("policy")
    seen = []

    def mend(opt, state):
        state = copy.deepcopy(state)
        state["param_groups"][0] |= {"policy": fingerprint, "lr": 0.003}
        return state

    optimizer.register_load_state_dict_pre_hook(mend)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(opt.param_groups[0]["lr"]))
    optimizer.load_state_dict(foreign)
    assert seen == [0.003]
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


# --- what does not fit ---------------------------------------------------------------------------------------------


def saved(**options):
    params = leaves((4, 3), (5,))
    optimizer = make(params, **options)
    run(optimizer, params, 1)
    return copy.deepcopy(optimizer.state_dict())


def without_policy(state):
    del state["param_groups"][0]["policy"]


def without_a_state_tensor(state):
    del state["state"][1]["hidden_2"]


def with_another_shape(state):
    state["state"][0]["exp_avg"] = torch.zeros(3, 4)


def with_no_tensor(state):
    state["state"][0]["exp_avg"] = "lost"


def with_complex_state(state):
    state["state"][0]["hidden_1"] = torch.zeros(4, 3, dtype=torch.complex64)


def with_fewer_parameters(state):
    state["param_groups"][0]["params"].pop()


def with_another_group(state):
    state["param_groups"].append({**state["param_groups"][0], "params": []})


def with_a_group_without_betas(state):
    del state["param_groups"][0]["betas"]


def without_groups(state):
    del state["param_groups"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_policy, "not saved by LearnedOptimizer"),
        (without_a_state_tensor, r"parameter 1 lacks \['hidden_2'\]"),
        (with_another_shape, r"exp_avg.*\(3, 4\).*\(4, 3\)"),
        (with_no_tensor, "exp_avg.*str"),
        (with_complex_state, "hidden_1.*complex64.*float32"),
        (with_fewer_parameters, r"\[1\] parameters.*\[2\]"),
        (with_another_group, r"\[2, 0\] parameters.*\[2\]"),
        (with_a_group_without_betas, r"group of this state lacks \['betas'\]"),
        (without_groups, r"'param_groups', found \['state'\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_has_changed(spoil, message):
    params = leaves((4, 3), (5,), seed=1)
    optimizer = make(params)
    run(optimizer, params, 2)
    before = snapshot(optimizer)
    state = saved()
    spoil(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_unchanged(optimizer, before)
    run(optimizer, params, 1)
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 0


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
def test_the_checkpoint_of_another_optimizer_is_refused_in_words(other):
    theirs = leaves((4, 3), (5,))
    foreign = other(theirs, lr=1e-3)
    run(foreign, theirs, 1)
    params = leaves((4, 3), (5,))
    optimizer = make(params)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    way = "" if other is torch.optim.SGD else r"AdamW.*LearnedOptimizer\.from_adamw\(adamw\).*"
    with pytest.raises(ValueError, match=rf"not saved by LearnedOptimizer.*{way}fresh optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    assert_unchanged(optimizer, before)


def test_a_checkpoint_of_another_policy_is_refused_and_both_are_named():
    state = saved(policy="random")
    params = leaves((4, 3), (5,))
    optimizer = make(params, random_policy(seed=1))
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="policy") as caught:
        optimizer.load_state_dict(state)
    assert POLICIES["random"].fingerprint() in str(caught.value)
    assert optimizer.policy.fingerprint() in str(caught.value)
    assert_unchanged(optimizer, before)


def test_flat_pieces_of_classic_fsdp_keep_their_age():
    params = leaves((6,), (5,))
    optimizer = make(params)
    run(optimizer, params, 3)
    params[0]._fsdp_flattened = True
    piece, whole = optimizer.state_dict()["state"].values()
    assert piece["cosine_fast"] == piece["log_pace"] == 0.0 != whole["cosine_fast"]
    assert piece["age"] == piece["step"] == 3.0


def test_the_same_weights_from_another_place_are_the_same_policy(tmp_path):
    state = saved(policy="random")
    POLICIES["random"].save_pretrained(tmp_path / "copy")
    optimizer = LearnedOptimizer(leaves((4, 3), (5,)), policy=tmp_path / "copy")
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["policy"] == optimizer.defaults["policy"]


def test_something_that_is_no_state_is_refused():
    optimizer = make(leaves((3,)))
    for nonsense in ({}, {"state": {}}, {"model": 1}):
        with pytest.raises(ValueError, match="not an optimizer state"):
            optimizer.load_state_dict(nonsense)
    for nonsense in (None, 3, "checkpoint.pt", []):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            optimizer.load_state_dict(nonsense)
