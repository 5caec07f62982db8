"""Pictures of a training run, to be understood without a text beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: More lines than these are not told apart: the others are drawn in grey.
NAMED = 6
# Told apart by those who do not see all colours too (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

History = Sequence[Mapping[str, Mapping[str, float]]]


def diagnostics(history: History, path: str | Path) -> Path:
    """Draw what :meth:`LearnedOptimizer.diagnostics` returned along a run into a PNG.

    Args:
        history: what it returned, at any steps. The parameters of the last entry are drawn; of more than six, those
            with the largest update by name and the others in grey.
        path: file to write.

    Returns:
        The file.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if isinstance(history, Mapping) or not history or not history[-1]:
        raise ValueError(
            "nothing to draw: collect opt.diagnostics() after steps, and pass the list of what it returned"
        )
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    last = history[-1]
    names = sorted(last, key=lambda name: -_comparable(last[name]["update_rms"] * last[name]["lr"]))
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 3).ravel()

    def draw(axes: Any, value: Callable[[Mapping[str, float]], float]) -> None:
        for i in reversed(range(len(names))):
            points = [(d[names[i]]["step"], value(d[names[i]])) for d in history if names[i] in d]
            named = i < NAMED
            style = {"color": _COLOURS[i], "linewidth": 1.8} if named else {"color": "0.8", "linewidth": 0.8}
            axes.plot(*zip(*points, strict=True), **style, marker="o" if len(points) < 3 else None,
                      label=names[i] if named else None)  # fmt: skip

    lines: list[tuple[str, str, Callable[[Mapping[str, float]], float], float, str]] = [
        ("Step size that the rule chose", "sum of weights, in units of lr", lambda d: d["step_size"], 1.0, "AdamW"),
        ("Update, over AdamW's at this lr", "rms over AdamW's rms (estimate)",
         lambda d: d["update_to_adamw"], 1.0, "as large as AdamW's"),
        ("Momentum over gradient", "ratio of rms (far below 1: mostly noise)",
         lambda d: d["rms_momentum"] / max(d["rms_gradient"], 1e-30), 1.0, "all gradients alike"),
        ("Gradient against previous momentum", "cosine (above 0: steps are small)",
         lambda d: d["cosine_slow"], 0.0, ""),
        ("Long average of the gradient", "rms of hidden unit 0", lambda d: d["rms_hidden_0"], 1.0,
         "the sign never changes"),
    ]  # fmt: skip
    for axes, (title, unit, value, level, meaning) in zip(panels[:5], lines, strict=True):
        draw(axes, value)
        axes.set(title=title, ylabel=unit)
        _reference(axes, level, meaning)
    _mixture(panels[5], history)
    for axes in (*panels[:3], panels[4]):
        if any(y > 0.0 for line in axes.lines for y in line.get_ydata()):  # else matplotlib warns
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))  # within a decade or so
    for axes in panels:
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = (list(reversed(some)) for some in panels[0].get_legend_handles_labels())
    if len(names) > NAMED:
        handles.append(panels[0].plot([], [], color="0.8")[0])
        labels.append(f"{len(names) - NAMED} others")
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    return Path(path)


def _reference(axes: Any, value: float, text: str) -> None:
    axes.axhline(value, color="0.4", linewidth=1, linestyle="--", zorder=0)
    axes.annotate(text, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)


def _mixture(axes: Any, history: History) -> None:
    """Shares of the directions, averaged over the parameters."""
    keys = [key for key in next(iter(history[-1].values())) if key.startswith("share_")]
    found = [d for d in history if d]
    steps = [max(figures["step"] for figures in d.values()) for d in found]
    shares = [[sum(figures[key] for figures in d.values()) / len(d) for d in found] for key in keys]
    colours = ("#0072B2", "#D55E00", "#006D4F", "#2FA57F", "#83CDB4", "#C4E8DA")
    labels = [key.removeprefix("share_").replace("_", " ") for key in keys]
    axes.stackplot(steps, shares, labels=labels, colors=colours[: len(keys)])
    axes.set(title="What updates are mixed of", ylabel="share of the weights, mean of all parameters", ylim=(0.0, 1.0))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(keys), frameon=False)


def _comparable(value: float) -> float:
    return value if math.isfinite(value) else math.inf
