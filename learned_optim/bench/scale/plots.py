"""The picture of the scale suite: speedup against parameters, and the loss curves of the largest models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from learned_optim.bench.plots import bare, legend, new_figure, save
from learned_optim.bench.scale.figures import Comparison, OfModel, Runs, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by those who do not see all colours too (Okabe and Ito 2008).
_RIVALS = {"AdamW": "#000000", "Muon": "#009E73", "SOAP": "#8A8D00"}
_OURS = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#CC79A7")
_GREY = {"color": "0.4", "fontsize": 8}


def draw(rows: Sequence[OfModel], path: Path) -> Path:
    """Draw what there is, a row for text and one for images; a model that is missing has a grey mark below.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lines = [line for line in ("text", "images") if any(row.model.line == line for row in rows)] or ["text"]
    rivals = list(dict.fromkeys(r.name for row in rows for r in row.rivals if r.results)) or ["AdamW", "Muon"]
    colours = dict(zip(dict.fromkeys(o.name for row in rows for o in row.ours), cycle(_OURS), strict=False))
    figure = new_figure(4.2 * (len(rivals) + 1), 0.9 + 3.6 * len(lines))
    grid = figure.subplots(len(lines), len(rivals) + 1, squeeze=False)
    for line, (*sizes, curves) in zip(lines, grid, strict=True):
        own = [row for row in rows if row.model.line == line]
        for rival, axes in zip(rivals, sizes, strict=True):
            _against_size(axes, own, rival, colours)
            axes.set_title(f"{line}: speedup over tuned {rival}")
        _curves(curves, own, {**colours, **_RIVALS})
    for name, colour in colours.items():
        grid[0, 0].plot([], [], "o-", color=colour, label=name)
    grid[0, 0].plot([], [], "o-", color="0.4", label="in steps")
    grid[0, 0].plot([], [], "o:", color="0.4", markerfacecolor="white", label="in time")
    legend(figure, grid[0, 0], columns=3)
    figure.suptitle("LearnedOptimizer, nothing tuned, against rivals tuned for each model")
    return save(figure, path)


def _against_size(axes: Axes, rows: Sequence[OfModel], rival: str, colours: Mapping[str, str]) -> None:
    """Speedups over one rival, to the same held-out loss, against the number of parameters."""
    found: dict[int, dict[str, Comparison]] = {}
    for row in rows:
        its = next((r for r in row.rivals if r.name == rival), None)
        of_model = {ours.name: compare(ours, its) for ours in row.ours} if its is not None else {}
        found[row.model.parameters] = {name: c for name, c in of_model.items() if c is not None}
    missing = [size for size, of_model in found.items() if not of_model]
    unfinished = any(not c.is_final for of_model in found.values() for c in of_model.values())
    for i, (name, colour) in enumerate(colours.items()):
        apart = 1.06 ** (i - (len(colours) - 1) / 2)  # of one size, side by side
        mine = {apart * size: of_model[name] for size, of_model in found.items() if name in of_model}
        for in_time in (False, True):
            axes.errorbar(
                list(mine), [c.time if in_time else c.steps for c in mine.values()],
                yerr=None if in_time else [c.deviation or 0.0 for c in mine.values()], color=colour, capsize=2,
                marker="o", markersize=5, linestyle=":" if in_time else "-",
                markerfacecolor="white" if in_time else colour,
            )  # fmt: skip
        for size, comparison in mine.items():
            if not comparison.is_final:
                axes.annotate("*", (size, comparison.steps), (4, 1), textcoords="offset points", color=colour)
    axes.plot(missing, [0.03] * len(missing), "x", color="0.6", transform=axes.get_xaxis_transform())
    if missing:
        axes.annotate("× not measured yet", (0.98, 0.06), xycoords="axes fraction", ha="right", **_GREY)
    if unfinished:
        axes.annotate("* preliminary", (0.98, 0.12), xycoords="axes fraction", ha="right", **_GREY)
    axes.axhline(1.0, color="0.4", linewidth=1)
    axes.annotate("faster ↑", (0.98, 1.0), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", **_GREY)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="parameters")
    low, high = axes.get_ylim()
    low, high = min(low, 0.35), max(high, 4.0)
    ticks = [y for y in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 30, 100) if low <= y <= high]
    axes.set_yticks(ticks, [f"{y:g}" for y in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)
    bare(axes)


def _curves(axes: Axes, rows: Sequence[OfModel], colours: Mapping[str, str]) -> None:
    """Held-out losses of the largest model that ours and a rival ran on."""
    ready = [row for row in rows if any(o.results for o in row.ours) and any(r.results for r in row.rivals)]
    if not ready:
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", transform=axes.transAxes)
        return
    row = max(ready, key=lambda row: row.model.parameters)
    highest, lowest = 0.0, np.inf
    for runs in (*row.rivals, *row.ours):
        if not runs.results:
            continue
        at, values = runs.results[0].evaluated_at, np.stack([r.held_out for r in runs.results])
        mean = np.where(np.isfinite(values.mean(0)), values.mean(0), np.nan)
        is_rival = runs in row.rivals
        axes.plot(at, mean, color=colours[runs.name], label=_label(runs) if is_rival else None)
        late = mean[len(at) // 10 :]
        highest, lowest = max(highest, np.nanmax(late)), min(lowest, np.nanmin(late))
    axes.set(title=f"{row.model.name}: held-out loss", xlabel="steps", xlim=(0, row.model.steps))
    if highest > 20.0 * lowest > 0.0:
        axes.set(yscale="log", ylim=(lowest / 1.2, highest * 1.2))
    else:
        margin = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - margin, highest + margin)
    axes.legend(fontsize=8, frameon=False)
    bare(axes)


def _label(runs: Runs) -> str:
    best = runs.tuning.best if runs.tuning is not None else None
    return f"{runs.name}, lr {best.lr:g}" if best is not None else runs.name
