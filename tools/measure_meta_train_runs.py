"""What good and bad runs of meta-training look like, for docs/train_your_own.md.

    python tools/measure_meta_train_runs.py docs/results/meta_train_runs.json     # and docs/meta_train_runs.png

``default`` is fine-tuned on the task of examples/meta_train_own_task.py: with the default settings, with large and with
far too large steps of the meta-optimizer, and by back-propagation through windows of ten inner steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from meta_train_own_task import INNER_LR, Spirals  # pyright: ignore[reportMissingImports]

from learned_optim.meta_train import MetaTrainConfig, meta_train

RUNS: dict[str, dict[str, Any]] = {
    "default settings": {},
    "`meta_lr=0.5`": {"meta_lr": 0.5},
    "`meta_lr=3`": {"meta_lr": 3.0},
    '`"backprop"`, windows of 10 steps': {"estimator": "backprop", "unroll_length": 10, "meta_loss": "sum"},
}


def measure(outer_steps: int) -> dict[str, Any]:
    """Validation along each run, mean log of the time over that of the start, and a table of the last ones."""
    torch.set_num_threads(1)
    runs: dict[str, Any] = {}
    for name, settings in RUNS.items():
        config = MetaTrainConfig(
            outer_steps=outer_steps, start="default", inner_lr=INNER_LR, max_length=0, validation_length=0,
            validation_seeds=8, validate_every=5, **settings,
        )  # fmt: skip
        history = meta_train(config, tasks=[Spirals()], show_progress=False).history
        validated = {m["outer_step"] + 1: m["validation"] for m in history if m.get("validation") is not None}
        runs[name] = {"settings": settings, "validation": validated, "seconds": history[-1]["seconds"]}
        print(name, validated)
    steps = list(next(iter(runs.values()))["validation"])
    shown = [steps[i] for i in (len(steps) // 4 - 1, len(steps) // 2 - 1, len(steps) - 1)]
    table = {
        name: {
            **{f"after {step} outer steps": f"{math.exp(run['validation'][step]):.2f}" for step in shown},
            "seconds": f"{run['seconds']:.0f}",
        }
        for name, run in runs.items()
    }
    return {"torch": torch.__version__, "runs": runs, "table": table}


def draw(measured: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="0.6", linewidth=1, linestyle="--", label="the policy it started from")
    for (name, run), colour in zip(measured["runs"].items(), ("#0072B2", "#56B4E9", "#D55E00", "#009E73"), strict=True):
        x = [0, *map(int, run["validation"])]
        label = name.replace("`", "")
        y = [1.0, *map(math.exp, run["validation"].values())]
        axes.plot(x, y, marker="o", markersize=3, color=colour, label=label)
    axes.set(xlabel="outer step", ylabel="time against the start\n(lower is better)", ylim=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--outer-steps", type=int, default=40)
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw again what is in the file")
    arguments = parser.parse_args()
    if not arguments.draw:
        measured = measure(arguments.outer_steps)
        arguments.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    measured = json.loads(arguments.out.read_text(encoding="utf-8"))
    draw(measured, arguments.out.parents[1] / "meta_train_runs.png")


if __name__ == "__main__":
    main()
