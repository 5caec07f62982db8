"""Train a small transformer with AdamW, at its default and tuned, and with LearnedOptimizer, untuned, and compare.

    python examples/demo.py [--out demo] [--json FILE]

A decoder of 118,656 parameters learns to predict the next character of Python's own source code: the packages in
``PACKAGES``, every tenth file held out. No rule was trained on them, and none was chosen by them. Every run begins with
the same weights and sees the same batches. AdamW is run at eight settings, of which the one with the lowest held-out
loss at the end counts as tuned; LearnedOptimizer runs once, as it comes. Times are processor seconds of training, on
one thread; evaluating is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from learned_optim import LearnedOptimizer
from learned_optim.tasks.data_text import windows
from learned_optim.tasks.nets import Style, TransformerLM
from learned_optim.tasks.objectives import next_token

PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "multiprocessing", "unittest", "urllib", "xml")
VOCABULARY, WIDTH, DEPTH, HEADS, CONTEXT, BATCH = 128, 64, 2, 4, 32, 16
EVERY = 20  # steps between two evaluations
RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of AdamW, each constant and with a cosine
DEFAULT, OURS = "AdamW (default, lr 1e-3)", "LearnedOptimizer (default)"

Run = dict[str, Any]
Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def characters() -> tuple[Tensor, Tensor]:
    """ASCII codes of the files to train on, and of those held out; int64."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path.read_bytes() for name in PACKAGES for path in sorted((library / name).rglob("*.py"))]
    if not files:
        raise SystemExit(f"this Python comes without its sources: no .py file in {', '.join(PACKAGES)} in {library}")
    training, held_out = (b"".join(f for i, f in enumerate(files) if (i % 10 == 9) == late) for late in (False, True))
    return codes(training), codes(held_out)


def codes(text: bytes) -> Tensor:
    return torch.tensor([code for code in text if code < VOCABULARY])


def train(text: tuple[Tensor, Tensor], make: Make, seed: int, steps: int, cosine: bool = False) -> Run:
    """One run: the step, held-out loss (nats per character) and processor seconds so far, every ``EVERY`` steps."""
    torch.manual_seed(seed)
    model = TransformerLM(VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS, Style("gelu", "layer"))
    optimizer = make(model.parameters())
    schedule = CosineAnnealingLR(optimizer, steps) if cosine else None
    batches = windows(text[0], CONTEXT, BATCH, torch.Generator().manual_seed(seed))
    (held_out,) = next(windows(text[1], CONTEXT, 256, torch.Generator().manual_seed(0)))
    run: Run = {"step": [], "held_out": [], "seconds": []}
    seconds = 0.0
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                run["held_out"].append(next_token(model, (held_out,)).item())
            run["step"].append(step)
            run["seconds"].append(seconds)
        if step < steps:
            start = time.process_time()
            optimizer.zero_grad()
            next_token(model, next(batches)).backward()
            optimizer.step()
            if schedule:
                schedule.step()
            seconds += time.process_time() - start
    return run


def summary(runs: list[Run], tuned: list[Run]) -> dict[str, str]:
    """Means over the seeds, with standard deviations where there are several; targets are met seed by seed."""

    def spread(values: list[float], digits: str) -> str:
        deviation = f" ± {statistics.stdev(values):{digits}}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):{digits}}{deviation}"

    met = [reached(run, target["held_out"][-1]) for run, target in zip(runs, tuned, strict=True)]
    known = [i for i in met if i is not None]
    there = list(zip(runs, known, strict=False))
    never = "not reached"
    return {
        "held-out loss": spread([run["held_out"][-1] for run in runs], ".3f"),
        "steps to tuned AdamW's": spread([r["step"][i] for r, i in there], ".0f") if len(known) == len(met) else never,
        "seconds to it": spread([r["seconds"][i] for r, i in there], ".1f") if len(known) == len(met) else never,
        "seconds, all steps": spread([run["seconds"][-1] for run in runs], ".1f"),
    }


def reached(run: Run, loss: float) -> int | None:
    """The first evaluation with a held-out loss of at most ``loss``."""
    return next((i for i, value in enumerate(run["held_out"]) if value <= loss), None)


def plot(results: dict[str, list[Run]], others: list[list[Run]], target: float, path: Path) -> None:
    """Held-out losses against steps and against time, means over the seeds; ``others`` in grey, ``target`` dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.7), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    styles = {DEFAULT: ("#000000", 1.6), OURS: ("#D55E00", 2.6)}
    for axis, key, label in zip(axes, ("step", "seconds"), ("training steps", "processor seconds"), strict=True):

        def draw(runs: list[Run], axis: Any = axis, key: str = key, **style: Any) -> None:
            x, y = ([statistics.fmean(v) for v in zip(*(r[k] for r in runs), strict=True)] for k in (key, "held_out"))
            axis.plot(x, y, **style)

        for i, runs in enumerate(others):
            draw(runs, color="0.8", lw=1.0, label=None if i else "AdamW, other settings")
        for name, runs in results.items():
            colour, width = styles.get(name, ("#0072B2", 1.8))
            draw(runs, color=colour, lw=width, label=name)
        axis.axhline(target, color="#0072B2", lw=1.0, ls=":")
        axis.set(xlabel=label, xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    ends = [run["held_out"][-1] for runs in results.values() for run in runs]
    starts = [run["held_out"][min(1, len(run["held_out"]) - 1)] for runs in results.values() for run in runs]
    axes[0].set_ylim(min(ends) - 0.1, max(*starts, max(ends) + 0.1))
    axes[0].set_ylabel("held-out loss (lower is better)")
    axes[1].legend(fontsize="small", frameon=False)
    figure.suptitle("A small transformer learns Python's source code, character by character", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for curves.png")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)  # for a network as small as this, several are slower
    text = characters()

    def run(name: str, make: Make, cosine: bool = False) -> list[Run]:
        runs = [train(text, make, seed, args.steps, cosine) for seed in range(args.seeds)]
        loss = statistics.fmean(run["held_out"][-1] for run in runs)
        print(f"{name:28} held-out loss {loss:.3f} after {args.steps} steps", flush=True)
        return runs

    print(f"{len(text[0]):,} characters to train on, {len(text[1]):,} held out\n")
    tried = {}
    for lr in RATES:
        for kind in ("constant", "cosine"):
            name = f"AdamW, lr {lr:.0e} {kind}".replace("e-0", "e-")
            tried[name] = run(name, lambda params, lr=lr: torch.optim.AdamW(params, lr=lr), kind == "cosine")
    ours = run(OURS, LearnedOptimizer)
    ends = {name: statistics.fmean(run["held_out"][-1] for run in runs) for name, runs in tried.items()}
    best = min(ends, key=lambda name: ends[name] if math.isfinite(ends[name]) else math.inf)
    default = next(iter(tried))
    results = {DEFAULT: tried[default], f"{best} (best of {len(tried)})": tried[best], OURS: ours}
    table = {name: summary(runs, tried[best]) for name, runs in results.items()}
    rows, width = list(table[OURS]), max(map(len, table))
    print(f"\n{'':{width}}", *(f"{row:>{len(row) + 2}}" for row in rows))
    for name, column in table.items():
        print(f"{name:{width}}", *(f"{column[row]:>{len(row) + 2}}" for row in rows))
    others = [runs for name, runs in tried.items() if name not in (default, best)]
    plot(results, others, ends[best], args.out / "curves.png")
    print(f"\nCurves: {args.out / 'curves.png'}")
    if args.json:
        facts = {"steps": args.steps, "seeds": args.seeds, "torch": torch.__version__, "table": table}
        args.json.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
