"""One run of one task with one setting, and what identifies it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
import zlib
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learned_optim.bench.baselines import LIBRARIES, Driver, Setting
from learned_optim.bench.curves import Run, binned
from learned_optim.policy.policy import Policy
from learned_optim.tasks import FAMILIES, Task
from learned_optim.tasks.base import batches_of, one_thread

#: Goes up when runs made before are no longer comparable.
FORMAT = 1
#: Batches that BatchNorm's averages are taken over again where weights other than the trained ones are evaluated.
CALIBRATION = 20
#: Steps that times are averaged over; SOAP has a new basis in each tenth step.
PERIOD = 10


@dataclasses.dataclass(frozen=True, eq=False)
class RunSpec:
    """A run to be made.

    Args:
        task: a task, or the name of one of the zoo, ``"family/number"``.
        steps: inner steps.
        seed: number of the seed.
        setting: the optimizer.
        policy: of a learned setting.
        evaluations: held-out losses taken along the run.
        behaviour: of the task, see :func:`behaviour`.
        cost: seconds that it is expected to take, for the order and the time left.
    """

    task: str | Task
    steps: int
    seed: int
    setting: Setting
    policy: Policy | None
    evaluations: int
    behaviour: str
    cost: float

    @property
    def task_name(self) -> str:
        return self.task if isinstance(self.task, str) else self.task.name

    def key(self) -> dict[str, Any]:
        """Everything that shapes the run, as plain JSON types."""
        key: dict[str, Any] = {
            "format": FORMAT, "task": self.task_name, "behaviour": self.behaviour,
            "steps": self.steps, "seed": self.seed, "setting": self.setting.to_dict(),
            "evaluations": self.evaluations, "torch": ".".join(torch.__version__.split(".")[:2]),
        }  # fmt: skip
        if self.setting.optimizer == "learned":
            key["rule"] = rule_sources()
        if self.setting.optimizer in LIBRARIES:
            module, _ = LIBRARIES[self.setting.optimizer]
            key[module] = version(module)
        return key


@lru_cache(maxsize=1)
def rule_sources() -> str:
    """Hash of the source files that a learned optimizer's step goes through."""
    package = Path(__file__).parent.parent
    paths = [package / "optimizer.py", *(p for folder in ("rule", "engine") for p in (package / folder).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_task(task: str | Task) -> Task:
    """The task itself; those of the zoo are kept, so that their data is made once.

    Raises:
        ValueError: no family of that name.
    """
    return _of_the_zoo(task) if isinstance(task, str) else task


@lru_cache(maxsize=2)
def _of_the_zoo(name: str) -> Task:
    family, _, number = name.rpartition("/")
    if family not in FAMILIES or not number.isdigit():
        raise ValueError(f"unknown task {name!r}; names are FAMILY/NUMBER")
    return FAMILIES[family].task(int(number))


def behaviour(task: Task) -> tuple[str, float]:
    """What a task does, as a hash; and the seconds that a gradient takes.

    The hash covers shapes and values of initial parameters, the first batches' losses along two small steps, and the
    held-out loss after them. It thus changes with anything that changes the runs (data, model, loss, initialisation),
    and with nothing else, as an edit of another family in the same source file.
    """
    params, buffers = task.init(torch.Generator().manual_seed(1))
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    batches = batches_of(task, torch.Generator().manual_seed(2))
    digest = hashlib.sha256(repr([(name, tuple(p.shape)) for name, p in params.items()]).encode())
    seconds: list[float] = []

    def add(value: float) -> None:
        digest.update(f"{value:.3e} ".encode())  # coarse: the last digits differ from processor to processor

    for p in params.values():
        add(float(p.detach().double().square().mean().sqrt()) if p.numel() else 0.0)
    for _ in range(3):
        start = time.perf_counter()
        loss = task.loss(leaves, buffers, next(batches))
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        seconds.append(time.perf_counter() - start)
        add(float(loss.detach()))
        with torch.no_grad():
            for p, g in zip(leaves.values(), grads, strict=True):
                if g is not None:
                    p -= 1e-3 * g / g.square().mean().sqrt().clamp(min=1e-12)
    evaluate = getattr(task, "eval_loss", None)
    if evaluate is not None:
        with torch.no_grad():
            add(float(evaluate(leaves, buffers)))
    return digest.hexdigest()[:16], min(seconds)


def evaluation_steps(steps: int, evaluations: int) -> list[int]:
    """Steps after which held-out losses are taken: 0, then denser at the beginning, then the end."""
    return sorted({0, *(max(1, round(steps * (i / evaluations) ** 1.5)) for i in range(1, evaluations + 1))})


def seconds_per_step(clocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a step takes, of times per step in rows: means of ten steps in a row, and the median of those.

    A mean, because some optimizers have more to do in every tenth step; a median, because other processes get in
    between. The first fifth is left out: it makes state and warms caches up, and compilation is not a cost per step.
    """
    rest = clocks[len(clocks) // 5 :]
    blocks = len(rest) // PERIOD
    return np.median(
        rest[len(rest) - blocks * PERIOD :].reshape(blocks, PERIOD, -1).mean(1) if blocks else rest, axis=0
    )


def train(spec: RunSpec) -> Run:
    """Make a run. The same spec gives the same losses; the seconds are this machine's.

    The initial parameters and the batches of a seed are the same for every setting. Training losses are those of the
    weights at which gradients are taken; held-out losses those of the weights a user would keep, which for
    schedule-free AdamW are the averaged ones (with BatchNorm's averages taken anew from training batches).
    """
    task, steps = find_task(spec.task), spec.steps
    seed = zlib.crc32(f"bench/{task.name}/{spec.seed}".encode())
    with one_thread():
        params, buffers = task.init(torch.Generator().manual_seed(seed))
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        driver = Driver(spec.setting, leaves, steps, spec.policy)
        batches = batches_of(task, torch.Generator().manual_seed(seed + 1))
        at = evaluation_steps(steps, spec.evaluations) if getattr(task, "eval_loss", None) is not None else []
        held_out = [math.inf] * len(at)
        losses = np.full(steps, math.inf)
        clocks = np.zeros((steps, 2))
        for step in range(steps + 1):
            if step in at:
                held_out[at.index(step)] = _held_out(task, leaves, buffers, driver, seed)
            if step == steps:
                break
            batch = next(batches)
            start = time.process_time()
            loss = task.loss(leaves, buffers, batch)
            value = loss.item()
            if not math.isfinite(value):
                break
            losses[step] = value
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for p, g in zip(leaves.values(), grads, strict=True):
                p.grad = g
            middle = time.process_time()
            driver.step(step / steps)
            clocks[step] = (time.process_time() - start, time.process_time() - middle)
    step_seconds, update_seconds = seconds_per_step(clocks[: step or 1])
    return Run(
        steps, binned(losses), float(losses[0]), np.array(at, dtype=float), _finite_prefix(held_out),
        float(step_seconds), float(update_seconds), sum(p.numel() for p in params.values()),
    )  # fmt: skip


@torch.no_grad()
def _held_out(task: Task, params: dict[str, Tensor], buffers: dict[str, Tensor], driver: Driver, seed: int) -> float:
    evaluate = getattr(task, "eval_loss")  # noqa: B009  (not in the protocol: optional)
    others = driver.evaluation_mode(True)
    try:
        if others and any("running_" in name for name in buffers):
            buffers = {name: b.clone() for name, b in buffers.items()}
            batches = batches_of(task, torch.Generator().manual_seed(seed + 2))
            for _ in range(CALIBRATION):
                task.loss(params, buffers, next(batches))
        return float(evaluate(params, buffers))
    finally:
        driver.evaluation_mode(False)


def _finite_prefix(values: list[float]) -> np.ndarray:
    array = np.array(values, dtype=float)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        array[bad[0] :] = math.inf
    return array
