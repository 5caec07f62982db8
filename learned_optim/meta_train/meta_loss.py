"""What meta-training minimises, as a function of the losses along a window of the inner run.

With L_t the loss after t inner steps of a window of T (t = 1 .. T) and L_0 the one at its beginning:

    final      M = L_T
    sum        M = 1/T sum_t L_t
    log_ratio  M = 1/T sum_t log(L_t / reference)

``reference`` is a constant to back-propagation (the loss at the trajectory's very beginning): it makes values of
different tasks comparable and leaves the gradient that of the mean log-loss. Any callable of the same signature
serves as a meta-loss too.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

#: ``(losses [T], reference) -> scalar``
MetaLossFn = Callable[[Tensor, float], Tensor]

#: Losses are taken to be positive; what lies below counts as this much.
FLOOR = 1e-10


def final(losses: Tensor, reference: float) -> Tensor:
    """The last loss."""
    return losses[-1]


def mean_along(losses: Tensor, reference: float) -> Tensor:
    """The mean along the window: the article's sum, free of the window's length."""
    return losses.mean()


def log_ratio(losses: Tensor, reference: float) -> Tensor:
    """The mean log-loss, relative to a reference loss."""
    return (losses.clamp(min=FLOOR) / max(reference, FLOOR)).log().mean()


META_LOSSES: dict[str, MetaLossFn] = {"final": final, "sum": mean_along, "log_ratio": log_ratio}
