"""THE update rule, pure: ``(weights, params, grads, state, lr, ...) -> (params', state')``.

:class:`~learned_optim.LearnedOptimizer` runs it without gradients, meta-training unrolls it with gradients; there
is no other place where an update is computed. Per coordinate, for gradient g and parameter p at step t:

    m  = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    u  = g / (sqrt(v_hat) + eps)          b = m_hat / (sqrt(v_hat) + eps)            as in Adam, bias-corrected
    x  = |n_b|, |n_h|, |n_u|, n_b n_h, n_u n_b, n_u n_h, n_p n_b                     n: value over rms in the tensor
    k  = exp(-epsilon max(0, E . c)),  t' = 1 + k t'                                 age: steps that still count
    z_j = min(1, max(1/t', rate_j(t') f(C_j . c) f(W_j . x)))                        gates of the recurrent cell
    h_j = h_j + z_j (u - h_j)                                                        THE HIDDEN STATE
    a  = clamp(a + min(delta, gamma cos + rho S . c), -alpha, alpha) k               pace: the tensor's own state
    d  = s e^a (w_b b + w_u u + sum_j w_j h_j) f(Q . x)                              mixture times amplitude
    d  = (1 - kappa) d  where d u < 0                                                caution
    d  = orthogonalised where d is a matrix, and damped where that turns it far      see orthogonalize.py
    p' = p - lr (weight_decay + omega max(0, D . c) min(1, lr / 1e-3)) p - lr d

with rate_j(t) = k_j / (t + k_j - 1) for growing windows and constants otherwise, f the bounded ratio of
:func:`~learned_optim.rule.ops.bounded_ratio`, and s, w, kappa from the tensor head, a linear map of the tensor's
context c. The floor 1/t' makes every hidden unit a weighted mean of the gradients seen so far, none of whose weight
lies on the initial zero.

The age t' is the number of steps t until something in the context says that the problem has changed, as gradients do
that are suddenly far larger than their running mean square. Then k < 1: windows become short again, the context hears
of it, and the pace that belongs to the old problem fades.

The pace a, one number per tensor, adds up the fast cosine between gradient and momentum, and what else the context
says: steps grow while gradients keep their direction and shrink while they turn (as in hypergradient descent, Baydin et
al. 2018, "Online learning rate adaptation with hypergradient descent"). It stands still where the gradient is zero.

:func:`update` composes the passes: :func:`measure`, :func:`coefficients`, :func:`apply`, orthogonalising, :func:`move`.
The optimizer's step makes the same passes over many tensors at once (:mod:`learned_optim.engine.step`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.rule.cells import CELLS, CellInputs, Weights
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.context import TINY, ContextInputs, TensorStatistics, tensor_context
from learned_optim.rule.features import RelativeValues, coordinate_features
from learned_optim.rule.layouts import Layout, ShapedLayout, TensorShapes, WholeLayout, constant_column
from learned_optim.rule.ops import add_product, clamp_positive, per_column
from learned_optim.rule.orthogonalize import orthogonalize_all
from learned_optim.rule.safeguard import guarded
from learned_optim.rule.types import (
    Coefficients,
    CoordinateState,
    Hyperparameters,
    Spread,
    StepScalars,
    TensorState,
    TensorSums,
)


def update(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    layout: WholeLayout,
    param: Tensor,
    grad: Tensor,
    state: CoordinateState,
    tensor_state: TensorState,
    step: Spread,
    hyper: Hyperparameters,
    *,
    fixed_scale: bool = False,
) -> tuple[Tensor, CoordinateState, TensorState]:
    """One update of K tensors laid out in vectors of n coordinates.

    Args:
        weights: the policy's, by name; gradients flow to them.
        config: the policy's.
        layout: of the K tensors in the vectors.
        param: [n]; the dtype of this and of all vectors is that of the arithmetic.
        grad: [n].
        state: [n] each; zeros before the first step.
        tensor_state: [K] each; zeros before the first step.
        step: t >= 1, the number of this update.
        hyper: what the user sets.
        fixed_scale: see :func:`direction`.

    Returns:
        New parameters, state and tensor state; the inputs are left as they were.
    """
    d, coeff, state, tensor_state = direction(
        weights, config, layout, param, grad, state, tensor_state, step, hyper, fixed_scale=fixed_scale
    )
    share = config.orthogonal if tensor_state.trust is None else coeff.orthogonal
    decay = torch.as_tensor(coeff.decay)
    return orthogonalize_and_move(config, layout, param, d, step, hyper, share, decay), state, tensor_state


def direction(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    layout: ShapedLayout,
    param: Tensor,
    grad: Tensor,
    state: CoordinateState,
    tensor_state: TensorState,
    step: Spread,
    hyper: Hyperparameters,
    *,
    fixed_scale: bool = False,
) -> tuple[Tensor, Coefficients, CoordinateState, TensorState]:
    """The direction d [n] before orthogonalising; coefficients, state and tensor state.

    Args:
        fixed_scale: the rms of d over each tensor is a constant to back-propagation (its value is unchanged):
            meta-training through short windows then cannot learn step sizes, which it would choose too small.
    """
    scalars = StepScalars.at(step, hyper)
    sums = measure(layout, param, grad, state, scalars)
    coeff, tensor_state = coefficients(weights, config, layout.tensor_shapes, sums, tensor_state, step)
    spread = spread_coefficients(config, layout, coeff.stack(), param.dtype)
    d, state = apply(weights, config, spread, param, grad, state, scalars)
    if fixed_scale:
        square = layout.inner(d, d).clamp(min=1e-30)
        (ratio,) = layout.spread((square.detach() / square).sqrt().unsqueeze(0))
        d = d * ratio
    return d, coeff, state, tensor_state


def orthogonalize_and_move(
    config: PolicyConfig,
    layout: WholeLayout,
    param: Tensor,
    d: Tensor,
    step: Spread,
    hyper: Hyperparameters,
    share: Spread,
    decay: Tensor,
) -> Tensor:
    """New parameters, [n], from the direction that :func:`direction` returned.

    Args:
        share: how much of a matrix is orthogonalised, a number or [K].
        decay: of the coefficients, [K].
    """
    if config.orthogonal:
        d = orthogonalize_all(config.orthogonalization, d, layout, share)
    own: Spread = 0.0
    if config.decay_rate:
        (own,) = layout.spread(decay.to(param.dtype).unsqueeze(0))
    return move(param, d, StepScalars.at(step, hyper), own)


class Moments(NamedTuple):
    """Adam's moments, and what they make of the gradient, [n] each."""

    exp_avg: Tensor  #: new
    exp_avg_sq: Tensor
    u: Tensor  #: gradient over the denominator sqrt(v_hat) + eps
    b: Tensor  #: bias-corrected momentum over the denominator: Adam's direction
    r: Tensor  #: previous momentum over the denominator


def normalized_moments(grad: Tensor, state: CoordinateState, scalars: StepScalars) -> Moments:
    """Adam's part of the rule."""
    m = state.exp_avg + scalars.rest1 * (grad - state.exp_avg)
    v = state.exp_avg_sq * scalars.beta2 + scalars.rest2 * (grad * grad)
    # The clamp changes no value that counts; it keeps the root differentiable where there never was a gradient.
    inverse = 1.0 / (clamp_positive(v, 1e-36).sqrt() * (1.0 / scalars.root_bias_correction2) + scalars.eps)
    u, b = grad * inverse, m * (inverse * (1.0 / scalars.bias_correction1))
    return Moments(m, v, u, b, state.exp_avg * inverse)


def measure(layout: Layout, param: Tensor, grad: Tensor, state: CoordinateState, scalars: StepScalars) -> TensorSums:
    """First pass: the sums over each tensor that its context and its features are made of."""
    _, _, u, b, r = normalized_moments(grad, state, scalars)
    h = state.hidden[0]
    inner, total = layout.inner, layout.total
    return TensorSums(
        u_u=inner(u, u), b_b=inner(b, b), abs_b=total(b.abs()), h_h=inner(h, h), p_p=inner(param, param),
        u_r=inner(u, r), r_r=inner(r, r),
    )  # fmt: skip


def coefficients(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    tensor_shapes: TensorShapes,
    sums: TensorSums,
    state: TensorState,
    step: Spread,
) -> tuple[Coefficients, TensorState]:
    """Second pass, the tensor head: from a tensor's sums to its step size, mixture and gates.

    Returns:
        Coefficients, [K] each in float64, and the new tensor state in its dtype. With ``state.trust`` both have gone
        through the safeguard.
    """
    dtype = state.cosine_fast.dtype
    statistics = TensorStatistics.of(tensor_shapes, sums)
    fast, slow = config.cosine_decays
    state = TensorState(
        cosine_fast=fast * state.cosine_fast.double() + (1.0 - fast) * statistics.cosine,
        cosine_slow=slow * state.cosine_slow.double() + (1.0 - slow) * statistics.cosine,
        log_pace=state.log_pace.double(),
        age=state.age.double() + 1.0 if config.age_rate else torch.ones_like(statistics.cosine) * step,
        trust=state.trust,
    )
    context = tensor_context(config, ContextInputs.of(tensor_shapes, statistics, state))
    state = state._replace(log_pace=_paced(weights, config, context, state, sums.u_u < TINY))
    if config.age_rate:
        share = _kept_share(weights, config, context)
        state = state._replace(age=1.0 + share * (state.age - 1.0), log_pace=share * state.log_pace)
        context = tensor_context(config, ContextInputs.of(tensor_shapes, statistics, state))

    head = per_column(weights["head"], context)  # [outputs, K]
    log_factor = config.head_bound * torch.tanh(head / config.head_bound)
    scale = config.step_scale * (log_factor[:1] + state.log_pace).exp()
    base = constant_column((config.momentum_weight, config.gradient_weight, *config.hidden_weights), context)
    mixture = scale * base * torch.cat((log_factor[1:3], log_factor[4:])).exp()
    momentum, gradient, *hidden = mixture.unbind()
    odds = config.caution * log_factor[3:4].exp()
    (caution_factor,) = (1.0 - odds / (1.0 - config.caution + odds)).unbind()
    rms = (statistics.rms_b, statistics.rms_h, statistics.rms_u, statistics.rms_p)
    inverse_b, inverse_h, inverse_u, inverse_p = (1.0 / torch.stack(rms).clamp(min=1e-20)).unbind()
    coeff = Coefficients(
        momentum=momentum,
        gradient=gradient,
        caution_factor=caution_factor,
        inverse_rms_b=inverse_b,
        inverse_rms_h=inverse_h,
        inverse_rms_u=inverse_u,
        inverse_rms_p=inverse_p,
        orthogonal=torch.full_like(momentum, config.orthogonal),
        decay=_decay(weights, config, context),
        gate_floor=1.0 / state.age,
        hidden=hidden,
        rates=CELLS[config.cell].rates(weights, config, context, state.age),
    )
    coeff, state = guarded(coeff, state, tensor_shapes.numel)
    return coeff, TensorState(*(t.to(dtype) for t in state.tensors))


def _paced(
    weights: Mapping[str, Tensor], config: PolicyConfig, context: Tensor, state: TensorState, rests: Tensor
) -> Tensor:
    """The logarithm of the pace after this step, [K]; where a tensor rests, all of its gradient zero, what it was."""
    if not (config.pace_gain or config.pace_rate):
        return state.log_pace
    change = config.pace_gain * state.cosine_fast
    if config.pace_rate:
        (said,) = per_column(weights["pace"], context).unbind()
        change = change + config.pace_rate * said
    changed = (state.log_pace + change.clamp(max=config.pace_growth)).clamp(-config.pace_bound, config.pace_bound)
    return torch.where(rests, state.log_pace, changed)


def _decay(weights: Mapping[str, Tensor], config: PolicyConfig, context: Tensor) -> Tensor:
    """The weight decay that the rule itself asks for, [K], 0 or more."""
    if not config.decay_rate:
        return torch.full_like(context[0], 0.0)
    (said,) = per_column(weights["decay"], context).unbind()
    return config.decay_rate * said.clamp(min=0.0)


def _kept_share(weights: Mapping[str, Tensor], config: PolicyConfig, context: Tensor) -> Tensor:
    """The share of a tensor's age, and of the logarithm of its pace, that is left after this step, [K] in (0, 1]."""
    (said,) = per_column(weights["age"], context).unbind()
    return (-config.age_rate * said.clamp(min=0.0)).exp()


def spread_coefficients(config: PolicyConfig, layout: Layout, stacked: Tensor, dtype: torch.dtype) -> Coefficients:
    """[C, K], stacked and computed per tensor -> values to be broadcast over the coordinates, in ``dtype``."""
    return Coefficients.of_rows(layout.spread(stacked.to(dtype)), len(config.hidden_weights))


def apply(
    weights: Weights,
    config: PolicyConfig,
    coeff: Coefficients,
    param: Tensor,
    grad: Tensor,
    state: CoordinateState,
    scalars: StepScalars,
) -> tuple[Tensor, CoordinateState]:
    """Third pass: the direction d and the new state, coordinate by coordinate."""
    m, v, u, b, _ = normalized_moments(grad, state, scalars)
    cell = CELLS[config.cell]
    relative = RelativeValues.of(
        b * coeff.inverse_rms_b,
        state.hidden[0] * coeff.inverse_rms_h,
        u * coeff.inverse_rms_u,
        param * coeff.inverse_rms_p,
        config.feature_bound,
        cell.odd_hidden,
    )
    x = coordinate_features(config.features, relative)
    hidden, d = cell(weights, config, coeff, CellInputs(x, u, b, state.hidden, coeff.gate_floor))
    d = torch.where(d * u < 0.0, d * coeff.caution_factor, d)
    return d, CoordinateState(m, v, tuple(hidden))


def move(param: Tensor, d: Tensor, scalars: StepScalars, decay: Spread) -> Tensor:
    """The parameters after a step along d, with the rule's own weight decay beside the user's."""
    return add_product(param * scalars.retained_with(decay), -scalars.lr, d)


def initial_state(
    config: PolicyConfig, param: Tensor, num_tensors: int = 1, *, safeguard: bool = False
) -> tuple[CoordinateState, TensorState]:
    """State like ``param`` and a tensor state [num_tensors], all zero: what every trajectory starts from."""
    zeros = [torch.zeros_like(param) for _ in range(2 + config.hidden_size)]
    dtype = torch.promote_types(param.dtype, torch.float32)
    of_tensor = [torch.zeros(num_tensors, dtype=dtype, device=param.device) for _ in range(4 + safeguard)]
    return CoordinateState.of(zeros), TensorState(*of_tensor)
