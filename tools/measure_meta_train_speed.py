"""Speed and memory of an unroll: inner steps per second against the package ``higher``, peak memory against T.

    pip install higher
    python tools/measure_meta_train_speed.py --out docs/results

Both packages unroll T inner steps of the same network on the same batches and back-propagate the mean log-loss to
their meta-parameters, ours compiled and not: in one thread, one after the other in turn, the medians of the processor
time. ``higher`` runs (a) the same learned rule, tensor by tensor, as an optimizer of its own kind, and (b) its
differentiable Adam, of which one number, the learning rate, is learned. Memory is the peak of a process of its own,
without what torch itself takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from learned_optim import Policy, PolicyConfig
from learned_optim.meta_train.problem import Problem
from learned_optim.meta_train.unroll import UnrollOptions, unroll
from learned_optim.rule.layouts import Whole
from learned_optim.rule.types import Hyperparameters
from learned_optim.rule.update import initial_state, update
from learned_optim.tasks import ModuleTask

HYPER = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.0)
NETWORKS = {"1,761 parameters": ((1, 40, 40, 1), 10), "26,122 parameters": ((64, 128, 128, 10), 64)}
MILLION = ((784, 1024, 200, 10), 32)


def network(widths: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def task(widths: tuple[int, ...], batch: int) -> ModuleTask:
    def batches(rng: torch.Generator) -> Any:
        while True:
            x = torch.randn(batch, widths[0], generator=rng)
            yield x, x[:, :1].sin() + torch.randn(batch, widths[-1], generator=rng)

    return ModuleTask(lambda: network(widths), batches, lambda net, b: mse_loss(net(b[0]), b[1]))


def ours(
    widths: tuple[int, ...], batch: int, steps: int, segment: int = 0, second: bool = False, compiled: bool = False
) -> Callable:
    policy, problem = Policy(), Problem(task(widths, batch), 0, compiled)
    weights, stream = policy.weights(), problem.batches()
    batches = [next(stream) for _ in range(steps + 1)]

    def run() -> None:
        start = problem.start(policy.config)
        options = UnrollOptions(second_order=second, segment=segment)
        _, losses = unroll(weights, policy.config, problem, start, batches, HYPER, options)
        torch.autograd.grad(losses.log().mean(), list(weights.values()), allow_unused=True)

    return run


def theirs(widths: tuple[int, ...], batch: int, steps: int, rule: str, second: bool = False) -> Callable:
    import higher

    class Learned(torch.optim.SGD):
        """Names the rule for ``higher``."""

    class DifferentiableLearned(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads: list, **_: Any) -> None:
            if not hasattr(self, "states"):
                self.t, self.states = 0, {}
            self.t += 1
            for group, grads in zip(self.param_groups, grouped_grads, strict=True):
                for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    flat = p.reshape(-1)
                    state = self.states.get(i) or initial_state(config, flat.detach())
                    new, *self.states[i] = update(
                        weights, config, Whole(p.shape), flat, g.reshape(-1), *state, float(self.t), HYPER
                    )
                    group["params"][i] = new.view(p.shape)

    higher.register_optim(Learned, DifferentiableLearned)
    config, weights, net = PolicyConfig(), Policy().weights(), network(widths)
    stream = task(widths, batch).batches(torch.Generator().manual_seed(1))
    batches = [next(stream) for _ in range(steps + 1)]
    detach = None if second else lambda grads: [g.detach() for g in grads]

    def run() -> None:
        lr = torch.tensor(1e-3, requires_grad=True)
        adam = rule == "adam"
        inner = torch.optim.Adam(net.parameters(), lr=1e-3) if adam else Learned(net.parameters(), lr=1e-3)
        with higher.innerloop_ctx(net, inner, override={"lr": [lr]} if adam else None) as (model, optimizer):
            loss, losses = mse_loss(model(batches[0][0]), batches[0][1]), []
            for x, y in batches[1:]:
                optimizer.step(loss, grad_callback=detach)
                loss = mse_loss(model(x), y)  # of this step, and what the next one descends
                losses.append(loss)
            learned = [lr] if adam else list(weights.values())
            torch.autograd.grad(torch.stack(losses).log().mean(), learned, allow_unused=True)

    return run


def speed(repeats: int, lengths: list[int], compiled: bool) -> list[dict[str, Any]]:
    rows = []
    for name, (widths, batch) in NETWORKS.items():
        for steps in lengths:
            for second in (False, True):
                runs = {"ours": ours(widths, batch, steps, second=second, compiled=compiled)}
                runs["ours, eager"] = ours(widths, batch, steps, second=second)
                runs |= {rule: theirs(widths, batch, steps, rule, second) for rule in ("same rule", "adam")}
                seconds: dict[str, list[float]] = {which: [] for which in runs}
                for repeat in range(repeats + 1):
                    for which, run in runs.items():
                        start = time.process_time()
                        run()
                        if repeat:  # the first is to warm up
                            seconds[which].append(time.process_time() - start)
                rate = {which: steps / statistics.median(values) for which, values in seconds.items()}
                rows.append({"network": name, "T": steps, "second order": second, "steps per second": rate})
                print(
                    f"{name}, T = {steps}, {'second' if second else 'first'} order: {rate['ours']:.0f} inner steps/s, "
                    f"{rate['ours, eager']:.0f} without a compiler; "
                    f"higher, same rule {rate['same rule']:.0f} ({rate['ours'] / rate['same rule']:.1f} times); "
                    f"higher, Adam {rate['adam']:.0f} ({rate['ours'] / rate['adam']:.2f} times)", flush=True,
                )  # fmt: skip
    return rows


def peak_mib(name: str, steps: int, segment: int) -> float:
    """Peak memory of a process that unrolls once, in MiB, less what it held before."""
    arguments = [sys.executable, __file__, "--peak", name, str(steps), str(segment)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def peak(name: str, steps: int, segment: int) -> None:
    widths, batch = MILLION if name == "million" else NETWORKS[name]
    ours(widths, batch, 1)()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours(widths, batch, steps, segment)()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after if name == "million" else after - before) / 1024)


def memory(out: Path, lengths: list[int]) -> dict[str, list[float]]:
    name = "26,122 parameters"
    curves = {
        "whole graph": [peak_mib(name, t, 0) for t in lengths],
        "segments of √T steps": [peak_mib(name, t, math.isqrt(t)) for t in lengths],
    }
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(lengths, values, marker="o", label=label)
        print(f"{label}: " + ", ".join(f"T = {t}: {v:.0f} MiB" for t, v in zip(lengths, values, strict=True)))
    axes.set(xlabel="inner steps T", ylabel="peak memory (MiB)", xscale="log", yscale="log")
    axes.set_title(f"Memory of an unroll with its backward pass\n(perceptron of {name})", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out / "meta_train_memory.png", dpi=110)
    return {"T": [float(t) for t in lengths], **curves}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for meta_train_speed.json and the plot")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 100], help="T of the comparison of speed")
    parser.add_argument("--memory-lengths", type=int, nargs="+", default=[10, 20, 50, 100, 200])
    parser.add_argument("--million-steps", type=int, default=200, help="inner steps of a model of a million; 0: none")
    parser.add_argument("--eager", action="store_true", help="do without a compiler")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        peak(args.peak[0], int(args.peak[1]), int(args.peak[2]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"torch": torch.__version__, "memory": memory(args.out, args.memory_lengths)}
    results["speed"] = speed(args.repeats, args.lengths, not args.eager)
    if args.million_steps:
        size, segment = sum(p.numel() for p in network(MILLION[0]).parameters()), math.isqrt(args.million_steps)
        held = peak_mib("million", args.million_steps, segment)
        print(f"{args.million_steps} inner steps of {size:,} parameters: {held / 1024:.2f} GiB, everything included")
        results["million"] = {"parameters": size, "steps": args.million_steps, "GiB": held / 1024}
    (args.out / "meta_train_speed.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
