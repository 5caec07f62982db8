"""The picture of the habits suite, to be understood without a text beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from learned_optim.bench.habits_report import COSINE, TEN_TIMES, Row, number, sections
from learned_optim.bench.plots import OURS, bare, legend, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ADAMW = {"AdamW, tuned": "#000000", "AdamW, same lr": "#999999"}


def draw_habits(values: Mapping[str, Any], path: Path) -> Path:
    """Six panels, one for each habit, with what would be right in its title.

    Raises:
        ImportError: matplotlib is not installed.
    """
    values = together(values)
    figures = values["figures"]
    names = list(values["policies"])
    colours = {**{name: OURS[i % len(OURS)] for i, name in enumerate(names)}, **_ADAMW}
    figure = new_figure(13.0, 8.0)
    axes = figure.subplots(2, 3)
    by_title = [dict(section.rows) for section in sections(values)]
    _noise(axes[0, 0], figures["noise"], colours)
    _changes(axes[0, 1], figures["changes"], colours)
    _good_start(axes[0, 2], figures["good start"], colours, values["lr"])
    flips, rates = by_title[3], by_title[4]
    matrix = next(row for label, row in flips.items() if "matrix" in label and "start" in label)
    _bars(axes[1, 0], matrix, colours)
    axes[1, 0].set(title="Gradients that turn their sign at every step\nshould move a matrix nowhere",
                   xlabel="distance from the start at the end, in learning rates")  # fmt: skip
    _bars(axes[1, 1], rates[TEN_TIMES], colours, line=1.0)
    axes[1, 1].set(title="A learning rate ten times as large\nshould cost little",
                   xlabel="final error over that at the original rate")  # fmt: skip
    _bars(axes[1, 2], rates[COSINE], colours, line=1.0)
    axes[1, 2].set(title="A cosine schedule\nshould lower the error",
                   xlabel="final error over that at a constant rate\n(left of the line: the cosine helps)")  # fmt: skip
    for one in axes.flat:
        bare(one)
        one.title.set_fontsize(10)
    seeds = len(values["seeds"])
    figure.suptitle(
        f"Habits of update rules at lr {values['lr']:g}, nothing tuned but 'AdamW, tuned': means of {seeds} "
        f"seed{'s' * (seeds > 1)}; lower is better in every panel", fontsize=12,
    )  # fmt: skip
    legend(figure, axes[0, 1], columns=len(colours))
    return save(figure, path)


def together(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with policies of equal figures under one name: one curve would hide the other."""
    figures: Mapping[str, Mapping[str, Row]] = values["figures"]
    alike: list[list[str]] = []
    for name in values["policies"]:
        same = (group for group in alike if all(rows[name] == rows[group[0]] for rows in figures.values()))
        if (group := next(same, None)) is None:
            alike.append([name])
        else:
            group.append(name)
    joined = {group[0]: ", ".join(group) for group in alike}
    left_out = {name for group in alike for name in group[1:]}
    merged = {
        measurement: {joined.get(name, name): row for name, row in rows.items() if name not in left_out}
        for measurement, rows in figures.items()
    }
    policies = {joined[name]: fingerprint for name, fingerprint in values["policies"].items() if name in joined}
    return {**values, "figures": merged, "policies": policies}


def _noise(axes: Axes, figures: Mapping[str, Row], colours: Mapping[str, str]) -> None:
    for name, row in figures.items():
        steps = [int(match[1]) for key in row if (match := re.fullmatch(r"matrix, step (\d+)", key))]
        axes.plot(steps, [_mean(row[f"matrix, step {t}"]) for t in steps], color=colours[name], linewidth=2)
    axes.set(xscale="log", yscale="log", title="On pure noise,\nthe steps of a matrix should not grow",
             xlabel="steps", ylabel="size of a step, in learning rates")  # fmt: skip
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    _plain(axes.yaxis)
    axes.grid(alpha=0.3)


def _changes(axes: Axes, figures: Mapping[str, Row], colours: Mapping[str, str]) -> None:
    for name, row in figures.items():
        for prefix, style in (("", "-"), ("made anew, ", ":")):
            keys = [key for key in row if key.startswith(f"{prefix}change ")]
            means = [_mean(row[key]) for key in keys]
            axes.plot(range(1, len(keys) + 1), means, style, color=colours[name], linewidth=2, marker="o", markersize=4,
                      label=None if prefix else name)  # fmt: skip
    axes.set(yscale="log", title="After each change of target, an optimizer (solid)\nshould do as well as one "
             "made anew (dotted)", xlabel="change", ylabel="mean loss just after it")  # fmt: skip
    axes.set_xticks(range(1, sum(key.startswith("change ") for key in next(iter(figures.values()))) + 1))
    _plain(axes.yaxis)
    axes.grid(alpha=0.3)


def _good_start(axes: Axes, figures: Mapping[str, Row], colours: Mapping[str, str], lr: float) -> None:
    for name, row in figures.items():
        rates = [float(key.removeprefix("lr ")) for key in row]
        axes.plot(rates, [_mean(values) for values in row.values()], color=colours[name], linewidth=2, marker="o",
                  markersize=4)  # fmt: skip
    axes.set(xscale="log", yscale="log", title="Started at the solution, with noisy labels,\na rule should stay there",
             xlabel="learning rate", ylabel="error beyond the solution's")  # fmt: skip
    axes.set_xticks([lr / 30, lr / 10, lr], [f"{lr:g} / 30", f"{lr:g} / 10", f"{lr:g}"])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


def _bars(axes: Axes, row: Row, colours: Mapping[str, str], line: float | None = None) -> None:
    names = list(row)[::-1]
    means = [_mean(row[name]) for name in names]
    known = [value for value in means if math.isfinite(value)] or [1.0]
    axes.set_xscale("log")
    low, high = min(*known, line or min(known)), max(*known, line or max(known))
    start = line or 10**-0.3 * low
    axes.set_xlim(min(start, low) / 1.3, high * 2.5)
    for y, (name, value) in enumerate(zip(names, means, strict=True)):
        end = value if math.isfinite(value) else start
        axes.barh(y, end - start, left=start, color=colours[name], height=0.6)
        text = f" {number(value)}" if math.isfinite(value) else " diverged"
        axes.text(max(end, start), y, text, va="center", ha="left", fontsize=8)
    if line is not None:
        axes.axvline(line, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    _plain(axes.xaxis)


def _mean(row: list[float | None]) -> float:
    """NaN where a run diverged, which is not drawn."""
    return fmean(math.nan if value is None else value for value in row)


def _plain(axis: Any) -> None:
    """Numbers instead of powers of ten: 1, 2, 5 and so on where there is room, else decades."""
    low, high = sorted(axis.get_view_interval())
    fine = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ticks = fine if len(fine) <= 8 else fine[next(i for i, x in enumerate(fine) if _leading(x) == "1") :: 3]
    axis.set_ticks(ticks, [f"{x:g}" if x < 1e4 else f"{x:,.0f}" for x in ticks])
    axis.set_ticks([], minor=True)


def _leading(x: float) -> str:
    return f"{x:e}"[0]
