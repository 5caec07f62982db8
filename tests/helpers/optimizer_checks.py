"""Checks of the optimizer that several test modules make: checkpoints, compiled steps, arithmetic, chunks."""

from __future__ import annotations

import io

import torch

from helpers.support import POLICIES, assert_same_bits, assert_same_state, copies, give_gradients, leaves, make, run
from learned_optim.engine import eager
from learned_optim.rule import update
from learned_optim.rule.layouts import Whole
from learned_optim.rule.types import Hyperparameters

#: A matrix, a vector, a scalar, a large tensor, an empty one.
SHAPES = [(4, 3), (5,), (), (40_000,), (0,)]


def through_a_file(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def assert_resumes_bit_exactly(dtype, policy="random", through=through_a_file, **options):
    """Two runs of six steps, one of them interrupted after three."""
    params = leaves(*SHAPES, dtype=dtype)
    optimizer = make(params, policy, **options)
    run(optimizer, params, 3)
    state = through(optimizer.state_dict())
    resumed_params = copies(params)
    resumed = make(resumed_params, policy, **options)
    resumed.load_state_dict(state)
    assert_same_state(resumed, optimizer)
    run(optimizer, params, 3, start=3)
    run(resumed, resumed_params, 3, start=3)
    assert_same_bits(resumed_params, params)
    assert_same_state(resumed, optimizer)


def assert_same_compiled(compile_step, policy="random", steps=12, **options):
    """A run whose step is compiled, with a learning rate that changes, against a plain one."""
    params = leaves((4, 3), (5,), (), (40_000,))
    others = copies(params)
    optimizer, plain = make(params, policy, lr=0.05, **options), make(others, policy, lr=0.05, **options)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9) for o in (optimizer, plain)]
    step = compile_step(optimizer)
    for t in range(steps):
        give_gradients(params, t)
        give_gradients(others, t)
        step()
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.state[params[0]]["step"] == steps
    assert_same_bits(params, others)
    assert_same_state(optimizer, plain)


def assert_arithmetic_is_float32(params, reference, policy, **options):
    """Low-precision parameters follow float32 ones that are rounded after every step, to the last bit."""
    optimizer, precise = make(params, policy, **options), make(reference, policy, **options)
    for step in range(5):
        give_gradients(params, step)
        for p, r in zip(params, reference, strict=True):
            r.grad = p.grad.float()
        optimizer.step()
        precise.step()
        with torch.no_grad():
            for p, r in zip(params, reference, strict=True):
                r.copy_(r.to(p.dtype))
    assert_same_bits([p.float() for p in params], reference)
    for p, r in zip(params, reference, strict=True):
        assert_same_bits(list(optimizer.state[p].values()), list(precise.state[r].values()))


def assert_chunks_leave_no_seam(policy, chunk, numel, monkeypatch, dtype=torch.float64, steps=4):
    """A tensor run in chunks equals the pure rule on the whole of it, at every coordinate."""
    monkeypatch.setattr(eager, "SMALL", 0)
    monkeypatch.setattr(eager, "CHUNK", chunk)
    policy = POLICIES[policy]
    (param,) = leaves((numel,), dtype=dtype)
    optimizer = make([param], policy, lr=0.01, weight_decay=0.1)
    whole = param.detach().clone()
    state, tensor_state = update.initial_state(policy.config, whole)
    hyper = Hyperparameters(0.01, *policy.config.betas, policy.config.eps, 0.1)
    weights = {k: w.detach() for k, w in policy.weights().items()}
    for t in range(1, steps + 1):
        give_gradients([param], t)
        whole, state, tensor_state = update.update(
            weights, policy.config, Whole((numel,)), whole, param.grad, state, tensor_state, t, hyper
        )
        optimizer.step()
        torch.testing.assert_close(param.detach(), whole, rtol=1e-11, atol=1e-13)
        for key, expected in zip(optimizer._keys.coordinate, state.tensors, strict=True):
            torch.testing.assert_close(optimizer.state[param][key], expected, rtol=1e-10, atol=1e-13)


def assert_bad_gradients_stay_apart(make_optimizer, shapes, bad):
    """Gradients that are not finite, of the tensors 2 and 6, leave other tensors alone."""
    clean, dirty = leaves(*shapes), leaves(*shapes)
    run(make_optimizer(clean), clean, 2)
    optimizer = make_optimizer(dirty)
    for step in range(2):
        give_gradients(dirty, step)
        for i in (2, 6):
            dirty[i].grad[-1] = bad
        optimizer.step()
    others = [i for i in range(len(shapes)) if i not in (2, 6)]
    assert_same_bits([dirty[i] for i in others], [clean[i] for i in others])
    assert not dirty[6].isfinite().all()
