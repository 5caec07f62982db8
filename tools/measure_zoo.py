"""Whether the training families teach anything: losses of AdamW and of the bundled rule, and how many draws are solved.

A draw is *saturated* where rules can hardly be told apart on it: the bundled rule is below a thousandth of the first
loss after a quarter of the run, every run moves by less than 3% from there to its end, or all take the same time within
3%.

    python tools/measure_zoo.py docs/results/zoo.json              # what is in the file already is not measured again
    python tools/measure_zoo.py docs/results/zoo.json --families pure_noise --again
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from learned_optim import LearnedOptimizer
from learned_optim.meta_train.time_ratio import log_time_ratio, marks
from learned_optim.tasks import Task, get_families
from learned_optim.tasks.rollout import Curve, smoothed, train

ADAMW_RATES = (1e-3, 3e-3, 1e-2)
SOLVED, STILL, ALIKE = 1e-3, 0.03, 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--families", nargs="+", default=["train"])
    parser.add_argument("--draws", type=int, default=3, help="tasks per family")
    parser.add_argument("--again", action="store_true", help="measure also what is in the file already")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"draws": {}}
    for family in get_families(args.families):
        for number in range(args.draws):
            task = family.task(number)
            if task.name not in known["draws"] or args.again:
                known["draws"][task.name] = {"family": family.name, **measured(task)}
                args.out.write_text(json.dumps(known, indent=1) + "\n")
                print(task.name, known["draws"][task.name], flush=True)


def measured(task: Task) -> dict[str, Any]:
    """Of one task: AdamW's best run by the training loss at the end, the bundled rule's, and the verdict."""
    steps = task.length
    curves: dict[str, Curve] = {}
    begun = time.process_time()
    for rate in ADAMW_RATES:
        curves[f"adamw {rate:g}"] = train(
            task, 0, lambda params, rate=rate: torch.optim.AdamW(params, lr=rate), steps, held_out=True
        )
    seconds = (time.process_time() - begun) / len(ADAMW_RATES)
    best = min(curves, key=lambda name: smoothed(curves[name].losses, steps))
    curves["default"] = train(task, 0, LearnedOptimizer, steps, held_out=True)
    params, _ = task.init(torch.Generator().manual_seed(0))
    return {
        "parameters": sum(p.numel() for p in params.values()),
        "steps": steps,
        "seconds": round(seconds, 2),
        "saturated": verdict(list(curves.values()), steps),
        "adamw": {"setting": best, **summary(curves[best], steps)},
        "default": summary(curves["default"], steps),
        "log_time_ratio": round(log_time_ratio(marks(curves["default"].losses), marks(curves[best].losses)), 3),
    }


def verdict(curves: list[Curve], steps: int) -> str:
    """Why the draw is saturated; empty where it is not. The last curve is that of the bundled rule."""
    quarter, ours = max(1, steps // 4), curves[-1].losses
    if smoothed(ours, quarter) < SOLVED * ours[0]:
        return "solved"
    finite = [curve.losses for curve in curves if math.isfinite(curve.losses[-1])]
    changes = [abs(math.log(max(smoothed(x, quarter), 1e-12) / max(smoothed(x, steps), 1e-12))) for x in finite]
    if max(changes) < STILL:
        return "still"
    outcomes = [marks(losses) for losses in finite]
    times = [log_time_ratio(outcome, outcomes[0]) for outcome in outcomes[1:]]
    return "alike" if times and max(map(abs, times)) < ALIKE else ""


def summary(curve: Curve, steps: int) -> dict[str, Any]:
    """Smoothed training losses along the run, and the held-out loss at its end."""
    losses = [float(f"{smoothed(curve.losses, max(1, round(steps * part))):.4g}") for part in (0.1, 0.25, 0.5, 1.0)]
    return {"losses": losses, "held_out": None if curve.held_out is None else float(f"{curve.held_out:.4g}")}


if __name__ == "__main__":
    main()
