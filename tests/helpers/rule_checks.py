"""Checks of the rule that several test modules make: against its transcription, AdamW and its own bounds."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.reference import ReferenceTensor
from helpers.support import copies, give_gradients, leaves, make
from learned_optim import Policy, PolicyConfig
from learned_optim.rule import update
from learned_optim.rule.types import Hyperparameters

HYPER = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
ADAMW = Policy(PolicyConfig.adamw())
#: Of a vector, a matrix, a scalar and a convolution.
SHAPES = [(7,), (3, 5), (), (4, 2, 3, 3)]


def hyperparameters(lr, betas, eps, weight_decay):
    return Hyperparameters(lr, *betas, eps, weight_decay)


def rough_gradients(shapes, steps, generator):
    """Random tensors with zeros, outliers and a change of scale among them, so that every clamp is reached."""
    for step in range(steps):
        grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for i, g in enumerate(grads):
            flat = g.view(-1)
            if flat.numel() > 2:
                flat[0] = 0.0
                flat[1] *= 30.0
            g *= 1e-3 if step == 3 else 1.0 + i
        yield grads


def assert_follows_reference(
    policy, shapes, layout, steps=6, hyper=HYPER, sizes=None, gradients=rough_gradients, reference_policy=None
):
    """``update`` on ``layout``, which holds tensors of ``shapes``, against the transcription tensor by tensor."""
    generator = torch.Generator().manual_seed(3)
    config, weights = policy.config, {k: w.detach().double() for k, w in policy.weights().items()}
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in shapes]
    references = [ReferenceTensor(reference_policy or policy, shape) for shape in shapes]
    expected = [t.flatten().tolist() for t in tensors]
    sizes = sizes or [t.numel() for t in tensors]

    def pack(parts):
        padded = [torch.cat([x.flatten(), x.new_zeros(n - x.numel())]) for x, n in zip(parts, sizes, strict=True)]
        return torch.cat(padded)

    param = pack(tensors)
    state, tensor_state = update.initial_state(config, param, len(shapes))
    for t, grads in enumerate(gradients(shapes, steps, generator), start=1):
        param, state, tensor_state = update.update(
            weights, config, layout, param, pack(grads), state, tensor_state, t, hyperparameters(**hyper)
        )
        expected = [
            reference.step(p, g.flatten().tolist(), **hyper)
            for reference, p, g in zip(references, expected, grads, strict=True)
        ]
        for i, (piece, p) in enumerate(zip(param.split(sizes), expected, strict=True)):
            torch.testing.assert_close(piece[: len(p)], torch.tensor(p, dtype=torch.float64), rtol=1e-11, atol=1e-13)
            assert tensor_state.cosine_fast[i].item() == pytest.approx(references[i].cosine_fast, rel=1e-9, abs=1e-12)
            assert tensor_state.cosine_slow[i].item() == pytest.approx(references[i].cosine_slow, rel=1e-9, abs=1e-12)
            assert tensor_state.log_pace[i].item() == pytest.approx(references[i].pace, rel=1e-9, abs=1e-12)
    for i, reference in enumerate(references):
        values_of = [reference.m, reference.v, *zip(*reference.h, strict=True)]
        for tensor, values in zip(state.tensors, values_of, strict=True):
            piece = tensor.split(sizes)[i][: len(values)]
            torch.testing.assert_close(piece, torch.tensor(values, dtype=torch.float64), rtol=1e-11, atol=1e-13)


def assert_is_adamw(steps, dtype, learned=make, **options):
    ours = leaves(*SHAPES, dtype=dtype)
    theirs = copies(ours)
    optimizer = learned(ours, policy=ADAMW, **options)
    adamw = torch.optim.AdamW(theirs, **options)
    for step in range(steps):
        for params, opt in ((ours, optimizer), (theirs, adamw)):
            give_gradients(params, step, scale=10.0 ** (step % 5 - 2))
            opt.step()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def step_bound(policy, beta2=0.999):
    """No coordinate moves further than lr times this: |u|, |b| and |h_j| stay below 1/sqrt(1 - beta2) and a bit."""
    config = policy.config
    direction = 1.1 / math.sqrt(1.0 - beta2)
    learned = any(bool(w.any()) for w in policy.weights().values())
    factor = math.exp(config.head_bound) if learned else 1.0
    amplitude = config.amplitude_bound ** (2 if config.cell == "gru" else 1) if learned else 1.0
    mixture = config.momentum_weight + config.gradient_weight + sum(config.hidden_weights)
    return config.step_scale * factor * mixture * factor * amplitude * direction
