"""What fine-tuning ``default`` on two tasks of one's own gains, by estimator: examples/meta_train_two_tasks.py.

    python tools/measure_own_tasks.py docs/results/own_tasks.json --runs FOLDER

*The defaults* is the example as it is, some ten minutes, but chosen on one seed of each task. The others are shorter,
and all but one learn the gates of the recurrent cell besides: evolution strategies, guided ones and back-propagation
through windows with the same number of inner steps. Three runs each, compared with ``default`` on ten seeds of both
tasks that they were not trained on, and with themselves, the gates put back. Runs are kept in FOLDER; those that
are there already are not made again.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from measured_runs import arguments, efforts, gates_put_back, spread, write
from meta_train_two_tasks import SENSORS, STROKES, gain, runs  # pyright: ignore[reportMissingImports]

from learned_optim import Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.tasks.rollout import Curve

SEEDS, UNSEEN_SEEDS = (1, 2, 3), 10
TASKS = (SENSORS, STROKES)
WITH_GATES = ("pace", "step_size", "gates")
#: By the table's rows: about 56,000 inner steps in those that are short, guides and windows counted.
RUNS: dict[str, dict[str, Any]] = {
    "the defaults": {"outer_steps": 300},
    '`"es"`': {"outer_steps": 40},
    '`"es"`, gates too': {"outer_steps": 40, "parts": WITH_GATES},
    '`"guided"`, gates too': {"outer_steps": 31, "parts": WITH_GATES, "estimator": "guided"},
    '`"backprop"`, gates too': {
        "outer_steps": 700, "parts": WITH_GATES, "estimator": "backprop", "meta_loss": "final", "meta_lr": 0.003,
        "validate_every": 50,
    },
}  # fmt: skip


def on_unseen_seeds(policy: Policy) -> dict[str, list[Curve]]:
    """By task."""
    return {task.name: runs(policy, task, UNSEEN_SEEDS) for task in TASKS}


def measure(name: str, seed: int, folder: Path, before: dict[str, list[Curve]]) -> dict[str, Any]:
    """One run, and what came of it; ``before`` are the tasks trained with ``default``."""
    config = MetaTrainConfig(start="default", seed=seed, validation_seeds=1, **RUNS[name])
    result = meta_train(config, tasks=list(TASKS), out=folder, resume=True)
    tuned, last = result.policy, result.history[-1]
    after, put_back = on_unseen_seeds(tuned), on_unseen_seeds(gates_put_back(tuned))
    return {
        "run": name, "seed": seed, "inner_steps": last["inner_steps"], "minutes": last["seconds"] / 60,
        "gain": {task: gain(curves, before[task])._asdict() for task, curves in after.items()},
        "of gates": {task: gain(curves, put_back[task])._asdict() for task, curves in after.items()},
    }  # fmt: skip


def table(measured: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """For docs/train_your_own.md: means of the seeds, and the spread of the runs."""

    def of_runs(name: str, which: str, task: str, value: str) -> str:
        runs = [m[which][task][value] for m in measured if m["run"] == name]
        logs = [[math.log(x) for x in run] if value == "held_out" else run for run in runs]
        return spread([statistics.fmean(run) for run in logs])

    columns: dict[str, dict[str, str]] = {}
    for task in (task.name for task in TASKS):
        columns[f"{task}: speedup"] = {name: of_runs(name, "gain", task, "log_speedup") for name in RUNS}
        columns[f"{task}: held-out loss"] = {name: of_runs(name, "gain", task, "held_out") for name in RUNS}
    columns["of it the gates"] = {
        name: ", ".join(of_runs(name, "of gates", task.name, "log_speedup") for task in TASKS)
        if "parts" in RUNS[name] else "" for name in RUNS
    }  # fmt: skip
    for row in ("inner steps", "minutes"):
        columns[row] = {name: efforts(measured, name)[row] for name in RUNS}
    return columns


def main() -> None:
    args = arguments(__doc__)
    before = on_unseen_seeds(Policy.from_pretrained("default"))
    measured = [
        measure(name, seed, args.runs / f"{number}-{seed}", before)
        for number, name in enumerate(RUNS) for seed in SEEDS
    ]  # fmt: skip
    write(args.out, {"torch": torch.__version__, "runs": measured, "table": table(measured)})


if __name__ == "__main__":
    main()
