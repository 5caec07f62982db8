"""What a whole training iteration costs over AdamW's: gradient and step, on the validation tasks, as a user gets it.

    python tools/measure_iteration.py docs/results/iteration.json [--policies default] [--rounds 60]

Default arguments, one thread, processor time. Every optimizer trains the same task from the same start, and they take
turns, iteration by iteration, so that whatever else the machine does hits all alike. Figures are medians and ratios of
medians; the first fifth of the iterations, in which state is made and kernels are loaded, does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learned_optim import LearnedOptimizer
from learned_optim.tasks import Task, get_families

ADAMW = "AdamW"


class Contender:
    """One optimizer on its own copy of a task."""

    def __init__(self, task: Task, make: Callable[[list[torch.Tensor]], Any]) -> None:
        self.task = task
        params, self.buffers = task.init(torch.Generator().manual_seed(0))
        self.params = {name: p.requires_grad_() for name, p in params.items()}
        self.batches = task.batches(torch.Generator().manual_seed(1))
        self.optimizer = make(list(self.params.values()))
        self.gradient: list[float] = []
        self.step: list[float] = []

    def iterate(self) -> None:
        """One iteration, timed in two parts."""
        batch = next(self.batches)
        begin = time.process_time()
        loss = self.task.loss(self.params, self.buffers, batch)
        grads = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        for p, grad in zip(self.params.values(), grads, strict=True):
            p.grad = grad
        middle = time.process_time()
        self.optimizer.step()
        self.gradient.append(middle - begin)
        self.step.append(time.process_time() - middle)


def measure(task: Task, policies: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of an AdamW iteration, and for each policy the ratio of the whole iteration."""
    makers: dict[str, Callable[[list[torch.Tensor]], Any]] = {ADAMW: torch.optim.AdamW}
    for policy in policies:
        makers[policy] = lambda params, policy=policy: LearnedOptimizer(params, policy=policy)
    contenders = {name: Contender(task, make) for name, make in makers.items()}
    for _ in range(rounds):
        for contender in contenders.values():
            contender.iterate()
    skip = rounds // 5
    # The gradient is the same work for all: its median over all of them stands for each.
    gradient = statistics.median(t for c in contenders.values() for t in c.gradient[skip:])
    steps = {name: statistics.median(c.step[skip:]) for name, c in contenders.items()}
    whole = {name: gradient + step for name, step in steps.items()}
    return {
        "parameters": sum(p.numel() for p in contenders[ADAMW].params.values()),
        "tensors": len(contenders[ADAMW].params),
        "gradient_ms": gradient * 1e3,
        "step_ms": {name: step * 1e3 for name, step in steps.items()},
        "ratio": {name: whole[name] / whole[ADAMW] for name in policies},
    }


def summary(rows: dict[str, Any], policy: str) -> dict[str, float]:
    """Geometric mean and worst of the ratios."""
    ratios = [row["ratio"][policy] for row in rows.values()]
    return {"mean": statistics.geometric_mean(ratios), "worst": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--policies", nargs="+", default=["default"])
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for family in get_families(("validation",)):
        rows[family.name] = row = measure(family.task(0), arguments.policies, arguments.rounds)
        ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
        print(f"{family.name:28} {row['parameters']:>9,} parameters  {ratios}", flush=True)
    means = {policy: summary(rows, policy) for policy in arguments.policies}
    for policy, figures in means.items():
        print(f"{policy}: geometric mean {figures['mean']:.2f}, worst {figures['worst']:.2f}")
    if arguments.out:
        machine = {"torch": torch.__version__, "threads": 1, "machine": platform.machine()}
        result = {**machine, "rounds": arguments.rounds, "tasks": rows, "summary": means}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
