"""What a learning-rate schedule does to LearnedOptimizer: python tools/measure_schedules.py docs/results/schedules.json

Three families of the zoo that no policy was trained on, three tasks of each, 300 steps at lr 1e-3: a constant learning
rate, a linear warm-up over the first tenth, a cosine to zero over the run, and a decay to zero over its last fifth
only. A figure is the loss over that with the constant learning rate, the geometric mean of three tasks.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from learned_optim import LearnedOptimizer
from learned_optim.tasks import get_families
from learned_optim.tasks.recipe import Schedule, constant, cosine, decay
from learned_optim.tasks.rollout import smoothed, train

FAMILIES = {
    "val_generated_tables": "tables",
    "val_formula_regression": "formulas",
    "val_recurrent_char": "characters",
}
STEPS, SEEDS = 300, (0, 1, 2)
SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "warm-up, a tenth": lambda done: min(1.0, 10.0 * done + 1e-3),
    "cosine": cosine,
    "decay in the last fifth": decay,
}


def main() -> None:
    torch.set_num_threads(1)
    losses: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, family in zip(FAMILIES, get_families(FAMILIES), strict=True):
        for schedule, factor in SCHEDULES.items():
            for seed in SEEDS:
                curve = train(
                    family.task(seed), seed, lambda p: LearnedOptimizer(p, lr=1e-3), STEPS, schedule=factor,
                    held_out=True,
                )  # fmt: skip
                end = math.nan if curve.held_out is None else curve.held_out
                losses.setdefault((name, schedule), []).append((smoothed(curve.losses, STEPS), end))
                print(name, schedule, seed, *losses[name, schedule][-1], flush=True)

    def ratio(name: str, schedule: str, which: int) -> str:
        pairs = zip(losses[name, schedule], losses[name, "constant"], strict=True)
        return f"{math.exp(sum(math.log(a[which] / b[which]) for a, b in pairs) / len(SEEDS)):.2f}"

    kinds = ("training loss", "held-out loss")
    table = {
        schedule: {f"{short}: {kind}": ratio(name, schedule, i)
                   for name, short in FAMILIES.items() for i, kind in enumerate(kinds)}
        for schedule in SCHEDULES if schedule != "constant"
    }  # fmt: skip
    result = {"steps": STEPS, "seeds": SEEDS, "lr": 1e-3, "table": table,
              "losses": {f"{name}, {schedule}": values for (name, schedule), values in losses.items()}}  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
