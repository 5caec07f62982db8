"""What the policy sees: per-coordinate features for its cell, per-tensor context for its head.

Features are even under (g, p) -> (-g, -p) and free of the gradient's scale; the update, a mixture of directions
times functions of the features, is therefore odd and scale-free as a whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.clamps import clamp_magnitude
from learned_optim.coordinates import Layout, Shapes, Spread, constant_column
from learned_optim.policy import PolicyConfig


class TensorSums(NamedTuple):
    """Sums over a tensor's coordinates, each [K]; those of a tensor's chunks (or shards) add up."""

    u_u: Tensor
    b_b: Tensor
    abs_b: Tensor
    h_h: Tensor
    p_p: Tensor
    u_r: Tensor
    r_r: Tensor


def tensor_sums(layout: Layout, u: Tensor, b: Tensor, h: Tensor, p: Tensor, r: Tensor) -> TensorSums:
    """The seven sums that the context is made of.

    Args:
        layout: of the [n] coordinates.
        u: normalised gradient g / (sqrt(v_hat) + eps), [n] like all that follow.
        b: Adam's direction m_hat / (sqrt(v_hat) + eps).
        h: the first hidden unit before this step.
        p: parameter.
        r: the previous first moment over the same denominator as u.
    """
    inner, total = layout.inner, layout.total
    return TensorSums(inner(u, u), inner(b, b), total(b.abs()), inner(h, h), inner(p, p), inner(u, r), inner(r, r))


class TensorStatistics(NamedTuple):
    """What a tensor's sums say, in float64, each [K]."""

    rms_u: Tensor
    rms_b: Tensor
    rms_h: Tensor
    rms_p: Tensor
    mean_abs_b: Tensor
    cosine: Tensor  #: between the gradient and the previous momentum, both over sqrt(v); 0 where either is zero


def statistics(layout: Shapes, sums: TensorSums) -> TensorStatistics:
    """Means and cosines from sums; float64, so that rounding does not depend on which tensors are batched."""
    means = torch.stack(sums).double() / layout.numel
    # The floor keeps the root's derivative finite at zero; it lies far below every threshold further on.
    roots = TensorSums(*means.clamp(min=1e-60).sqrt().unbind())
    u_u, _, abs_b, _, _, u_r, r_r = means.unbind()
    tiny = torch.finfo(torch.float32).tiny
    return TensorStatistics(
        rms_u=roots.u_u, rms_b=roots.b_b, rms_h=roots.h_h, rms_p=roots.p_p, mean_abs_b=abs_b,
        cosine=u_r / (u_u * r_r).clamp(min=tiny**2).sqrt(),
    )  # fmt: skip


def tensor_context(
    config: PolicyConfig, layout: Shapes, stats: TensorStatistics, cosine: Tensor, step: Spread
) -> Tensor:
    """The head's inputs.

    Args:
        config: gives centre, scale and bound of each number.
        layout: gives the numbers that depend on shapes.
        stats: of this step.
        cosine: [2, K], the fast and slow average of the cosine, this step's included.
        step: t >= 1, the number of this update.

    Returns:
        [13, K] in float64, in the order of ``config.context``.
    """
    one = torch.ones_like(layout.shape_context[:1])
    log_rms = torch.stack((stats.rms_p, stats.rms_b, stats.rms_h, stats.rms_u)).clamp(min=1e-4).log()
    sparsity = (stats.mean_abs_b.clamp(min=1e-30) / stats.rms_b).clamp(1e-3, 1.0).log()
    rows = (one, (one * step).log(), layout.shape_context, log_rms[:1], cosine, log_rms[1:], sparsity.unsqueeze(0))
    center, scale = constant_column(config.context_center, one), constant_column(config.context_scale, one)
    return ((torch.cat(rows) - center) / scale).clamp(-config.context_bound, config.context_bound)


def coordinate_features(config: PolicyConfig, n_b: Tensor, n_h: Tensor, n_u: Tensor, n_p: Tensor) -> list[Tensor]:
    """The cell's inputs, in the order of ``config.features``.

    Args:
        config: names the features and bounds the values.
        n_b: b over its rms in the tensor, [n]; likewise ``n_h`` (of h_1 before this step), ``n_u`` and ``n_p``.
    """
    bound = config.feature_bound
    n_b, n_h, n_u, n_p = (clamp_magnitude(n, bound) for n in (n_b, n_h, n_u, n_p))
    # Averages of u are odd, as b and u are, but a GRU's hidden units are even: so must be what they are multiplied by.
    by_b, by_u = (n_b.abs(), n_u.abs()) if config.cell == "gru" else (n_b, n_u)
    table = {
        "abs_b": lambda: n_b.abs(),
        "abs_h": lambda: n_h.abs(),
        "abs_u": lambda: n_u.abs(),
        "b_h": lambda: by_b * n_h,
        "u_b": lambda: n_u * n_b,
        "u_h": lambda: by_u * n_h,
        "p_b": lambda: n_p * n_b,
    }
    return [table[name]() for name in config.features]
