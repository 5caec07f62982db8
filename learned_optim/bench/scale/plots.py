"""The picture of the scale suite: speedup against parameters, and the loss curves of the largest model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from learned_optim.bench.plots import bare, legend, new_figure, save
from learned_optim.bench.scale.figures import OfModel, Runs, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by those who do not see all colours too (Okabe and Ito 2008).
_RIVALS = {"AdamW": "#000000", "Muon": "#009E73", "SOAP": "#8A8D00"}
_MARKERS = "osD^vP"
_OURS = ("#D55E00", "#E69F00", "#56B4E9", "#CC79A7")


def draw(rows: Sequence[OfModel], path: Path) -> Path:
    """Draw what there is; what is missing has no point, and its model a grey mark below.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(12.0, 4.6)
    steps, time, curves = figure.subplots(1, 3)
    for axes, in_time in ((steps, False), (time, True)):
        _against_size(axes, rows, in_time=in_time)
    _curves(curves, rows)
    steps.set(title="in steps", ylabel="speedup of LearnedOptimizer")
    time.set(title="in time")
    legend(figure, steps, columns=4)
    figure.suptitle(
        "Nothing tuned against rivals tuned for each model: speedup to the same held-out loss at the end", fontsize=11
    )
    return save(figure, path)


def _against_size(axes: Axes, rows: Sequence[OfModel], *, in_time: bool) -> None:
    unfinished = False
    for line, styles in (("text", ("-", "--")), ("images", (":", "-."))):
        own = [row for row in rows if row.model.line == line]
        settings = dict.fromkeys(runs.name for row in own for runs in row.ours)  # of each policy constant, then decay
        measured = [row.model.parameters for row in own if row.results]
        if measured:
            place = {"xy": (0.85 * min(measured), 0.08), "xycoords": ("data", "axes fraction")}
            axes.annotate(line, **place, ha="left", color="0.4", fontsize=8)
        for i, setting in enumerate(settings):
            for name, colour in _RIVALS.items():
                points = []
                for row in own:
                    rival = next((r for r in row.rivals if r.name == name), None)
                    ours = next((o for o in row.ours if o.name == setting), None)
                    found = compare(ours, rival) if ours is not None and rival is not None else None
                    if found is not None:
                        factor = 1.0 / found.iteration if in_time else 1.0
                        point = row.model.parameters, found.steps * factor
                        points.append((*point, (found.deviation or 0.0) * factor))
                        if not found.is_final:
                            unfinished = True
                            axes.annotate("*", point, (4, 1), textcoords="offset points", color=colour)
                if points:
                    x, y, deviation = zip(*points, strict=True)
                    axes.errorbar(
                        x, y, yerr=deviation, color=colour, linestyle=styles[i // 2 % 2],
                        marker=_MARKERS[i % len(_MARKERS)], markersize=5, capsize=2,
                        markerfacecolor="white" if i % 2 else colour,
                        label=f"{line}: {setting}, over {name}",
                    )  # fmt: skip
    missing = [row.model.parameters for row in rows if not any(compare(o, r) for o in row.ours for r in row.rivals)]
    if missing:
        axes.plot(missing, [0.02] * len(missing), "x", color="0.6", transform=axes.get_xaxis_transform())
        axes.annotate("× not measured yet", (0.98, 0.05), xycoords="axes fraction", ha="right", color="0.5", fontsize=8)
    if unfinished:
        axes.annotate("* of which runs are missing", (0.98, 0.1), xycoords="axes fraction", ha="right", color="0.5",
                      fontsize=8)  # fmt: skip
    axes.axhline(1.0, color="0.4", linewidth=1)
    low, high = axes.get_ylim()
    axes.set(xscale="log", xlabel="parameters", ylim=(min(low, 0.6) - 0.15, max(high, 2.0)))
    axes.annotate(
        "above 1: ours is faster", (0.98, 0.96), xycoords="axes fraction", ha="right", color="0.4", fontsize=8
    )
    bare(axes)


def _curves(axes: Axes, rows: Sequence[OfModel]) -> None:
    """Held-out losses of the largest language model, or else the largest model, that ours and a rival ran on."""
    ready = [row for row in rows if any(o.results for o in row.ours) and any(r.results for r in row.rivals)]
    if not ready:
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", transform=axes.transAxes)
        return
    row = max(ready, key=lambda row: (row.model.line == "text", row.model.parameters))
    highest = 0.0
    lowest = np.inf
    for i, runs in enumerate((*row.ours, *row.rivals)):
        if not runs.results:
            continue
        at, values = runs.results[0].evaluated_at, np.stack([r.held_out for r in runs.results])
        mean = np.where(np.isfinite(values.mean(0)), values.mean(0), np.nan)
        axes.plot(at, mean, color=_RIVALS.get(runs.name) or _OURS[i % len(_OURS)], label=_label(runs))
        late = mean[len(at) // 10 :]
        highest, lowest = max(highest, np.nanmax(late)), min(lowest, np.nanmin(late))
    margin = 0.05 * (highest - lowest)
    axes.set(title=f"{row.model.name}, held-out loss", xlabel="steps", xlim=(0, row.model.steps))
    axes.set_ylim(lowest - margin, highest + margin)
    axes.legend(fontsize=8, frameon=False)
    bare(axes)


def _label(runs: Runs) -> str:
    best = runs.tuning.best if runs.tuning is not None else None
    return f"{runs.name}, lr {best.lr:g}" if best is not None else runs.name
