"""Which learning rate fine-tuning wants: held-out losses of 30 tasks, ``default`` and AdamW at several rates.

    python tools/measure_fine_tuning.py docs/results/fine_tuning.json

Ten tasks each of the zoo's training families ``finetune_images``, ``finetune_text`` and ``finetune_tables``, at their
own lengths; the weights of ``default`` were not trained on them. Held-out losses are over the lowest that AdamW reaches
at the best of its rates for that very task, and so is the speedup, in training loss
(``learned_optim/meta_train/time_ratio.py``).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learned_optim import LearnedOptimizer
from learned_optim.meta_train.time_ratio import Outcome, compare, held_out_steps
from learned_optim.tasks import FAMILIES
from learned_optim.tasks.rollout import Curve, train

TASKS = [(name, seed) for name in ("finetune_images", "finetune_text", "finetune_tables") for seed in range(100, 110)]
RATES = {"AdamW": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "`default`": (3e-5, 1e-4, 3e-4, 1e-3)}
MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {"AdamW": torch.optim.AdamW, "`default`": LearnedOptimizer}


def measure(name: str, seed: int) -> dict[str, Any]:
    """One task: by optimizer and rate lowest and last held-out loss over AdamW's lowest, and the log-speedup."""
    task = FAMILIES[name].task(seed)
    curves: dict[tuple[str, float], Curve] = {
        (which, lr): train(
            task, seed, lambda params, which=which, lr=lr: MAKE[which](params, lr=lr), task.length,
            evaluate_at=held_out_steps(task.length),
        )
        for which, rates in RATES.items() for lr in rates
    }  # fmt: skip
    lowest = {key: min(curve.held_out_along) for key, curve in curves.items()}
    best = min((key for key in lowest if key[0] == "AdamW"), key=lowest.__getitem__)
    reference = Outcome.of(curves[best].losses, curves[best].held_out_along)
    return {
        "task": f"{name}/{seed}",
        "runs": [
            {"optimizer": which, "lr": lr, "lowest": lowest[which, lr] / lowest[best],
             "end": curve.held_out_along[-1] / lowest[best],
             "log_speedup": -compare(Outcome.of(curve.losses, curve.held_out_along), reference)}
            for (which, lr), curve in curves.items()
        ],
    }  # fmt: skip


def table(measured: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """For docs/fine_tuning.md."""
    columns: dict[str, dict[str, str]] = {}
    for which, rates in RATES.items():
        for lr in rates:
            runs = [run for m in measured for run in m["runs"] if (run["optimizer"], run["lr"]) == (which, lr)]
            row = {
                "lowest held-out loss": statistics.median(run["lowest"] for run in runs),
                "worst task's": max(run["lowest"] for run in runs),
                "held-out loss at the end": statistics.median(run["end"] for run in runs),
                "speedup": math.exp(statistics.fmean(run["log_speedup"] for run in runs)),
            }
            for column, value in row.items():
                columns.setdefault(column, {})[f"{which}, `lr={lr:g}`"] = f"{value:.2f}"
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a .json file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = [measure(name, seed) for name, seed in TASKS]
    results = {"torch": torch.__version__, "tasks": measured, "table": table(measured)}
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
