"""Constructing the optimizer: signatures, defaults, silence, and every refusal in words."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

from helpers.support import POLICIES, leaves, make, random_policy, snapshot
from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.engine.hyperparameters import FIXED


def test_the_signature_is_the_documented_one():
    signature = inspect.signature(LearnedOptimizer)
    assert list(signature.parameters) == [
        "params", "lr", "betas", "eps", "weight_decay",
        "policy", "revision", "maximize", "backend", "state_dtype", "safeguard", "skip_nonfinite", "capturable",
        "offload",
    ]  # fmt: skip
    defaults = {name: p.default for name, p in signature.parameters.items() if name != "params"}
    assert defaults == {
        "lr": 1e-3, "betas": None, "eps": None, "weight_decay": 0.01, "policy": "default", "revision": None,
        "maximize": False, "backend": "auto", "state_dtype": None, "safeguard": False, "skip_nonfinite": False,
        "capturable": False, "offload": False,
    }  # fmt: skip
    keyword_only = [name for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keyword_only == list(signature.parameters)[5:]


def overridden():
    names = [n for n in vars(LearnedOptimizer) if callable(getattr(Optimizer, n, None)) and n != "__init__"]
    return [n for n in names if getattr(LearnedOptimizer, n) is not getattr(Optimizer, n)]


@pytest.mark.parametrize("name", ["step", *(n for n in overridden() if n != "step")])
def test_every_overridden_method_keeps_torchs_parameters(name):
    def shape(method):
        return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]

    assert shape(getattr(LearnedOptimizer, name)) == shape(getattr(Optimizer, name))


def test_the_overridden_methods_are_found():
    assert {"step", "load_state_dict", "add_param_group", "__setstate__", "__getstate__"} <= set(overridden())


def test_it_starts_with_the_policys_own_betas_and_eps():
    config = PolicyConfig(betas=(0.8, 0.95), eps=1e-6)
    (group,) = LearnedOptimizer(leaves((3,)), policy=Policy(config)).param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    (group,) = LearnedOptimizer(leaves((3,)), betas=(0.5, 0.6), eps=0.1, policy=Policy(config)).param_groups
    assert (group["betas"], group["eps"]) == ((0.5, 0.6), 0.1)


def test_the_bundled_policy_is_the_default_and_is_named_in_the_groups():
    optimizer = LearnedOptimizer(leaves((3,)))
    assert optimizer.policy.fingerprint() == Policy.from_pretrained("default").fingerprint()
    assert optimizer.param_groups[0]["policy"].startswith(optimizer.policy.fingerprint())
    assert "default" in optimizer.param_groups[0]["policy"]


def test_a_policy_from_a_folder_gives_the_same_updates(tmp_path):
    policy = random_policy()
    policy.save_pretrained(tmp_path / "mine")
    results = []
    for source in (policy, tmp_path / "mine", str(tmp_path / "mine")):
        (p,) = leaves((4, 3))
        optimizer = LearnedOptimizer([p], policy=source, backend="eager")
        for _ in range(3):
            p.grad = p.detach().sin()
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_parameter_groups_hold_plain_data_only():
    params = leaves((3,), (4,))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.1}]
    for group in make(groups).state_dict()["param_groups"]:
        for value in group.values():
            items = value if isinstance(value, tuple | list) else [value]
            assert all(type(item) in (int, float, str, bool) for item in items), group


@pytest.mark.parametrize("source", ["default", "object"])
def test_the_constructor_takes_under_a_tenth_of_a_second(source):
    params = leaves(*[(8, 8)] * 100)
    policy = "default" if source == "default" else random_policy()

    def seconds():
        start = time.perf_counter()
        LearnedOptimizer(params, policy=policy)
        return time.perf_counter() - start

    seconds()
    assert min(seconds() for _ in range(5)) < 0.1


def test_import_construction_and_a_step_print_nothing_warn_nothing_and_open_no_socket():
    program = """
import socket
def refuse(*args, **kwargs):
    raise RuntimeError("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
from learned_optim import LearnedOptimizer
model = torch.nn.Linear(3, 2)
optimizer = LearnedOptimizer(model.parameters(), lr=1e-3)
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_can_be_printed():
    text = repr(make(leaves((3,)), lr=0.125))
    assert text.startswith("LearnedOptimizer (")
    assert "lr: 0.125" in text
    assert POLICIES["random"].fingerprint() in text


@pytest.mark.parametrize(
    "lr",
    [
        1,
        np.float32(0.5),
        np.float64(0.5),
        np.int64(1),
        torch.tensor(0.5),
        torch.tensor([[0.5]]),
        torch.tensor(0.5, requires_grad=True),
    ],
)
def test_lr_may_be_any_number(lr):
    (p,) = leaves((3,))
    optimizer = make([p], lr=lr)
    p.grad = torch.ones(3)
    optimizer.step()
    (q,) = leaves((3,))
    reference = make([q], lr=lr.item() if isinstance(lr, torch.Tensor) else float(lr))
    q.grad = torch.ones(3)
    reference.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"Invalid learning rate: -1\.0"),
        ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        ({"lr": math.inf}, ValueError, "Invalid learning rate: inf"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1"),
        ({"lr": torch.tensor([0.001, 0.001])}, ValueError, "Tensor lr must be 1-element"),
        ({"lr": "0.1"}, TypeError, "Invalid learning rate: '0.1'"),
        ({"lr": None}, TypeError, "Invalid learning rate: None"),
        ({"lr": True}, TypeError, "Invalid learning rate: True"),
        ({"lr": 1j}, TypeError, "Invalid learning rate"),
        ({"betas": (1.0, 0.0)}, ValueError, r"Invalid beta parameter at index 0: 1\.0"),
        ({"betas": (0.9, 1.5)}, ValueError, r"Invalid beta parameter at index 1: 1\.5"),
        ({"betas": (0.9, -0.1)}, ValueError, r"Invalid beta parameter at index 1: -0\.1"),
        ({"betas": (0.9, math.nan)}, ValueError, "Invalid beta parameter at index 1: nan"),
        ({"betas": (0.9, torch.tensor(0.99))}, ValueError, "betas must be either both floats or both Tensors"),
        ({"betas": (torch.ones(2), torch.ones(2))}, ValueError, "beta parameter at index 0.*1 element"),
        ({"betas": 0.9}, ValueError, "Invalid betas: 0.9"),
        ({"betas": (0.9,)}, ValueError, "Invalid betas"),
        ({"betas": "ab"}, ValueError, "Invalid betas"),
        ({"betas": ("a", "b")}, TypeError, "beta parameter at index 0: 'a'"),
        ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
        ({"eps": "small"}, TypeError, "Invalid epsilon value: 'small'"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
        ({"weight_decay": math.nan}, ValueError, "Invalid weight_decay value: nan"),
        ({"weight_decay": None}, TypeError, "Invalid weight_decay value: None"),
        ({"maximize": "yes"}, TypeError, "maximize"),
        ({"backend": "cuda"}, ValueError, "Invalid backend: 'cuda'.*'eager'"),
        ({"state_dtype": torch.int8}, ValueError, r"Invalid state_dtype: torch\.int8"),
        ({"state_dtype": "bfloat16"}, ValueError, "Invalid state_dtype: 'bfloat16'"),
        ({"safeguard": "yes"}, TypeError, "safeguard: 'yes'.*True or False"),
        ({"safeguard": True, "policy": POLICIES["gru"]}, ValueError, "safeguard=True needs a gated cell.*'gru'"),
        ({"policy": 3}, TypeError, "policy.*int"),
        ({"policy": None}, TypeError, "policy.*NoneType"),
        ({"policy": Policy(), "revision": "main"}, ValueError, "revision"),
        ({"policy": "default", "revision": "main"}, ValueError, "revision=.main. was given"),
        ({"policy": "no-such-policy"}, ValueError, "no-such-policy.*default"),
        ({"policy": "./no/such/folder"}, FileNotFoundError, "no/such/folder"),
        ({"foreach": True}, TypeError, "foreach"),
    ],
)
def test_a_bad_argument_is_refused_in_words(options, error, message):
    with pytest.raises(error, match=message):
        LearnedOptimizer(leaves((3,)), **{"policy": POLICIES["base"], **options})


def test_a_bad_number_is_named_before_the_parameters_are_looked_at():
    with pytest.raises(ValueError, match="Invalid weight_decay value: -1"):
        LearnedOptimizer(None, lr=1e-2, weight_decay=-1)


def test_a_folder_without_a_policy_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a learned-optim policy"):
        LearnedOptimizer(leaves((3,)), policy=tmp_path)


def test_bad_parameters_are_refused_as_torch_does():
    p, q = leaves((1, 1), (1, 1))
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        make(p)
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        make([3])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        make([p * 2])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        make([{"params": p}, {"params": p}])
    with pytest.raises(ValueError, match="all optimizer params should be with/without names"):
        make([("weight", p), q])
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        make([{"params": [p], "lr": 1e-2}, {"params": [("weight", q)]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        make([p, p])


def test_add_param_group_takes_the_defaults_for_what_is_left_out():
    p, q, r = leaves((3,), (4,), (5,))
    optimizer = make([p], lr=0.25, weight_decay=0.5)
    optimizer.add_param_group({"params": [q]})
    optimizer.add_param_group({"params": r, "lr": 0.125, "betas": None, "eps": None, "maximize": True})
    _, second, third = optimizer.param_groups
    assert (second["lr"], second["weight_decay"], second["maximize"]) == (0.25, 0.5, False)
    assert (third["lr"], third["betas"], third["eps"]) == (0.125, (0.9, 0.999), 1e-8)
    assert third["maximize"] is True
    assert second["policy"] == third["policy"] == optimizer.param_groups[0]["policy"]


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"betas": (2.0, 0.5)}, ValueError),
        ({"eps": "x"}, TypeError),
        ({"weight_decay": math.nan}, ValueError),
        ({"params": 3}, TypeError),
        ({"params": {torch.ones(2)}}, TypeError),
        ("not a dict", TypeError),
    ],
)
def test_a_bad_group_is_refused_and_nothing_has_changed(group, error):
    (p,) = leaves((3,))
    optimizer = make([p])
    before = snapshot(optimizer)
    with pytest.raises(error):
        optimizer.add_param_group({"params": leaves((4,)), **group} if isinstance(group, dict) else group)
    assert len(optimizer.param_groups) == 1
    assert snapshot(optimizer)[2] == before[2]


def test_a_group_passed_by_the_user_keeps_its_own_none():
    group = {"params": leaves((3,)), "betas": None}
    make([group])
    assert group["betas"] is None


def test_named_parameters_are_accepted_and_kept():
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_parameters_may_come_from_a_generator_or_a_set_ordered_by_dict():
    params = leaves((3,), (2, 2))
    assert make(p for p in params).param_groups[0]["params"] == params
    assert make(dict.fromkeys(params)).param_groups[0]["params"] == params


def test_a_group_cannot_have_a_policy_of_its_own():
    """Its name used to end up in checkpoints alone, which could not be loaded then."""
    p, q = leaves((3,), (2,))
    optimizer = make([p])
    with pytest.raises(ValueError, match=r"policy 'reader'.*the same for all groups"):
        optimizer.add_param_group({"params": [q], "policy": "reader"})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="the same for all groups"):
        LearnedOptimizer(LearnedOptimizer([p]).param_groups, policy="reader")
    again = LearnedOptimizer(LearnedOptimizer([p]).param_groups)
    again.load_state_dict(again.state_dict())


def test_it_leaves_no_cyclic_references():
    import gc

    (p,) = leaves((3,))
    optimizer = make([p])
    p.grad = torch.ones(3)
    optimizer.step()
    gc.collect()
    gc.disable()
    try:
        import weakref

        alive = weakref.ref(optimizer)
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


def test_constructing_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    LearnedOptimizer(leaves((3,)), policy="default")
    assert torch.equal(torch.get_rng_state(), before)


def test_warnings_are_errors_here():
    with pytest.raises(UserWarning, match="loud"):
        warnings.warn("loud", stacklevel=1)


@pytest.mark.parametrize("kind", ["name", "policy", "folder", "own words"])
def test_a_group_may_name_the_policy_that_the_optimizer_runs(kind, tmp_path):
    """As ``ZeroRedundancyOptimizer`` does; the group then holds what checkpoints hold."""
    Policy.from_pretrained("reader").save_pretrained(tmp_path / "mine")
    given = str(tmp_path / "mine") if kind == "folder" else "reader"
    optimizer = LearnedOptimizer(leaves((3,)), policy=given)
    ours = optimizer.defaults["policy"]
    asked = {"policy": optimizer.policy, "own words": ours}.get(kind, given)
    optimizer.add_param_group({"params": leaves((2,)), "policy": asked})
    assert [group["policy"] for group in optimizer.param_groups] == [ours, ours]
    with pytest.raises(ValueError, match="asks for policy 'default'"):
        optimizer.add_param_group({"params": leaves((2,)), "policy": "default"})


@pytest.mark.parametrize("option", FIXED)
def test_what_the_state_was_made_for_cannot_be_changed_later(option):
    """It would have no effect, or fail in a later step for want of state."""
    optimizer = LearnedOptimizer(leaves((3,)))
    for other in (optimizer, copy.deepcopy(optimizer)):
        before = getattr(other, option)
        with pytest.raises(AttributeError, match=f"{option} is fixed .* make a new one with {option}=True"):
            setattr(other, option, True)
        assert getattr(other, option) is before


def test_every_option_beside_the_groups_is_fixed():
    accepted, in_groups = inspect.signature(LearnedOptimizer).parameters, LearnedOptimizer(leaves((3,))).defaults
    assert {*FIXED} == {"policy", *accepted} - ({"params", "revision", "backend", *in_groups} - {"policy"})
