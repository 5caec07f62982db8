"""What the tensor head sees: the context of a tensor, a few numbers once per step.

To add a number, add one entry to :data:`CONTEXT`. Every policy says by name, in its configuration, which of them its
head sees, in which order, centre and scale: saved policies do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.rule.layouts import ShapeContext, TensorShapes, constant_column
from learned_optim.rule.types import TensorState, TensorSums

#: Below this a sum or a mean of squares counts as zero: float32 rounds there, or to zero.
TINY = torch.finfo(torch.float32).tiny


class TensorStatistics(NamedTuple):
    """What a tensor's sums say, in float64, each [K]."""

    means: TensorSums  #: sums over the number of coordinates: mean squares and mean products
    rms_u: Tensor
    rms_b: Tensor
    rms_h: Tensor
    rms_p: Tensor
    cosine: Tensor  #: between the gradient and the previous momentum, both over sqrt(v); 0 where either is zero

    @classmethod
    def of(cls, tensor_shapes: TensorShapes, sums: TensorSums) -> TensorStatistics:
        """Computed in float64, so that rounding does not depend on which tensors are batched."""
        stacked = torch.stack(sums).double() / tensor_shapes.numel
        # The floor keeps the root's derivative finite at zero; it lies far below every threshold further on.
        roots = TensorSums(*stacked.clamp(min=1e-60).sqrt().unbind())
        means = TensorSums(*stacked.unbind())
        return cls(means, roots.u_u, roots.b_b, roots.h_h, roots.p_p, cosine_of(means))


def cosine_of(sums: TensorSums) -> Tensor:
    """The cosine between the gradient and the previous momentum, [K] within [-1, 1]; 0 where either is next to zero.

    In float32 the square of a momentum that has rested may underflow where its product with a gradient does not: each
    square has a floor of its own.
    """
    return (sums.u_r / (sums.u_u.clamp(min=TINY) * sums.r_r.clamp(min=TINY)).sqrt()).clamp(-1.0, 1.0)


class ContextInputs(NamedTuple):
    """What an entry of :data:`CONTEXT` may use; tensors are [K] in float64."""

    one: Tensor
    shape: ShapeContext
    statistics: TensorStatistics
    state: TensorState  #: with this step's averages of the cosine and age
    log_share: Tensor  #: of the coordinates that the sums run over: 0, but where only some rows have a gradient
    log_rms_p: Tensor
    log_rms_b: Tensor
    log_rms_h: Tensor
    log_rms_u: Tensor

    @classmethod
    def of(cls, tensor_shapes: TensorShapes, statistics: TensorStatistics, state: TensorState) -> ContextInputs:
        rms = (statistics.rms_p, statistics.rms_b, statistics.rms_h, statistics.rms_u)
        log_rms = torch.stack(rms).clamp(min=1e-4).log().unbind()
        shape = ShapeContext(*tensor_shapes.context.unbind())
        log_share = tensor_shapes.numel.log() - shape.log_numel
        return cls(torch.ones_like(shape.log_numel), shape, statistics, state, log_share, *log_rms)


class ContextFeature(NamedTuple):
    """One number of the context.

    The head sees ``(value - center) / scale``, clamped, which is to lie mostly within -1 and 1. The configuration of a
    policy keeps both; what stands here are the values that a new policy starts with.
    """

    center: float
    scale: float
    value: Callable[[ContextInputs], Tensor]  #: [K]


def _log_sparsity(c: ContextInputs) -> Tensor:
    """Mean over rms of the momentum: 0 where all coordinates count alike, very negative where few do."""
    return (c.statistics.means.abs_b.clamp(min=1e-30) / c.statistics.rms_b).clamp(1e-3, 1.0).log()


def _log_rare_rows(c: ContextInputs) -> Tensor:
    """How rare an embedding's rows are: large where there are many, and momentum lies on few of them.

    A row that one batch in hundreds touches is moved that often only, and has to move further each time. A decoder has
    as many rows, but all of them in every batch.
    """
    over_all = _log_sparsity(c) + 0.5 * c.log_share  # rows left out have no momentum
    return c.shape.log_embedding_rows * (-over_all).clamp(max=1.0)


def _log_small_embedding(c: ContextInputs) -> Tensor:
    """How far an embedding's or a head's numbers lie below 1: where they begin small, as most transformers' do, they
    have far to go before what the layers between add to them is small beside them.

    Less what ``log_rare_rows`` says already: of two reasons for larger steps the stronger one counts.
    """
    return (c.shape.is_embedding * (-c.log_rms_p).clamp(0.0, 3.0) - _log_rare_rows(c)).clamp(min=0.0)


#: Of this tensor only: a tensor's update does not depend on the tensors beside it.
CONTEXT: dict[str, ContextFeature] = {
    "bias": ContextFeature(0.0, 1.0, lambda c: c.one),
    "log_age": ContextFeature(5.0, 3.0, lambda c: c.state.age.log()),
    "log_numel": ContextFeature(7.0, 4.0, lambda c: c.shape.log_numel),
    "is_vector": ContextFeature(0.0, 1.0, lambda c: c.shape.is_vector),
    "is_convolution": ContextFeature(0.0, 1.0, lambda c: c.shape.is_convolution),
    "log_fan_ratio": ContextFeature(0.0, 2.0, lambda c: c.shape.log_fan_ratio),
    "log_rms_p": ContextFeature(-3.0, 2.0, lambda c: c.log_rms_p),
    "cosine_fast": ContextFeature(0.0, 0.5, lambda c: c.state.cosine_fast),
    "cosine_slow": ContextFeature(0.0, 0.25, lambda c: c.state.cosine_slow),
    "log_rms_b": ContextFeature(-1.5, 1.0, lambda c: c.log_rms_b),
    "log_rms_h": ContextFeature(-2.0, 1.0, lambda c: c.log_rms_h),
    "log_rms_u": ContextFeature(0.0, 1.0, lambda c: c.log_rms_u),
    "log_sparsity": ContextFeature(-0.3, 0.5, _log_sparsity),
    "log_rare_rows": ContextFeature(0.0, 1.0, _log_rare_rows),
    "log_small_embedding": ContextFeature(0.0, 1.0, _log_small_embedding),
    "is_large": ContextFeature(0.0, 1.0, lambda c: c.shape.is_large),
}

#: What the head of a new policy sees if its configuration does not say.
DEFAULT_CONTEXT = (
    "bias", "log_age", "log_numel", "is_vector", "is_convolution", "log_fan_ratio", "log_rms_p",
    "cosine_fast", "cosine_slow", "log_rms_b", "log_rms_h", "log_rms_u", "log_sparsity",
)  # fmt: skip


class ContextConfig(Protocol):
    """The part of :class:`~learned_optim.rule.config.PolicyConfig` that says what the context is."""

    @property
    def context(self) -> tuple[str, ...]: ...
    @property
    def context_center(self) -> tuple[float, ...]: ...
    @property
    def context_scale(self) -> tuple[float, ...]: ...
    @property
    def context_bound(self) -> float: ...


def tensor_context(config: ContextConfig, inputs: ContextInputs) -> Tensor:
    """The head's inputs, [number of names, K] in float64, each clamped to the bound."""
    values = torch.stack([CONTEXT[name].value(inputs) for name in config.context])
    center, scale = (constant_column(x, values) for x in (config.context_center, config.context_scale))
    return ((values - center) / scale).clamp(-config.context_bound, config.context_bound)
