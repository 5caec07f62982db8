"""A long run with everything that happens to one: ``make soak``.

First the tests that take minutes (killed runs, workers of torchrun, damaged artefacts, the optimizer's life at random),
then, until the time is up, optimizer steps on small models that are interrupted all the time. It must stay as it was:
memory flat, step time flat, state finite, and whatever was saved and loaded, copied or pickled goes on bit by bit.

    python tools/soak.py --minutes 30 --out docs/results/reliability.json
"""

from __future__ import annotations

import argparse
import collections
import copy
import gc
import json
import os
import pickle
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learned_optim import LearnedOptimizer, Policy, PolicyConfig

ROOT = Path(__file__).parent.parent
SLOW_TESTS = ("--ignore=tests/clients", "tests")
BLOCK = 500  #: steps between two looks at memory and step time
MEMORY_LIMIT, TIME_LIMIT = 0.01, 0.10  #: growth after the warm-up
RATES = (0.0, 1e-5, 1e-3, 3e-3)


class Model:
    """A small network under way, its optimizer, and the file it is saved in."""

    def __init__(self, name: str, seed: int, folder: Path, dtype: torch.dtype, **options: Any) -> None:
        self.name, self.options, self.file = name, options, folder / f"{name}.pt"
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(dtype)
        self.data = torch.randn(64, 6, dtype=dtype), torch.randn(64, 1, dtype=dtype)
        self.optimizer = LearnedOptimizer(self.groups(self.net), lr=1e-3, backend="eager", **options)

    @staticmethod
    def groups(net: torch.nn.Module) -> list[dict[str, Any]]:
        params = list(net.parameters())
        return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]

    def gradients(self, rng: random.Random) -> None:
        """Of a random batch, at random scale: sizes of 20 orders of magnitude."""
        x, y = self.data
        some = torch.tensor(rng.sample(range(len(x)), 8))
        self.optimizer.zero_grad()
        torch.nn.functional.mse_loss(self.net(x[some]).float(), y[some].float()).backward()
        if rng.random() < 0.05:
            scale = 10.0 ** rng.uniform(-10, 10)
            for p in self.net.parameters():
                if p.grad is not None:
                    p.grad.mul_(scale)

    def tensors(self) -> list[torch.Tensor]:
        """Everything that training changes."""
        params = [p.detach() for p in self.net.parameters()]
        return params + [v for p in self.net.parameters() for v in self.optimizer.state.get(p, {}).values()]

    def save(self) -> None:
        torch.save({"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, self.file)

    def load(self) -> None:
        """Into a new network and a new optimizer, as after a restart."""
        saved = torch.load(self.file, weights_only=True)
        self.net = copy.deepcopy(self.net)
        self.net.load_state_dict(saved["net"])
        self.optimizer = LearnedOptimizer(self.groups(self.net), lr=1e-3, backend="eager", **self.options)
        self.optimizer.load_state_dict(saved["optimizer"])


def same(model: Model, before: list[torch.Tensor], what: str) -> None:
    after = model.tensors()
    pairs = zip(after, before, strict=True)
    if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
        raise AssertionError(f"{what} changed the state of {model.name}")


def save_and_load(model: Model, rng: random.Random) -> None:
    before = [t.clone() for t in model.tensors()]
    model.save()
    model.load()
    same(model, before, "saving and loading")


def copy_with(make: Callable[[Any], Any]) -> Callable[[Model, random.Random], None]:
    def run(model: Model, rng: random.Random) -> None:
        """The copy and the original make a step each and agree; the copy goes on."""
        net, optimizer = make((model.net, model.optimizer))
        batch = rng.random()
        model.gradients(random.Random(batch))
        model.optimizer.step()
        expected = [t.clone() for t in model.tensors()]
        model.net, model.optimizer = net, optimizer
        model.gradients(random.Random(batch))
        model.optimizer.step()
        same(model, expected, f"a step of a copy made by {make.__name__}")

    return run


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def set_rate(model: Model, rng: random.Random) -> None:
    for group in model.optimizer.param_groups:
        group["lr"] = rng.choice(RATES)


def step_without_rate(model: Model, rng: random.Random) -> None:
    rates = [group["lr"] for group in model.optimizer.param_groups]
    for group in model.optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.net.parameters()]
    model.gradients(rng)
    model.optimizer.step()
    if not all(torch.equal(a, b) for a, b in zip(model.net.parameters(), before, strict=True)):
        raise AssertionError("a step with lr = 0 moved a parameter")
    for group, rate in zip(model.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def nan_gradient(model: Model, rng: random.Random) -> None:
    """It reaches its tensor and no other; the run goes on from what was saved last."""
    model.save()
    model.gradients(rng)
    hit = rng.choice(list(model.net.parameters()))
    if hit.grad is None:
        raise AssertionError("a parameter without gradient")
    hit.grad.view(-1)[rng.randrange(hit.numel())] = float("nan")
    model.optimizer.step()
    for p in model.net.parameters():
        if p is not hit and not bool(p.isfinite().all()):
            raise AssertionError("a NaN in one tensor's gradient reached another tensor")
    model.load()


def skipped_step(model: Model, rng: random.Random) -> None:
    model.optimizer.zero_grad()
    before = [t.clone() for t in model.tensors()]
    model.optimizer.step()
    same(model, before, "a step without gradients")


INTERRUPTIONS: dict[str, Callable[[Model, random.Random], None]] = {
    "saved to a file and loaded": save_and_load,
    "deepcopy": copy_with(copy.deepcopy),
    "pickle": copy_with(pickled),
    "learning rate changed": set_rate,
    "step with lr = 0": step_without_rate,
    "NaN in a gradient": nan_gradient,
    "step without gradients": skipped_step,
}


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(values: list[float]) -> float:
    """Of the last fifth over the second: the first is the warm-up."""
    fifth = len(values) // 5
    return statistics.median(values[-fifth:]) / statistics.median(values[fifth : 2 * fifth]) - 1.0


def soak(seconds: float, seed: int) -> dict[str, Any]:
    """Steps until the time is up.

    Raises:
        AssertionError: something that must hold did not.
    """
    rng = random.Random(seed)
    happened: collections.Counter[str] = collections.Counter()
    memory: list[float] = []
    times: list[float] = []
    took: list[float] = []
    steps = 0
    gru = Policy(PolicyConfig.gru(), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        models = [
            Model("float32", seed, Path(folder), torch.float32),
            Model("bfloat16 with bfloat16 state", seed, Path(folder), torch.bfloat16, state_dtype=torch.bfloat16),
            Model("GRU cell", seed, Path(folder), torch.float32, policy=gru),
            Model("with safeguard", seed, Path(folder), torch.float32, safeguard=True),
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(memory) < 10:
            model = models[steps % len(models)]
            if rng.random() < 0.02:
                kind = rng.choice(sorted(INTERRUPTIONS))
                INTERRUPTIONS[kind](model, rng)
                happened[kind] += 1
            model.gradients(rng)
            begun = time.thread_time()
            model.optimizer.step()
            took.append(time.thread_time() - begun)
            steps += 1
            if steps % BLOCK == 0:
                for each in models:
                    if not all(bool(t.isfinite().all()) for t in each.tensors()):
                        raise AssertionError(f"{each.name} is not finite after {steps} steps")
                memory.append(resident())
                times.append(statistics.median(took))
                took.clear()
    figures = {
        "minutes": round(seconds / 60, 1),
        "steps": steps,
        "models": {m.name: sum(p.numel() for p in m.net.parameters()) for m in models},
        "interruptions": dict(sorted(happened.items())),
        "memory_start_mb": round(memory[len(memory) // 5] / 1e6, 1),
        "memory_end_mb": round(memory[-1] / 1e6, 1),
        "memory_growth": round(growth(memory), 5),
        "step_ms": round(1e3 * statistics.median(times), 3),
        "step_time_growth": round(growth(times), 4),
        "finite": True,
    }
    if figures["memory_growth"] >= MEMORY_LIMIT:
        raise AssertionError(f"memory grew by {100 * figures['memory_growth']:.2f}%: {figures}")
    if figures["step_time_growth"] >= TIME_LIMIT:
        raise AssertionError(f"a step's time grew by {100 * figures['step_time_growth']:.1f}%: {figures}")
    return figures


def slow_tests(minutes: float) -> list[dict[str, Any]]:
    """Run the tests that take minutes; their names and seconds.

    Raises:
        SystemExit: one failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "slow", f"--junit-xml={report}", *SLOW_TESTS], cwd=ROOT, check=False,
            env={**os.environ, "SOAK_MINUTES": str(minutes), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"the slow tests failed ({done.returncode})")
        cases = ElementTree.parse(report).iter("testcase")
        return [{"test": case.attrib["name"], "seconds": round(float(case.attrib["time"]))} for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES", "30")))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "reliability.json")
    parser.add_argument("--no-tests", action="store_true", help="the steps only")
    arguments = parser.parse_args()
    begun = time.monotonic()
    torch.set_num_threads(1)
    tests = [] if arguments.no_tests else slow_tests(arguments.minutes)
    # At least a third of the time: where the tests took longer than that, the whole takes longer than was asked.
    left = max(60 * arguments.minutes - (time.monotonic() - begun), 20 * arguments.minutes)
    steps = soak(left, arguments.seed)
    results = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, one thread",
        "minutes_asked": arguments.minutes,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "seed": arguments.seed,
        "slow_tests": tests,
        "soak": steps,
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["soak"], indent=2))


if __name__ == "__main__":
    main()
