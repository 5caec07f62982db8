"""What short meta-training gains: from the hand-set start on the zoo, and from ``default`` on a task of one's own.

    python tools/measure_meta_training.py docs/results/meta_training.json --runs FOLDER

Two measurements, both on seeds that are never trained on. *From the start*: what ``learned-optim meta-train
--outer-steps 40 --meta-batch 8 --max-length 200 --validation-length 200`` does to the time that the validation tasks'
first 200 steps take (geometric mean, see ``learned_optim/meta_train/time_ratio.py``), three seeds. *Fine-tuning*:
``examples/meta_train_own_task.py``, 60 outer steps. Runs are kept in FOLDER, and those that are there already are not
made again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any

from measured_runs import arguments, write

from learned_optim import Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.validation import mean_difference, validate
from learned_optim.tasks import get_families

ROOT = Path(__file__).parent.parent
SEEDS = (1, 2, 3)


def short_run(seed: int, folder: Path) -> dict[str, float]:
    """Time taken, of the start's, on the validation tasks that chose the best policy and on others."""
    config = MetaTrainConfig(
        outer_steps=40, seed=seed, meta_batch=8, max_length=200, validation_length=200, validate_every=20,
        backend="compiled",
    )  # fmt: skip
    result = meta_train(config, out=folder, resume=True)
    of_each = dataclasses.replace(config, validation_seeds=2)
    families = get_families(config.validation_tasks)
    after, before = (validate(p, families, of_each, "compiled") for p in (result.policy, Policy()))
    time = {
        number: math.exp(mean_difference({n: x for n, x in after.items() if n.endswith(f"/{number}")}, before))
        for number in range(2)
    }
    last = result.history[-1]
    return {"seed": seed, "chosen": time[0], "others": time[1], "inner_steps": last["inner_steps"],
            "minutes": last["seconds"] / 60}  # fmt: skip


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
    """For docs/train_your_own.md."""

    def spread(values: list[float], digits: int = 3) -> str:
        return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    return {
        f"from the start, {len(runs)} runs: time the validation tasks take": {
            "before": "1", "after": spread([r["chosen"] for r in runs], 2),
            "inner steps": f"{statistics.fmean(r['inner_steps'] for r in runs):,.0f}",
            "minutes": f"{statistics.fmean(r['minutes'] for r in runs):.0f}",
        },
        "... of other tasks of the same families": {
            "before": "1", "after": spread([r["others"] for r in runs], 2), "inner steps": "", "minutes": "",
        },
        f"`default` on one task: loss on {len(tuned['before'])} unseen seeds": {
            "before": spread(tuned["before"]), "after": spread(tuned["after"]),
            "inner steps": f"{tuned['inner_steps']:,}", "minutes": f"{tuned['minutes']:.0f}",
        },
    }  # fmt: skip


def main() -> None:
    args = arguments(__doc__)
    runs = [short_run(seed, args.runs / f"start{seed}") for seed in SEEDS]
    tuned = fine_tuning(args.runs / "own_task")
    write(args.out, {"from the start": runs, "fine-tuning": tuned, "table": table(runs, tuned)})


if __name__ == "__main__":
    main()
