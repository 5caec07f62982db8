"""Pictures of the quality suite, to be understood without a text beside them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from learned_optim.bench.curves import Run, smoothed_curve
from learned_optim.bench.figures import Comparison, compare_all, share_at_least
from learned_optim.bench.quality import FIXED, REFERENCE, Contender, QualityResult, TaskResult
from learned_optim.policy.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by those who do not see all colours too (Okabe and Ito 2008); ours is the loudest.
_COLOURS = {REFERENCE: "#000000", FIXED: "#999999", "schedule-free AdamW, tuned": "#0072B2", "Muon, tuned": "#009E73",
            "SOAP, tuned": "#8A8D00", "SGD with momentum, tuned": "#CC79A7"}  # fmt: skip
OURS = ("#D55E00", "#E69F00", "#56B4E9", "#8B4513", "#7B3294")


def draw_all(result: QualityResult, folder: Path) -> list[Path]:
    """Draw everything into ``folder``: ``speedup.png``, ``profile.png``, ``curves.png`` and one picture per task.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    colours = _colours(result)
    files = [_speedups(result, folder), _profile(result, folder, colours), _overview(result, folder, colours)]
    for task in result.tasks:
        figure = new_figure(10.0, 4.2)
        left, right = figure.subplots(1, 2)
        _curves(left, task, colours, held_out=False)
        _curves(right, task, colours, held_out=True)
        left.set(title="training loss", xlabel="steps", ylabel="loss (lower is better)")
        right.set(title="held-out loss", xlabel="steps")
        figure.suptitle(
            f"{task.task}: each optimizer at its best setting here; mean over the seeds, band from lowest to highest",
            fontsize=10,
        )
        legend(figure, left, columns=4)
        files.append(save(figure, folder / f"{task.task.replace('/', '-')}.png"))
    return files


def _shown(result: QualityResult) -> list[Contender]:
    return [c for c in result.contenders if c.role != "ablation"]


def _colours(result: QualityResult) -> dict[str, str]:
    ours = [c.name for c in _shown(result) if c.role != "baseline"]
    return {**_COLOURS, **{name: OURS[i % len(OURS)] for i, name in enumerate(ours)}}


def _speedups(result: QualityResult, folder: Path) -> Path:
    """Bars per task, the seeds as points."""
    subject = result.subject()
    rows = sorted(compare_all(result, subject.name, REFERENCE), key=lambda c: c.speedup or 0.0)
    figure = new_figure(8.0, 1.6 + 0.34 * len(rows))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        _bar(axes, y, row)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.task for row in rows])
    axes.set_xscale("log")
    values = [row.speedup for row in rows if row.speedup is not None] or [1.0]
    axes.set_xlim(min(0.5, min(values) / 1.3), max(2.0, max(values) * 1.3))
    _ratio_ticks(axes)
    axes.set(
        title=f"{subject.name}, nothing tuned, against AdamW tuned for each task",
        xlabel="times fewer steps to AdamW's final training loss (right of the line: learned is faster)",
    )
    bare(axes)
    return save(figure, folder / "speedup.png")


def _bar(axes: Axes, y: int, row: Comparison) -> None:
    if row.speedup is None:
        axes.text(1.02, y, "AdamW diverged", va="center", color="0.4")
        return
    colour = "#D55E00" if row.speedup < 1.0 else "#0072B2"
    axes.barh(y, row.speedup - 1.0, left=1.0, height=0.6, color=colour)
    if row.log_spread is not None:
        low, high = (row.speedup * math.exp(sign * row.log_spread) for sign in (-1, 1))
        axes.plot([low, high], [y, y], color="black", linewidth=1)
    word = " diverged" if row.diverged else f" {row.speedup:.2f} "
    end = row.speedup * math.exp((row.log_spread or 0.0) * (1 if row.speedup >= 1.0 else -1))
    axes.text(end, y, word, va="center", ha="left" if row.speedup >= 1.0 else "right", fontsize=8)


def _profile(result: QualityResult, folder: Path, colours: dict[str, str]) -> Path:
    """Share of tasks with at least a speedup."""
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    x = np.geomspace(0.1, 10.0, 400)
    for c in _shown(result):
        if c.name == REFERENCE:
            continue
        speedups = [row.speedup for row in compare_all(result, c.name, REFERENCE)]
        y = [100.0 * share_at_least(speedups, value) for value in x]
        axes.plot(x, y, color=colours[c.name], linewidth=2.4 if c.role != "baseline" else 1.4, label=c.name)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.annotate("as fast as AdamW\ntuned per task", (1.0, 103.0), ha="center", va="bottom", fontsize=8,
                  annotation_clip=False)  # fmt: skip
    figure.suptitle(f"On how many of {len(result.tasks)} tasks is each optimizer how fast?", fontsize=11)
    axes.set(xscale="log", xlim=(0.1, 10.0), ylim=(0.0, 102.0), ylabel="share of tasks (%) at least that fast",
             xlabel="speedup over AdamW tuned per task, in steps (further right is faster)")  # fmt: skip
    _ratio_ticks(axes)
    bare(axes)
    legend(figure, axes, columns=2)
    return save(figure, folder / "profile.png")


def _overview(result: QualityResult, folder: Path, colours: dict[str, str]) -> Path:
    """Training loss on every task, small."""
    columns = min(4, len(result.tasks))
    rows = math.ceil(len(result.tasks) / columns)
    figure = new_figure(3.4 * columns + 0.6, 2.7 * rows + 1.2)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(result.tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(grid.flat, result.tasks, strict=False):
        _curves(axes, task, colours, held_out=False)
        axes.set_title(task.task, fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
    figure.supylabel("training loss, smoothed (lower is better)", fontsize=10)
    figure.suptitle("Training loss, each optimizer at its best setting for the task; mean over the seeds", fontsize=11)
    legend(figure, grid.flat[0], columns=4)
    return save(figure, folder / "curves.png")


def _curves(axes: Axes, task: TaskResult, colours: dict[str, str], *, held_out: bool) -> None:
    everything: list[float] = []
    starts = []
    for name, choice in task.choices.items():
        if name not in colours:
            continue
        t, values = _stack(choice.runs, held_out)
        if not len(t):
            continue
        bold = name not in _COLOURS
        axes.plot(t, _mean(values), color=colours[name], linewidth=2.0 if bold else 1.2, label=name,
                  zorder=3 if bold else 2)  # fmt: skip
        if len(values) > 1:
            axes.fill_between(t, values.min(0), values.max(0), color=colours[name], alpha=0.15, linewidth=0)
        late = values[:, len(t) // 10 :]
        everything += late[np.isfinite(late)].tolist()
        starts.append(values[0, 0])
    if not everything:
        axes.text(0.5, 0.5, "no held-out data" if held_out else "all diverged", ha="center", transform=axes.transAxes)
        return
    low, high = min(everything), min(max(everything), 1.2 * max(starts))
    if low > 0.0:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.05, high * 1.05)
        _plain_ticks(axes, low, high)
    else:
        axes.set_ylim(low, high)
    axes.set_xlim(0, task.steps)
    bare(axes)


def _stack(runs: Sequence[Run], held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(run.evaluated_at, run.held_out) if held_out else smoothed_curve(run) for run in runs]
    return pairs[0][0], np.stack([values for _, values in pairs])


def _mean(values: np.ndarray) -> np.ndarray:
    mean = values.mean(0)
    return np.where(np.isfinite(mean), mean, np.nan)


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _ratio_ticks(axes: Axes) -> None:
    low, high = axes.get_xlim()
    ticks = [x for x in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= x <= high]
    axes.set_xticks(ticks, [f"×{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)


def _plain_ticks(axes: Axes, low: float, high: float) -> None:
    """A few round numbers instead of powers of ten, of which there often is none between the limits."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    if len(ticks) < 3:
        ticks = [x for x in MaxNLocator(5).tick_values(low, high) if low <= x <= high]
    axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_yticks([], minor=True)


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Any, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
    return path
