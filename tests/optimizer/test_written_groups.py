"""What is written into a group between steps is checked as what is given to begin with, before anything changes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers.support import assert_same_bits, assert_unchanged, copies, leaves, make, run, snapshot
from learned_optim import LearnedOptimizer
from learned_optim.engine import hyperparameters as module
from learned_optim.engine.hyperparameters import hyperparameters

WRONG = [
    ("lr", "1e-3", TypeError, "learning rate: '1e-3'"),
    ("lr", True, TypeError, r"learning rate: True \(bool\)"),
    ("lr", None, TypeError, "learning rate: None"),
    ("lr", -1e-3, ValueError, "learning rate: -0.001"),
    ("lr", math.nan, ValueError, "learning rate: nan"),
    ("lr", math.inf, ValueError, "learning rate: inf"),
    ("lr", -1, ValueError, "learning rate: -1"),
    ("lr", torch.tensor([1e-3, 1e-3]), ValueError, "1-element"),
    ("lr", torch.tensor(-1e-3), ValueError, "learning rate"),
    ("lr", torch.tensor(math.nan), ValueError, "learning rate"),
    ("betas", (0.9, 1.0), ValueError, "beta parameter at index 1: 1.0"),
    ("betas", (-0.1, 0.9), ValueError, "beta parameter at index 0: -0.1"),
    ("betas", (math.nan, 0.9), ValueError, "beta parameter at index 0: nan"),
    ("betas", ("0.9", 0.999), TypeError, "beta parameter at index 0: '0.9'"),
    ("betas", (True, 0.999), TypeError, "beta parameter at index 0: True"),
    ("betas", 0.9, ValueError, "betas: 0.9"),
    ("betas", (0.9,), ValueError, "betas"),
    ("betas", None, ValueError, "betas: None"),
    ("betas", (torch.tensor(0.9), 0.999), ValueError, "both"),
    ("eps", -1e-8, ValueError, "epsilon value: -1e-08"),
    ("eps", "1e-8", TypeError, "epsilon value: '1e-8'"),
    ("eps", math.nan, ValueError, "epsilon value: nan"),
    ("weight_decay", -0.1, ValueError, "weight_decay value: -0.1"),
    ("weight_decay", True, TypeError, "weight_decay value: True"),
    ("weight_decay", math.nan, ValueError, "weight_decay value: nan"),
    ("maximize", "yes", TypeError, "maximize: 'yes'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else None)
def test_what_is_no_hyperparameter_is_refused_and_nothing_has_changed(name, value, error, message):
    params = leaves((4, 3), (5,), (2, 2))
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}])
    run(optimizer, params, 2)
    good = optimizer.param_groups[1][name]
    before = snapshot(optimizer)
    optimizer.param_groups[1][name] = value
    with pytest.raises(error, match=message) as caught:
        optimizer.step()
    assert "param_groups[1]" in str(caught.value)
    optimizer.param_groups[1][name] = good
    assert_unchanged(optimizer, before)
    if value is not None:  # which stands for the policy's own where an optimizer is made
        with pytest.raises(error, match=message):
            LearnedOptimizer(leaves((3,)), **{name: value})


#: The same numbers in other types.
EQUAL = [
    {"lr": 1, "weight_decay": 0},
    {"lr": torch.tensor(1.0), "weight_decay": torch.tensor(0.0)},
    {"lr": torch.tensor([1.0])},
    {"lr": np.float64(1.0), "betas": [np.float64(0.5), 0.75]},
    {"lr": Fraction(1), "betas": [0.5, 0.75]},
    {"betas": (torch.tensor(0.5), torch.tensor(0.75)), "eps": torch.tensor(0.25)},
    {"betas": torch.tensor([0.5, 0.75]), "maximize": 0},
]


@pytest.mark.parametrize("written", EQUAL, ids=str)
def test_numbers_of_any_type_make_the_same_step(written):
    plain = {"lr": 1.0, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.0}
    params, others = leaves((4, 3)), leaves((4, 3))
    optimizer, reference = make(params, **plain), make(others, **plain)
    optimizer.param_groups[0].update(written)
    run(optimizer, params, 2)
    run(reference, others, 2)
    assert_same_bits(params, others)


def test_plain_numbers_are_not_looked_at_closely(monkeypatch):
    monkeypatch.setattr(module, "_looked_at_closely", lambda group: pytest.fail("slow"))
    params = leaves((4, 3))
    optimizer = make(params)
    for t in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 * t
        run(optimizer, params, 1, start=t)


def test_a_tensor_is_read_once_a_step():
    class Counting(torch.Tensor):
        reads = 0

        def __float__(self):
            Counting.reads += 1
            return super().__float__()

        def detach(self):
            return self

    rate = torch.tensor(1e-3).as_subclass(Counting)
    group = {"lr": rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    assert hyperparameters(group).lr == pytest.approx(1e-3)
    assert Counting.reads == 1


def test_a_tensor_learning_rate_that_is_filled_in_place_is_followed():
    params = leaves((4, 3))
    others = copies(params)
    rate = torch.tensor(0.5)
    optimizer, reference = make(params, lr=rate), make(others, lr=0.5)
    run(optimizer, params, 1)
    run(reference, others, 1)
    rate.fill_(0.25)
    reference.param_groups[0]["lr"] = 0.25
    run(optimizer, params, 2)
    run(reference, others, 2)
    assert_same_bits(params, others)
