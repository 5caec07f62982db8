"""The recurrent cells of the update rule, and the numbers that they work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.clamps import clamp_positive
from learned_optim.coordinates import Spread
from learned_optim.policy import PolicyConfig


class Hyperparameters(NamedTuple):
    """What the user sets; numbers, or 0-d tensors where compilation must not specialise on them."""

    lr: Spread
    beta1: Spread
    beta2: Spread
    eps: Spread
    weight_decay: Spread


class StepNumbers(NamedTuple):
    """What is the same for all tensors of a group in step t; computed once, outside the elementwise work."""

    lr: Spread
    retained: Spread  #: 1 - lr weight_decay
    beta1: Spread
    beta2: Spread
    eps: Spread
    bias_correction1: Spread  #: 1 - beta1^t
    root_bias_correction2: Spread  #: sqrt(1 - beta2^t)
    gate_floor: Spread  #: 1 / t

    def for_directions(self) -> StepNumbers:
        """With which the rule returns d in place of new parameters."""
        return self._replace(lr=-1.0, retained=0.0)


def step_numbers(step: Spread, hyper: Hyperparameters) -> StepNumbers:
    """The numbers of step t >= 1."""
    lr, beta1, beta2, eps, weight_decay = hyper
    # With eps = 0 a gradient that was always zero would be 0 / 0.
    eps = eps.clamp(min=1e-20) if isinstance(eps, Tensor) else max(eps, 1e-20)
    return StepNumbers(
        lr, 1.0 - lr * weight_decay, beta1, beta2, eps, 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5, 1.0 / step
    )


class CoordinateState(NamedTuple):
    """State planes, each [n] like the parameters."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    hidden: tuple[Tensor, ...]


#: Number of the share that is orthogonalised in :class:`Coefficients`.
ORTHOGONAL = 7
#: Number of the first hidden unit's weight in :class:`Coefficients`.
FIRST_HIDDEN = 8


class Coefficients(NamedTuple):
    """A tensor's numbers for one step, spread over its coordinates."""

    momentum: Spread  #: s w_b
    gradient: Spread  #: s w_u
    disagreeing: Spread  #: 1 - kappa
    inverse_rms_b: Spread
    inverse_rms_h: Spread
    inverse_rms_u: Spread
    inverse_rms_p: Spread
    orthogonal: Spread  #: how much of a matrix's update is orthogonalised, in [0, 1]
    hidden: Sequence[Spread]  #: s w_j
    rates: Sequence[Spread]  #: rate_j(t) f(C_j . c)


def bounded_ratio(x: Tensor, bound: float) -> Tensor:
    """A smooth, odd-in-log factor between 1/bound and bound: 1 at x = 0, f(-x) = 1 / f(x). One division."""
    a = (bound - 1.0) / (bound + 1.0)
    base = x.abs().add_(1.0)
    return torch.add(base, x, alpha=a) / torch.sub(base, x, alpha=a)


def gated_cell(
    weights: Mapping[str, Tensor | list],
    config: PolicyConfig,
    coeff: Coefficients,
    x: list[Tensor],
    u: Tensor,
    b: Tensor,
    hidden: tuple[Tensor, ...],
    now: StepNumbers,
) -> tuple[list[Tensor], Tensor]:
    """A bank of gated averages of u; returns the new hidden units and the mixture times its amplitude."""
    d = add_product(coeff.momentum * b, coeff.gradient, u)
    new_hidden = []
    shifts = linear(weights["gate_features"], x)
    for h, rate, weight, shift in zip(hidden, coeff.rates, coeff.hidden, shifts, strict=True):
        z = clamp_positive(rate * bounded_ratio(shift, config.gate_bound), now.gate_floor, 1.0)
        h = torch.addcmul(h, z, u - h)
        d = add_product(d, weight, h)
        new_hidden.append(h)
    (shift,) = linear([weights["amplitude"]], x)
    return new_hidden, d * bounded_ratio(shift, config.amplitude_bound)


def gru_cell(
    weights: Mapping[str, Tensor | list],
    config: PolicyConfig,
    coeff: Coefficients,
    x: list[Tensor],
    u: Tensor,
    b: Tensor,
    hidden: tuple[Tensor, ...],
    now: StepNumbers,
) -> tuple[list[Tensor], Tensor]:
    """A GRU (Cho et al. 2014) over the features; its outputs multiply the amplitude and both directions."""
    size = config.hidden_size
    from_input = linear(weights["gru_input"], x)
    from_hidden = linear(weights["gru_hidden"], list(hidden))
    bias = weights["gru_bias"]
    new_hidden = []
    for j, h in enumerate(hidden):
        reset = torch.sigmoid(from_input[j] + from_hidden[j] + bias[j])
        z = torch.sigmoid(from_input[size + j] + from_hidden[size + j] + bias[size + j])
        candidate = torch.tanh(from_input[2 * size + j] + reset * from_hidden[2 * size + j] + bias[2 * size + j])
        new_hidden.append(h + z * (candidate - h))
    outputs = linear(weights["gru_output"], new_hidden)
    amplitude, of_b, of_u = (bounded_ratio(o, config.amplitude_bound) for o in outputs)
    return new_hidden, amplitude * (coeff.momentum * b * of_b + coeff.gradient * u * of_u)


def linear(weights: Tensor | Sequence, planes: list[Tensor]) -> list[Tensor]:
    """Rows of ``weights`` [R, I] times I planes [n] -> R planes; one product, or a chain where weights are numbers.

    In a chain, terms whose weight is zero are left out.
    """
    if isinstance(weights, Tensor) and not torch.compiler.is_compiling():
        stacked = torch.stack(planes)
        return list((weights.to(stacked.dtype) @ stacked).unbind())
    out = []
    for row in weights:
        if isinstance(row, Tensor) and not torch.compiler.is_compiling():
            stacked = torch.stack(planes)
            out.append(row.to(stacked.dtype) @ stacked)
            continue
        terms = [(w, x) for w, x in zip(row, planes, strict=True) if isinstance(w, Tensor) or w != 0.0]
        total = torch.mul(terms[0][1], terms[0][0]) if terms else torch.zeros_like(planes[0])
        for w, x in terms[1:]:
            total = add_product(total, w, x)
        out.append(total)
    return out


def add_product(total: Tensor, factor: Spread, x: Tensor) -> Tensor:
    """``total + factor * x`` in one operation; ``total`` must not be used again, it may be overwritten."""
    return torch.addcmul(total, factor, x) if isinstance(factor, Tensor) else total.add_(x, alpha=factor)
