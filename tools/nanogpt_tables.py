"""Tables, paragraphs and picture of nanoGPT's run, for readme_tables.py: made of docs/results/nanogpt.json."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Table = dict[str, dict[str, str]]
Results = Mapping[str, Any]

OURS, OWN = "LearnedOptimizer, lr 1e-3", "AdamW, nanoGPT's own lr 1e-3"  # in nanogpt.json


def nanogpt(results: Results) -> Table:
    """Validation losses along the runs, and processor time."""
    measured = results["nanogpt"]
    return {
        name: {
            **{f"{step:,}": f"{loss:.3f}" for step, loss in zip(measured["steps"], run["losses"], strict=True)},
            "seconds": str(run["seconds"]),
        }
        for name, run in measured["runs"].items()
    }


def nanogpt_short(results: Results) -> str:
    """The same in a few lines: final losses, and when ours is as low as AdamW ends."""
    measured = results["nanogpt"]
    runs, steps = measured["runs"], measured["steps"]
    tuned = min((name for name in runs if name.startswith("AdamW")), key=lambda name: runs[name]["losses"][-1])
    ends = {name: run["losses"][-1] for name, run in runs.items()}

    def reached(target: float) -> tuple[int, str]:
        """The step, interpolated, and the seconds."""
        losses = runs[OURS]["losses"]
        i = next(i for i, loss in enumerate(losses) if loss <= target)
        before = (steps[i - 1], losses[i - 1]) if i else (0, math.inf)
        share = (losses[i] - target) / (losses[i] - before[1])
        step = steps[i] - share * (steps[i] - before[0])
        return round(step / 10) * 10, f"{step / steps[-1] * runs[OURS]['seconds']:.0f} s"

    (own_step, own_time), (tuned_step, tuned_time) = reached(ends[OWN]), reached(ends[tuned])
    return _paragraph(f"""
        [nanoGPT](https://github.com/karpathy/nanoGPT)'s CPU example, {measured["parameters"]} parameters,
        {steps[-1]:,} steps, one line swapped: validation loss **{ends[OURS]:.3f}**. AdamW ends at {ends[OWN]:.3f} with
        nanoGPT's own learning rate and at {ends[tuned]:.3f} with the best of
        {sum(name.startswith("AdamW") for name in runs)}. Ours is below the first after {own_step:,} steps ({own_time};
        AdamW took {runs[OWN]["seconds"]} s) and below the second after {tuned_step:,} ({tuned_time}; AdamW took
        {runs[tuned]["seconds"]} s). One run each, one thread, {measured["date"]}, commit {measured["commit"]}.
    """)


def nanogpt_how(results: Results) -> str:
    """When and how it was measured."""
    measured = results["nanogpt"]
    text = _paragraph(f"""
        One run each, one thread, {measured["date"]}, with `default` of commit {measured["commit"]}, which
        {measured["policy"]}. Times assume that every step takes equally long. A second run, evaluated on other
        batches, ended at {measured["again"]:.3f} instead of {measured["runs"][OURS]["losses"][-1]:.3f}: take such
        differences as chance. The command, with each optimizer:
    """)
    command = textwrap.wrap(measured["command"], width=110, subsequent_indent="    ", break_on_hyphens=False)
    return f"{text}\n```text\n{f' {chr(92)}{chr(10)}'.join(command)}\n```\n"


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), width=120, break_on_hyphens=False) + "\n"


def draw_nanogpt(results: Results, path: Path) -> None:
    """Validation loss of nanoGPT against steps and against time."""
    from matplotlib.figure import Figure

    measured = results["nanogpt"]
    runs, steps = measured["runs"], measured["steps"]
    styles = {OURS: ("#D55E00", 2.6), OWN: ("#999999", 1.8)}
    figure = Figure(figsize=(9.0, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, run in runs.items():
        if name.endswith("constant"):
            continue
        colour, width = styles.get(name, ("#0072B2" if name.endswith("3e-3") else "#000000", 1.8))
        seconds = [step / steps[-1] * run["seconds"] for step in steps]
        for axes, x in ((left, steps), (right, seconds)):
            axes.plot(x, run["losses"], color=colour, linewidth=width, marker="o", markersize=3, label=name)
    left.set(xlabel="training steps", ylabel="validation loss (lower is better)", xticks=range(0, steps[-1] + 1, 500))
    right.set(xlabel="processor seconds, one thread")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(fontsize="small", frameon=False)
    figure.suptitle(
        f"nanoGPT on Shakespeare, {measured['parameters']} parameters: one line swapped (an earlier default)",
        fontsize="medium",
    )
    figure.savefig(path, dpi=100)
