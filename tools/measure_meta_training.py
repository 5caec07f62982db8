"""What short meta-training gains: from the hand-set start on the zoo, and from ``default`` on a task of one's own.

    python tools/measure_meta_training.py docs/results/meta_training.json --runs FOLDER

Two measurements, both on seeds that are never trained on. *From the start*: what ``learned-optim meta-train --settings
recipes/quick.toml`` does to the first 200 steps of the validation tasks, three seeds: the mean log-loss at their end,
and the time that they take (geometric mean, see ``learned_optim/meta_train/slowness.py``). *Fine-tuning*:
``examples/meta_train_own_task.py``, 60 outer steps. Runs are kept in FOLDER, and those that are there already are not
made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from learned_optim import Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.validation import mean_difference, validate
from learned_optim.tasks import get_families

ROOT = Path(__file__).parent.parent
SEEDS = (1, 2, 3)


def short_run(seed: int, folder: Path) -> dict[str, float]:
    """Of the start: time taken and change of the mean log-loss, on the validation tasks and on others of their kind."""
    config = dataclasses.replace(MetaTrainConfig.from_file(ROOT / "recipes" / "quick.toml"), seed=seed)
    result = meta_train(config, out=folder, resume=True)
    families = get_families(config.validation_tasks)
    of_each = dataclasses.replace(config, validation_seeds=2)
    after, before = (validate(p, families, of_each, "compiled") for p in (result.policy, Policy()))
    found: dict[str, float] = {"seed": seed}
    for number, what in enumerate(("chosen", "others")):
        courses = {name: course for name, course in after.items() if name.endswith(f"/{number}")}
        found[f"{what}: time"] = math.exp(mean_difference(courses, before))
        found[f"{what}: log-loss"] = statistics.fmean(course[-1] - before[name][-1] for name, course in courses.items())
    last = result.history[-1]
    return {**found, "inner_steps": last["inner_steps"], "minutes": last["seconds"] / 60}


def fine_tuning(folder: Path) -> dict[str, Any]:
    """Losses on unseen seeds before and after."""
    spec = importlib.util.spec_from_file_location("own_task", ROOT / "examples" / "meta_train_own_task.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("examples/meta_train_own_task.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    config = MetaTrainConfig(
        outer_steps=60, start="default", inner_lr=example.INNER_LR, max_length=0, validation_length=0
    )
    result = meta_train(config, tasks=[example.Spirals()], out=folder, resume=True)
    before = example.final_losses(Policy.from_pretrained("default"), 10)
    after = example.final_losses(result.policy, 10)
    last = result.history[-1]
    return {"before": before, "after": after, "inner_steps": last["inner_steps"], "minutes": last["seconds"] / 60}


def table(runs: list[dict[str, float]], tuned: dict[str, Any]) -> dict[str, dict[str, str]]:
    """For README.md."""

    def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
        return f"{statistics.fmean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    rows = {}
    for what, tasks in (("chosen", "validation tasks"), ("others", "others of their families")):
        rows[f"from the start, {len(runs)} seeds: mean log-loss, {tasks}"] = {
            "before": "0",
            "after": spread([r[f"{what}: log-loss"] for r in runs], 2, "+"),
            "inner steps": f"{statistics.fmean(r['inner_steps'] for r in runs):,.0f}",
            "minutes": f"{statistics.fmean(r['minutes'] for r in runs):.0f}",
        }
        rows[f"... time taken, {tasks}"] = {
            "before": "1",
            "after": spread([r[f"{what}: time"] for r in runs], 2),
            "inner steps": "",
            "minutes": "",
        }
    return rows | {
        f"`default` on one task: loss on {len(tuned['before'])} unseen seeds": {
            "before": spread(tuned["before"]), "after": spread(tuned["after"]),
            "inner steps": f"{tuned['inner_steps']:,}", "minutes": f"{tuned['minutes']:.0f}",
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a .json file")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [short_run(seed, args.runs / f"start{seed}") for seed in SEEDS]
    tuned = fine_tuning(args.runs / "own_task")
    found = {"from the start": runs, "fine-tuning": tuned, "table": table(runs, tuned)}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
