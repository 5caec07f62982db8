"""THE update rule, pure: ``(weights, params, grads, state, lr, ...) -> (params', state')``.

:class:`~learned_optim.LearnedOptimizer` runs it without gradients, meta-training unrolls it with gradients; there
is no other place where an update is computed. Per coordinate, for gradient g and parameter p at step t:

    m  = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    u  = g / (sqrt(v_hat) + eps)          b = m_hat / (sqrt(v_hat) + eps)            as in Adam, bias-corrected
    x  = |n_b|, |n_h|, |n_u|, n_b n_h, n_u n_b, n_u n_h, n_p n_b                     n: value over rms in the tensor
    z_j = min(1, max(1/t, rate_j(t) f(C_j . c) f(W_j . x)))                          gates of the recurrent cell
    h_j = h_j + z_j (u - h_j)                                                        THE HIDDEN STATE
    a  = clamp(a + min(delta, gamma cos + rho S . c), -alpha, alpha)                 pace: the tensor's own state
    d  = s e^a (w_b b + w_u u + sum_j w_j h_j) f(Q . x)                              mixture times amplitude
    d  = (1 - kappa) d  where d u < 0                                                agreement
    d  = orthogonalised where d is a matrix, and shorter where that turns it far     see learned_optim/orthogonal.py
    p' = p - lr weight_decay p - lr d

with rate_j(t) = k_j / (t + k_j - 1) for growing windows and constants otherwise, f the bounded ratio of
:func:`~learned_optim.cells.bounded_ratio`, and s, w, kappa from the tensor head, a linear map of the tensor's context
c. The floor 1/t makes every hidden unit a weighted mean of the gradients seen so far, none of whose weight lies on the
initial zero. The pace a, one number per tensor, adds up the fast cosine between gradient and momentum, and what else
the context says: steps grow while gradients keep their direction and shrink while they turn (as in hypergradient
descent, Baydin et al. 2018, "Online learning rate adaptation with hypergradient descent").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learned_optim import orthogonal
from learned_optim.cells import (
    FIRST_HIDDEN,
    Coefficients,
    CoordinateState,
    Hyperparameters,
    StepNumbers,
    add_product,
    bounded_ratio,
    gated_cell,
    gru_cell,
    step_numbers,
)
from learned_optim.clamps import clamp_positive
from learned_optim.coordinates import Layout, Shapes, Spread, constant_column
from learned_optim.features import TensorSums, coordinate_features, statistics, tensor_context, tensor_sums
from learned_optim.policy import PolicyConfig


def directions(grad: Tensor, state: CoordinateState, now: StepNumbers) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """New moments m, v [n], and over the denominator sqrt(v_hat) + eps: gradient u, momentum b, old momentum r."""
    m = state.exp_avg + (1.0 - now.beta1) * (grad - state.exp_avg)
    v = state.exp_avg_sq * now.beta2 + (1.0 - now.beta2) * (grad * grad)
    # The clamp changes no value that counts; it keeps the root differentiable where there never was a gradient.
    inverse = 1.0 / (clamp_positive(v, 1e-36).sqrt() * (1.0 / now.root_bias_correction2) + now.eps)
    return m, v, grad * inverse, m * (inverse * (1.0 / now.bias_correction1)), state.exp_avg * inverse


def measure(layout: Layout, param: Tensor, grad: Tensor, state: CoordinateState, now: StepNumbers) -> TensorSums:
    """First pass: the sums over each tensor that its context and its features are made of."""
    _, _, u, b, r = directions(grad, state, now)
    return tensor_sums(layout, u, b, state.hidden[0], param, r)


def coefficients(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    layout: Shapes,
    sums: TensorSums,
    memory: Tensor,
    step: Spread,
) -> tuple[Tensor, Tensor]:
    """The tensor head: from a tensor's sums to its step size, mixture and gates.

    Args:
        memory: [3, K], what a tensor keeps from step to step: fast and slow average of the cosine, and its pace.

    Returns:
        [C, K] in float64, in the order of :class:`Coefficients`, and the new memory in its dtype.
    """
    stats = statistics(layout, sums)
    decay = constant_column(config.cosine_decays, stats.cosine)
    rest = constant_column(tuple([1.0 - d for d in config.cosine_decays]), stats.cosine)
    cosine = decay * memory[:2].double() + rest * stats.cosine
    context = tensor_context(config, layout, stats, cosine, step)
    pace = memory[2:].double()
    if config.pace_gain or config.pace_rate:
        change = config.pace_gain * cosine[:1]
        if config.pace_rate:
            change = change + config.pace_rate * _per_column(weights["pace"], context)
        pace = (pace + change.clamp(max=config.pace_growth)).clamp(-config.pace_bound, config.pace_bound)

    head = _per_column(weights["head"], context)  # [outputs, K]
    log_factor = config.head_bound * torch.tanh(head / config.head_bound)
    scale = config.step_scale * (log_factor[:1] + pace).exp()
    base = constant_column((config.momentum_weight, config.gradient_weight, *config.hidden_weights), context)
    mixture = scale * base * torch.cat((log_factor[1:3], log_factor[4:])).exp()
    odds = config.agreement * log_factor[3:4].exp()
    disagreeing = 1.0 - odds / (1.0 - config.agreement + odds)

    inverse = 1.0 / torch.stack((stats.rms_b, stats.rms_h, stats.rms_u, stats.rms_p)).clamp(min=1e-20)
    rows = [mixture[:2], disagreeing, inverse, torch.full_like(scale, config.orthogonal), mixture[2:]]
    if config.cell == "gated":
        growing = [k / (step + k - 1.0) for k in config.windows]
        shift = bounded_ratio(_per_column(weights["gate_context"], context), config.gate_bound)
        rows += [rate * row for rate, row in zip((*growing, *config.rates), shift.split(1), strict=True)]
    return torch.cat(rows), torch.cat((cosine, pace)).to(memory.dtype)


def _per_column(weight: Tensor, context: Tensor) -> Tensor:
    """[R, C] times [C, K] in float64; unlike those of a matrix product, a column's bits do not depend on K."""
    return (weight.double().unsqueeze(2) * context).sum(1)


def spread_coefficients(config: PolicyConfig, layout: Layout, values: Tensor, dtype: torch.dtype) -> Coefficients:
    """[C, K] as computed per tensor -> values to be broadcast over the coordinates."""
    return named_coefficients(config, layout.spread(values.to(dtype)))


def named_coefficients(config: PolicyConfig, rows: Sequence[Spread]) -> Coefficients:
    """The C rows that :func:`coefficients` returns, by name."""
    first, last = FIRST_HIDDEN, FIRST_HIDDEN + len(config.hidden_weights)
    return Coefficients(*rows[:first], hidden=rows[first:last], rates=rows[last:])  # pyright: ignore[reportCallIssue]


def apply(
    weights: Mapping[str, Tensor | list],
    config: PolicyConfig,
    coeff: Coefficients,
    param: Tensor,
    grad: Tensor,
    state: CoordinateState,
    now: StepNumbers,
    fixed_scale: Layout | None = None,
) -> tuple[Tensor, CoordinateState]:
    """Second pass: new parameters and state planes, coordinate by coordinate.

    With ``now.for_directions()`` d is returned in place of the parameters.

    With a layout as ``fixed_scale`` the rms of d over each tensor is a constant to back-propagation (its value is
    unchanged): meta-training through short windows then cannot learn step sizes, which it would choose too small.
    """
    m, v, u, b, _ = directions(grad, state, now)
    x = coordinate_features(
        config,
        b * coeff.inverse_rms_b,
        state.hidden[0] * coeff.inverse_rms_h,
        u * coeff.inverse_rms_u,
        param * coeff.inverse_rms_p,
    )
    cell = gated_cell if config.cell == "gated" else gru_cell
    hidden, d = cell(weights, config, coeff, x, u, b, state.hidden, now)
    d = torch.where(d * u < 0.0, d * coeff.disagreeing, d)
    if fixed_scale is not None:
        square = fixed_scale.inner(d, d).clamp(min=1e-30)
        (ratio,) = fixed_scale.spread((square.detach() / square).sqrt().unsqueeze(0))
        d = d * ratio
    return stepped(param, d, now), CoordinateState(m, v, tuple(hidden))


def stepped(param: Tensor, d: Tensor, now: StepNumbers) -> Tensor:
    """The parameters after a step along d."""
    return add_product(param * now.retained, -now.lr, d)


def update(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    layout: Layout,
    param: Tensor,
    grad: Tensor,
    state: CoordinateState,
    memory: Tensor,
    step: Spread,
    hyper: Hyperparameters,
    *,
    fixed_scale: bool = False,
    unfinished: bool = False,
) -> tuple[Tensor, CoordinateState, Tensor]:
    """One update of K tensors laid out in vectors of n coordinates.

    Args:
        weights: the policy's, by name; gradients flow to them.
        config: the policy's.
        layout: of the K tensors in the vectors.
        param: [n]; the dtype of this and of all vectors is that of the arithmetic.
        grad: [n].
        state: planes [n]; zeros before the first step.
        memory: [3, K], see :func:`coefficients`; zeros before the first step.
        step: t >= 1, the number of this update.
        hyper: what the user sets.
        fixed_scale: see :func:`apply`.
        unfinished: leave :func:`finish`, which needs to see whole matrices, to the caller.

    Returns:
        New parameters, state planes and memory; the inputs are left as they were.
    """
    now = step_numbers(step, hyper)
    sums = measure(layout, param, grad, state, now)
    values, memory = coefficients(weights, config, layout, sums, memory, step)
    coeff = spread_coefficients(config, layout, values, param.dtype)
    scaled = layout if fixed_scale else None
    written = now.for_directions() if config.orthogonal else now
    found, state = apply(weights, config, coeff, param, grad, state, written, fixed_scale=scaled)
    if not unfinished:
        found = finish(config, layout, param, found, step, hyper)
    return found, state, memory


def finish(
    config: PolicyConfig, layout: Layout, param: Tensor, found: Tensor, step: Spread, hyper: Hyperparameters
) -> Tensor:
    """New parameters, [n], from those before the update and what :func:`update` has found for them unfinished."""
    if not config.orthogonal:
        return found
    d = orthogonal.whole(config, found, layout.shapes, layout.sizes)
    return stepped(param, d, step_numbers(step, hyper))


def initial_state(config: PolicyConfig, param: Tensor, num_tensors: int = 1) -> tuple[CoordinateState, Tensor]:
    """State planes like ``param`` and a memory [3, K], all zero: what every trajectory starts from."""
    zeros = [torch.zeros_like(param) for _ in range(2 + config.hidden_size)]
    memory = torch.zeros(3, num_tensors, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)
    return CoordinateState(zeros[0], zeros[1], tuple(zeros[2:])), memory
