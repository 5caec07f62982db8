"""Evolution strategies with guides and without, on the training families of the zoo, at equal inner steps.

    python tools/measure_zoo_estimators.py docs/results/zoo_estimators.json --runs FOLDER

Both learn pace, step size and the gates of the recurrent cell from ``default``, three runs each. What comes of them is
compared with ``default``, and with itself, the gates put back, on one task of every other training family, none of
which was drawn. Nothing is chosen: the last outer step counts. Runs are kept in FOLDER; those that are there are not
made again.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from measured_runs import arguments, efforts, gates_put_back, spread, write

from learned_optim import LearnedOptimizer, Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.time_ratio import Outcome, compare
from learned_optim.tasks import get_families
from learned_optim.tasks.rollout import train

SEEDS = (1, 2, 3)
UNSEEN = 10_000  #: number of the first task of a family that meta-training does not draw
LENGTH = 300  #: cap of all runs, so that the whole takes little more than an hour
#: By the table's rows: outer steps of about as many inner steps, those of guides counted.
RUNS: dict[str, dict[str, Any]] = {
    '`"es"`': {"outer_steps": 20},
    '`"guided"`': {"outer_steps": 16, "estimator": "guided"},
}


def losses_of(policy: Policy) -> dict[str, list[float]]:
    """Training losses of a task of every other family."""
    curves = {}
    for family in get_families("train")[::2]:
        task = family.task(UNSEEN)
        steps = min(task.length, LENGTH)
        curves[family.name] = train(task, UNSEEN, lambda p: LearnedOptimizer(p, policy=policy), steps).losses
    return curves


def log_speedups(after: dict[str, list[float]], before: dict[str, list[float]]) -> dict[str, float]:
    """By family; positive where ``after`` is faster."""
    return {
        name: round(-compare(Outcome.of(after[name], ()), Outcome.of(before[name], ())), 4) for name in after
    }  # fmt: skip


def measure(name: str, seed: int, folder: Path, before: dict[str, list[float]]) -> dict[str, Any]:
    """One run, and what came of it; ``before`` are the tasks trained with ``default``."""
    config = MetaTrainConfig(
        start="default", parts=("pace", "step_size", "gates"), seed=seed, max_length=LENGTH, validate_every=0,
        backend="compiled", **RUNS[name],
    )  # fmt: skip
    result = meta_train(config, out=folder, resume=True, show_progress=False)
    tuned, last = result.policy, result.history[-1]
    after, put_back = losses_of(tuned), losses_of(gates_put_back(tuned))
    return {
        "run": name, "seed": seed, "inner_steps": last["inner_steps"], "minutes": round(last["seconds"] / 60, 1),
        "log_speedup": log_speedups(after, before), "of gates": log_speedups(after, put_back),
    }  # fmt: skip


def table(measured: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """For docs/train_your_own.md: means of the runs, and their standard deviation."""

    def factor(name: str, which: str) -> str:
        return spread([statistics.fmean(m[which].values()) for m in measured if m["run"] == name], digits=3)

    return {
        name: {
            "speedup over `default`": factor(name, "log_speedup"),
            "of it the gates": factor(name, "of gates"),
            **efforts(measured, name),
        }
        for name in RUNS
    }


def main() -> None:
    args = arguments(__doc__)
    before = losses_of(Policy.from_pretrained("default"))
    measured = [
        measure(name, seed, args.runs / f"{number}-{seed}", before)
        for seed in SEEDS for number, name in enumerate(RUNS)
    ]  # fmt: skip
    write(args.out, {"torch": torch.__version__, "runs": measured, "table": table(measured)})


if __name__ == "__main__":
    main()
