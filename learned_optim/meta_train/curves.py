"""The picture of a meta-training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(metrics: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw meta-loss, validation and gradient norm against outer steps into a PNG.

    Args:
        metrics: a dict per outer step, as in ``metrics.jsonl``.
        out: file to write.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not metrics:
        raise ValueError("the run has made no outer step yet: nothing to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    steps = [m["outer_step"] for m in metrics]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(steps, [m["meta_loss"] for m in metrics], color="0.8", linewidth=1, label="each outer step")
    left.plot(steps, _running_mean([m["meta_loss"] for m in metrics], 20), color="C0", label="mean of the last 20")
    left.set(title="Meta-loss on the training tasks", xlabel="outer step", ylabel="meta-loss\n(lower is better)")
    left.legend(frameon=False)
    validated = [(m["outer_step"] + 1, math.exp(m["validation"])) for m in metrics if m.get("validation") is not None]
    middle.axhline(1.0, color="0.6", linewidth=1, linestyle="--", label="the policy it started from")
    if validated:
        middle.plot(*zip(*validated, strict=True), marker="o", markersize=3, color="C1", label="this run")
    middle.set(
        title="Validation tasks",
        xlabel="outer step",
        ylabel="time against the start's\n(0.9: a tenth fewer steps)",
    )
    middle.legend(frameon=False)
    right.plot(steps, [m["gradient_norm"] for m in metrics], color="C2", linewidth=1)
    right.set(title="Meta-gradient", xlabel="outer step", ylabel="norm", yscale="log")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    means = []
    for i in range(len(values)):
        window = values[max(0, i + 1 - width) : i + 1]
        means.append(sum(window) / len(window))
    return means
