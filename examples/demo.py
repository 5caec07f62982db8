"""Train one small network with AdamW and with LearnedOptimizer, both with their default arguments, and compare.

    python examples/demo.py [--out demo] [--json FILE] [--tuned]

A convolutional network of 38,282 parameters learns scikit-learn's handwritten digits: 1,297 images of 8 x 8 pixels
to train on, 500 held out. Both optimizers get the same initial weights and the same batches. The bundled update rule
was not made with these digits. ``--tuned`` adds the best of eight settings of AdamW, chosen by its training loss.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from learned_optim import LearnedOptimizer

TRAIN, EVERY = 1297, 10  # training images; steps between two evaluations


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(make: Any, seed: int, steps: int, cosine: bool = False) -> dict[str, Any]:
    """One run: losses every ``EVERY`` steps, on all training images and on the held-out ones; seconds of training."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]
    torch.manual_seed(seed)
    model = network()
    optimizer = make(model.parameters())
    schedule = CosineAnnealingLR(optimizer, steps) if cosine else None
    run: dict[str, Any] = {"step": [], "train": [], "held_out": [], "accuracy": 0.0, "seconds": 0.0}
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                outputs = model(images)
            run["step"].append(step)
            run["train"].append(cross_entropy(outputs[:TRAIN], labels[:TRAIN]).item())
            run["held_out"].append(cross_entropy(outputs[TRAIN:], labels[TRAIN:]).item())
            run["accuracy"] = (outputs[TRAIN:].argmax(1) == labels[TRAIN:]).double().mean().item()
        if step < steps:
            start = time.perf_counter()
            batch = torch.randint(TRAIN, (64,))
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            if schedule:
                schedule.step()
            run["seconds"] += time.perf_counter() - start
    return run


def summary(runs: list[dict], adamw: list[dict]) -> dict[str, str]:
    """Mean and standard deviation over the seeds; steps are to the loss that AdamW ends with, seed by seed."""

    def spread(values: list[float], digits: str) -> str:
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return f"{statistics.fmean(values):{digits}} ± {deviation:{digits}}"

    reached = []
    for run, other in zip(runs, adamw, strict=True):
        reached += [s for s, loss in zip(run["step"], run["train"], strict=True) if loss <= other["train"][-1]][:1]
    return {
        "training loss, end": spread([run["train"][-1] for run in runs], ".2g"),
        "steps to AdamW's loss": spread(reached, ".0f") if len(reached) == len(runs) else "not reached",
        "held-out loss, lowest": spread([min(run["held_out"]) for run in runs], ".3f"),
        "held-out loss, end": spread([run["held_out"][-1] for run in runs], ".3f"),
        "accuracy, end, %": spread([100 * run["accuracy"] for run in runs], ".1f"),
        "training time, s": spread([run["seconds"] for run in runs], ".1f"),
    }


def plot(results: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, title in zip(axes, ("train", "held_out"), ("Training images", "Held-out images"), strict=True):
        for name, runs in results.items():
            losses = torch.tensor([run[key] for run in runs])
            (line,) = axis.plot(runs[0]["step"], losses.mean(0), label=name)
            axis.fill_between(runs[0]["step"], losses.amin(0), losses.amax(0), alpha=0.2, color=line.get_color(), lw=0)
            axis.set_title(f"{title}: mean and range of {len(runs)} seeds", fontsize="medium")
        axis.set(xlabel="training steps (batches of 64 images)", ylabel="cross-entropy (nats)", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for curves.png")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--tuned", action="store_true", help="also run AdamW at eight settings")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)  # for a network as small as this, several are slower

    def run(name: str, make: Any, cosine: bool = False) -> list[dict]:
        print(f"{name}: {args.seeds} runs of {args.steps} steps ...", flush=True)
        return [train(make, seed, args.steps, cosine) for seed in range(args.seeds)]

    default, learned = "AdamW (defaults)", "LearnedOptimizer (defaults)"
    runs = {default: run(default, torch.optim.AdamW), learned: run(learned, LearnedOptimizer)}
    if args.tuned:
        tried = {}
        for lr in (1e-3, 3e-3, 1e-2, 3e-2):
            for kind in ("constant", "cosine"):
                name = f"AdamW, lr {lr:g} {kind}"
                tried[name] = run(name, lambda params, lr=lr: torch.optim.AdamW(params, lr=lr), kind == "cosine")
        best = min(tried, key=lambda name: sum(r["train"][-1] for r in tried[name]))
        runs[f"{best} (best of 8)"] = tried[best]
    table = {name: summary(results, runs[default]) for name, results in runs.items()}
    print(f"\nHandwritten digits, {args.steps} steps; mean ± standard deviation of {args.seeds} seeds\n")
    print(" " * 22, *(f"{name:>28}" for name in table))
    for row in table[default]:
        print(f"{row:22}", *(f"{column[row]:>{max(28, len(name))}}" for name, column in table.items()))
    plot(runs, args.out / "curves.png")
    print(f"\nCurves: {args.out / 'curves.png'}")
    if args.json:
        facts = {"steps": args.steps, "seeds": args.seeds, "torch": torch.__version__, "table": table}
        args.json.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
