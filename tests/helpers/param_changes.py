"""What can happen to parameters, gradients, state and groups between two steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import torch

from helpers.support import assert_same_bits, give_gradients, leaves, make

SHAPES = [(40, 40), (64, 64), (7,), (), (600, 100), (8, 4, 3, 3)]


def data_elsewhere(optimizer, params):
    for p in params:
        p.data = p.data.clone()


def data_in_other_strides(optimizer, params):
    for p in params[:2]:
        p.data = p.data.t()  # the same memory, and square
    params[5].data = params[5].data.contiguous(memory_format=torch.channels_last)


def data_of_another_dtype(optimizer, params):
    for p in params[::2]:
        grad, p.grad = p.grad, None
        p.data = p.data.double()
        p.grad = grad.double()


def state_elsewhere(optimizer, params):
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def state_data_elsewhere(optimizer, params):
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq", "hidden_0"):
            state[key].data = state[key].data.clone()


def state_changed_in_place(optimizer, params):
    for state in optimizer.state.values():
        for key, value in state.items():
            value.data.mul_(0.5) if key != "step" else value.add_(3.0)


def state_gone(optimizer, params):
    for p in params[::2]:
        optimizer.state[p] = {}


def loaded(optimizer, params):
    optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))


def no_gradients(optimizer, params):
    for p in params[1::2]:
        p.grad = None


def gradients_in_other_strides(optimizer, params):
    for p in params:
        if p.ndim == 2:
            p.grad = p.grad.t().contiguous().t()
    params[2].grad = torch.ones(1).expand(7)


def other_groups(optimizer, params):
    last = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["params"].reverse()
    optimizer.add_param_group({"params": [last], "lr": 0.25, "maximize": True})


def other_hyperparameters(optimizer, params):
    optimizer.param_groups[0].update(lr=torch.tensor(3e-2), betas=(0.5, 0.75), eps=0.1, weight_decay=0.5, maximize=True)


CHANGES = [
    data_elsewhere, data_in_other_strides, data_of_another_dtype, state_elsewhere, state_data_elsewhere,
    state_changed_in_place, state_gone, loaded, no_gradients, gradients_in_other_strides, other_groups,
    other_hyperparameters,
]  # fmt: skip


def assert_a_step_goes_by_what_is_there_now(change: Callable, **options) -> None:
    """As one does that an optimizer makes which was copied just before, and so has kept nothing."""
    params = leaves(*SHAPES)
    optimizer = make(params, lr=1e-2, **options)
    for step in range(5):
        give_gradients(params, step)
        if step in (2, 3):
            change(optimizer, params)
        fresh = copy.deepcopy(optimizer)
        mine, others = ([p for group in o.param_groups for p in group["params"]] for o in (optimizer, fresh))
        for other, p in zip(others, mine, strict=True):
            other.grad = None if p.grad is None else p.grad.clone()
        fresh.step()
        optimizer.step()
        assert_same_bits(others, mine)
        for other, p in zip(others, mine, strict=True):
            assert_same_bits(list(fresh.state[other].values()), list(optimizer.state[p].values()))
