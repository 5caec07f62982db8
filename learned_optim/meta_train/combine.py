"""From the meta-batch's estimates to one meta-gradient that no single task can spoil."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learned_optim.meta_train.estimators import Estimate


class Combiner:
    """Averages estimates; drops non-finite ones, evens out families, and clips what explodes.

    Args:
        clip: bound of an estimate's rms, as a multiple of the median over the last ``window`` estimates.
        by_family: divide each estimate by its family's running rms first: where meta-losses are plain losses,
            families of large gradients would drown the others.
        window: estimates that the median is taken over.
    """

    def __init__(self, clip: float, by_family: bool, window: int = 100) -> None:
        self.clip, self.by_family, self.window = clip, by_family, window
        self.recent: list[float] = []
        self.families: dict[str, float] = {}
        self.dropped = 0  #: estimates that were not finite, so far
        self.clipped = 0

    def __call__(self, estimates: Sequence[Estimate], learned: Sequence[str]) -> dict[str, Tensor]:
        """The meta-gradient by name. A weight that no estimate speaks of gets zeros."""
        kept: list[dict[str, Tensor]] = []
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
            self.recent = [*self.recent[1 - self.window :], size]
            kept.append({name: g * scale for name, g in estimate.gradient.items()})
        total: dict[str, Tensor] = {}
        for name in learned:
            parts = [g[name] for g in kept if name in g]
            if parts:
                total[name] = torch.stack(parts).sum(0) / len(kept)
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
