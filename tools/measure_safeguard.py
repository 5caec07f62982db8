"""The safeguard on and off, against AdamW at the same learning rate, on small tasks built to break update rules.

    python tools/measure_safeguard.py --out docs

Learning rates are log-uniform from 1e-4 to 3e-2, in every fourth task from 0.03 to 0.3: far too large. What counts is
the mean of the noise-free loss over the last tenth of the run. Writes results/safeguard.json, safeguard.md and
safeguard.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).parent))
from hard_tasks import KINDS, Params, log_uniform

from learned_optim import LearnedOptimizer, Policy

#: Stands for the log-ratio of a run that diverged where AdamW's did not.
DIVERGED = 9.0


def final_loss(kind: str, seed: int, make: Callable[[Params, float], Optimizer], steps: int) -> tuple[float, float]:
    """The loss that counts, ``inf`` where it is not finite, and the learning rate of the task."""
    rng = torch.Generator().manual_seed(1000 * seed + list(KINDS).index(kind))
    task = KINDS[kind](rng)
    too_large = float(torch.rand((), generator=rng)) < 0.25
    lr = log_uniform(rng, 0.03, 0.3) if too_large else log_uniform(rng, 1e-4, 3e-2)
    params = [p.clone().requires_grad_() for p in task.start]
    optimizer, noise, last = make(params, lr), torch.Generator().manual_seed(seed), []
    for t in range(steps):
        optimizer.zero_grad()
        task.loss(params, t, noise).backward()
        optimizer.step()
        if t >= 0.9 * steps:
            with torch.no_grad():
                last.append(float(task.measured(params, t)))
    mean = sum(last) / len(last)
    return (mean if math.isfinite(mean) else math.inf), lr


def compare(policy: Policy, seeds: int, steps: int) -> list[dict[str, Any]]:
    """A row per task: kind, seed, lr, AdamW's loss and the log-ratios to it with the safeguard off and on."""
    makers: dict[str, Callable[[Params, float], Optimizer]] = {
        "adamw": lambda params, lr: AdamW(params, lr=lr),
        "off": lambda params, lr: LearnedOptimizer(params, lr=lr, policy=policy),
        "on": lambda params, lr: LearnedOptimizer(params, lr=lr, policy=policy, safeguard=True),
    }
    rows = []
    for kind in KINDS:
        for seed in range(seeds):
            losses = {name: final_loss(kind, seed, make, steps) for name, make in makers.items()}
            row: dict[str, Any] = {"kind": kind, "seed": seed, "lr": losses["adamw"][1], "adamw": losses["adamw"][0]}
            for name in ("off", "on"):
                row[name] = _log_ratio(losses[name][0], losses["adamw"][0])
            rows.append(row)
        print(f"{kind}: done", flush=True)
    return rows


def _log_ratio(loss: float, reference: float) -> float:
    if not math.isfinite(reference):
        return 0.0
    return math.log(max(loss, 1e-9) / max(reference, 1e-9)) if math.isfinite(loss) else DIVERGED


def _summary(ratios: list[float]) -> list[str]:
    worse = sum(r > math.log(1.1) for r in ratios)
    mean, worst = math.exp(sum(ratios) / len(ratios)), math.exp(max(ratios))
    return [f"{mean:.2f}", f"{worst:.2f}" if max(ratios) < DIVERGED else "diverged", f"{worse} of {len(ratios)}"]


def page(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = results["tasks"]
    lines = [
        "# With and without the safeguard", "",
        f"`LearnedOptimizer(params, lr, safeguard=True)` and without it, policy `{results['policy']}`, against AdamW "
        f"at the same learning rate: {len(rows)} small tasks, {results['steps']} steps each, {results['seeds']} seeds "
        f"of {len(KINDS)} kinds, most of them built to break an update rule, a quarter with learning rates of 0.03 to "
        "0.3. Losses at the end over AdamW's: geometric mean, worst case, and how many are more than 10% above. "
        "`python tools/measure_safeguard.py` makes this page.", "",
        "![losses over AdamW's](safeguard.png)", "",
        "| task | off: mean | worst | > 1.1 | on: mean | worst | > 1.1 |", "|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for kind in [*KINDS, "all"]:
        chosen = [r for r in rows if kind in (r["kind"], "all")]
        cells = [*_summary([r["off"] for r in chosen]), *_summary([r["on"] for r in chosen])]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", "Worst with the safeguard:", "", "| task | seed | lr | loss over AdamW's |", "|---|--:|--:|--:|"]
    for r in sorted(rows, key=lambda r: -r["on"])[:5]:
        lines.append(f"| {r['kind']} | {r['seed']} | {r['lr']:.2g} | {math.exp(r['on']):.3f} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Sorted ratios, on and off."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, label, colour in (("off", "without safeguard", "#E69F00"), ("on", "with safeguard", "#0072B2")):
        values = sorted(math.exp(min(max(r[name], math.log(1e-3)), math.log(1e3))) for r in results["tasks"])
        axes.plot(range(1, len(values) + 1), values, label=label, color=colour, linewidth=2)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.text(2, 1.15, "AdamW at the same learning rate", fontsize=8)
    axes.set(yscale="log", xlabel="tasks, each curve sorted by itself", ylabel="final loss over AdamW's (cut at 1000)",
             title=f"{len(results['tasks'])} small tasks, most built to break rules: lower is better")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--policy", default="default")
    parser.add_argument("--seeds", type=int, default=17, help="tasks of each kind")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy.from_pretrained(args.policy)
    results = {"policy": args.policy, "fingerprint": policy.fingerprint(), "seeds": args.seeds, "steps": args.steps,
             "tasks": compare(policy, args.seeds, args.steps)}  # fmt: skip
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    (args.out / "results" / "safeguard.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.out / "safeguard.md").write_text(page(results), encoding="utf-8")
    draw(results, args.out / "safeguard.png")


if __name__ == "__main__":
    main()
