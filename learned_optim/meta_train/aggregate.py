"""From the meta-batch's estimates to one meta-gradient that no single task can spoil."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learned_optim.meta_train.estimators import Estimate, Weights

#: Estimates whose median rms says which ones explode.
WINDOW = 100


class GradientAggregator:
    """Averages estimates; drops non-finite ones, evens out families, and clips what explodes.

    Means of several kinds of estimates are mixed by inverse variance, once there are two of each.

    Args:
        clip: bound of an estimate's rms, as a multiple of the median over the last ``WINDOW`` estimates.
        by_family: divide each estimate by its family's running rms first: where meta-losses are plain losses,
            families of large gradients would drown the others.
    """

    def __init__(self, clip: float, by_family: bool) -> None:
        self.clip, self.by_family = clip, by_family
        self.recent: list[float] = []
        self.families: dict[str, float] = {}
        self.dropped = 0  #: estimates that were not finite, so far
        self.clipped = 0

    def __call__(self, estimates: Sequence[Estimate], learned: Sequence[str]) -> dict[str, Tensor]:
        """The meta-gradient by name. A weight that no estimate speaks of gets zeros."""
        by_kind: dict[str, list[Weights]] = {}
        for estimate in estimates:
            rms = _rms(estimate.gradient)
            if not bool(torch.isfinite(rms)):
                self.dropped += 1
                continue
            size = float(rms)
            if self.by_family:
                mean = self.families.get(estimate.family)
                self.families[estimate.family] = size if mean is None else 0.9 * mean + 0.1 * size
                scale = 1.0 / max(self.families[estimate.family], 1e-20)
                size *= scale
            else:
                scale = 1.0
            if self.recent and size > self.clip * statistics.median(self.recent) > 0.0:
                bound = self.clip * statistics.median(self.recent)
                scale, size = scale * bound / size, bound
                self.clipped += 1
            self.recent = [*self.recent[1 - WINDOW :], size]
            by_kind.setdefault(estimate.kind, []).append({name: g * scale for name, g in estimate.gradient.items()})
        groups = list(by_kind.values())
        if len(groups) > 1 and all(len(group) > 1 for group in groups):
            return combine_by_inverse_variance(groups)
        everything = [gradient for group in groups for gradient in group]
        total: Weights = {}
        for name in learned:
            parts = [g[name] for g in everything if name in g]
            if parts:
                total[name] = torch.stack(parts).sum(0) / len(everything)
        return total

    def state(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "families": dict(self.families), "dropped": self.dropped,
                "clipped": self.clipped}  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.recent, self.families = list(state["recent"]), dict(state["families"])
        self.dropped, self.clipped = state["dropped"], state["clipped"]


def _rms(gradient: dict[str, Tensor]) -> Tensor:
    flat = torch.cat([g.reshape(-1) for g in gradient.values()])
    return flat.double().square().mean().sqrt()


def combine_by_inverse_variance(groups: Sequence[Sequence[Weights]]) -> Weights:
    """Mix several estimators' gradients, coordinate by coordinate, by the inverse variance of their means.

    Args:
        groups: for each estimator, its gradients over the meta-batch (at least two, to have a variance).

    Returns:
        The mixture, by meta-parameter (Metz et al. 2019, "Understanding and correcting pathologies ...").
    """
    if any(len(group) < 2 for group in groups):
        raise ValueError("mixing by inverse variance needs at least two estimates of each estimator")
    mixed: Weights = {}
    for name in groups[0][0]:
        stacks = [torch.stack([gradient[name] for gradient in group]) for group in groups]
        precisions = [len(s) / s.var(0).clamp(min=1e-20) for s in stacks]
        total = torch.stack(precisions).sum(0)
        means = torch.stack([s.mean(0) * p for s, p in zip(stacks, precisions, strict=True)])
        mixed[name] = means.sum(0) / total
    return mixed
