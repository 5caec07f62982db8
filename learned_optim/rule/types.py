"""What passes between the parts of the update rule, by name. K is a number of tensors, n of coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: A per-tensor value at a coordinate: a number, a 0-d tensor, or a vector with one entry per coordinate.
Spread = float | Tensor


class Hyperparameters(NamedTuple):
    """What the user sets; numbers, or 0-d tensors where compilation must not specialise on them."""

    lr: Spread
    beta1: Spread
    beta2: Spread
    eps: Spread
    weight_decay: Spread


#: The learning rate below which the rule's own weight decay falls with its square. Fine-tuning, at a tenth of it and
#: less, is to keep what was learned before: by how much noise moves parameters falls with the square, too.
FULL_DECAY_LR = 1e-3


class StepScalars(NamedTuple):
    """What all tensors of a group share in step t; computed once, outside the elementwise work."""

    lr: Spread
    retained: Spread  #: 1 - lr weight_decay
    decay_lr: Spread  #: lr min(1, lr / FULL_DECAY_LR): what the rule's own decay is multiplied by
    beta2: Spread
    rest1: Spread  #: 1 - beta1, not from a rounded beta1
    rest2: Spread  #: 1 - beta2
    eps: Spread
    bias_correction1: Spread  #: 1 - beta1^t
    root_bias_correction2: Spread  #: sqrt(1 - beta2^t)

    @classmethod
    def at(cls, step: Spread, hyper: Hyperparameters) -> StepScalars:
        """Those of step t >= 1."""
        lr, beta1, beta2, eps, weight_decay = hyper
        # With eps = 0 a gradient that was always zero would be 0 / 0.
        eps = eps.clamp(min=1e-20) if isinstance(eps, Tensor) else max(eps, 1e-20)
        share = lr / FULL_DECAY_LR
        share = share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)
        return cls(
            lr=lr, retained=1.0 - lr * weight_decay, decay_lr=lr * share, beta2=beta2, rest1=1.0 - beta1,
            rest2=1.0 - beta2, eps=eps, bias_correction1=1.0 - beta1**step,
            root_bias_correction2=(1.0 - beta2**step) ** 0.5,
        )  # fmt: skip

    def retained_with(self, decay: Spread) -> Spread:
        """``retained``, less what the rule's own decay takes."""
        return self.retained - self.decay_lr * decay


class CoordinateState(NamedTuple):
    """What every coordinate keeps from step to step, each [n] like the parameters."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    hidden: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order in which kernels and checkpoints take them."""
        return (self.exp_avg, self.exp_avg_sq, *self.hidden)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> CoordinateState:
        """The inverse of :attr:`tensors`."""
        exp_avg, exp_avg_sq, *hidden = tensors
        return cls(exp_avg, exp_avg_sq, tuple(hidden))


class TensorState(NamedTuple):
    """What every tensor keeps from step to step, each [K]; zeros before the first step."""

    cosine_fast: Tensor  #: running averages of the cosine between gradient and momentum
    cosine_slow: Tensor
    log_pace: Tensor  #: the factor of its step size that has built up in the course of training
    age: Tensor  #: the steps that windows and context count: falls where the problem seems to have changed
    trust: Tensor | None = None  #: with a safeguard only: between 0 (AdamW's step) and 1 (the rule's)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there, in order."""
        return tuple(t for t in self if t is not None)


class TensorSums(NamedTuple):
    """Sums over a tensor's coordinates, each [K]; those of a tensor's chunks (or shards) add up.

    u: normalised gradient, b: Adam's direction, h: first hidden unit before the step, p: parameter, r: first moment
    before the step over the same denominator as u.
    """

    u_u: Tensor
    b_b: Tensor
    abs_b: Tensor
    h_h: Tensor
    p_p: Tensor
    u_r: Tensor
    r_r: Tensor


class Coefficients(NamedTuple):
    """What the tensor head says about a tensor for one step: [K] each, or spread over coordinates."""

    momentum: Spread  #: s w_b
    gradient: Spread  #: s w_u
    caution_factor: Spread  #: 1 - kappa, of coordinates that would move against their present gradient
    inverse_rms_b: Spread
    inverse_rms_h: Spread
    inverse_rms_u: Spread
    inverse_rms_p: Spread
    orthogonal: Spread  #: how much of a matrix's update is orthogonalised, in [0, 1]
    decay: Spread  #: weight decay beside the user's, in the same unit
    gate_floor: Spread  #: 1 / age
    hidden: Sequence[Spread]  #: s w_j
    rates: Sequence[Spread]  #: rate_j(age) f(C_j . c)

    def stack(self) -> Tensor:
        """[C, K]; :meth:`of_rows` reads it."""
        *single, hidden, rates = self
        return torch.stack([*single, *hidden, *rates])  # pyright: ignore[reportArgumentType]

    @classmethod
    def of_rows(cls, rows: Sequence[Spread], hidden: int) -> Coefficients:
        """The C rows of :meth:`stack` by name.

        Args:
            rows: what is to be named.
            hidden: how many weights of hidden units there are.
        """
        single = len(cls._fields) - 2
        return cls(*rows[:single], hidden=rows[single : single + hidden], rates=rows[single + hidden :])  # pyright: ignore[reportCallIssue]

    @classmethod
    def count(cls, hidden: int, rates: int) -> int:
        """C, for so many weights and rates of hidden units."""
        return len(cls._fields) - 2 + hidden + rates
