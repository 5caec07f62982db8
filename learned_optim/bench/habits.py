"""The habits suite: what an update rule does on noise, after changes, from a good start. :func:`run_habits` measures.

Every measurement is small enough that the whole suite takes minutes, and made so that one number says what is wrong.
Parameters, gradients and data of a seed are the same for every contender.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learned_optim.bench.baselines import DEFAULT_LR, Driver, Schedule, Setting, grid
from learned_optim.bench.curves import DIVERGED_ABOVE
from learned_optim.bench.habits_config import HabitsConfig, Lengths
from learned_optim.bench.pool import OnProgress, Progress
from learned_optim.bench.quality import REFERENCE, load_policies
from learned_optim.policy.policy import Policy
from learned_optim.policy.resolve import bundled
from learned_optim.tasks.base import one_thread

SAME = "AdamW, same lr"
#: Steps at which tables show the size of a step on noise; pictures show more.
NOISE_STEPS = (1, 10, 100, 300, 1000, 3000)
CHANGES = 5
#: Parts of the default learning rate that good starts are trained on with.
PARTS = (1.0, 0.1, 1.0 / 30.0)
LARGER = 10.0

Params = dict[str, Tensor]
Figures = dict[str, list[float]]  #: by name, one value per seed; ``inf`` for a run that diverged


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """An optimizer, with one learning rate or with the best of several for each measurement.

    Args:
        name: in tables.
        rates: learning rates.
        policy: of a learned one; ``None`` is AdamW.
        backend: of a learned one.
    """

    name: str
    rates: tuple[float, ...] = (DEFAULT_LR,)
    policy: Policy | None = None
    backend: str = ""

    def driver(
        self, params: Params, steps: int, lr: float, *, schedule: Schedule = "constant", decay: float = 0.0
    ) -> Driver:
        """The optimizer over ``params``, for a run of ``steps``."""
        name = "adamw" if self.policy is None else "learned"
        return Driver(Setting(name, lr, schedule, weight_decay=decay, backend=self.backend), params, steps, self.policy)

    def at_best_rate(self, run: Callable[[float], list[Figures]], value: str) -> tuple[float, Figures]:
        """The learning rate with the lowest mean of a figure, and what :func:`merged` makes of its runs."""
        runs = {lr: merged(run(lr)) for lr in self.rates}
        best = min(runs, key=lambda lr: fmean(runs[lr][value]))
        return best, runs[best]


Measurement = Callable[[Contender, Lengths, Sequence[int]], Figures]


def run_habits(
    config: HabitsConfig, *, policies: Mapping[str, Policy] | None = None, progress: OnProgress | None = None
) -> dict[str, Any]:
    """Measure everything. Nothing is printed.

    Args:
        config: what is run.
        policies: policies by label, instead of those that ``config`` names.
        progress: called after every measurement of a contender.

    Returns:
        Plain JSON types: ``figures`` by measurement, contender and name, one value per seed, ``None`` for a run that
        diverged; and what it was measured with. :mod:`learned_optim.bench.habits_report` makes tables of it.

    Raises:
        ValueError: an unknown policy.
    """
    policies = load_policies(policy_names(config)) if policies is None else policies
    rules = [Contender(label, policy=policy, backend=config.backend) for label, policy in policies.items()]
    tuned = Contender(REFERENCE, tuple(sorted({setting.lr for setting in grid("adamw", quick=config.quick)})))
    fixed = Contender(SAME)
    plan: list[tuple[str, Contender]] = [
        (name, c) for name in MEASUREMENTS for c in (*rules, fixed, *((tuned,) if name in TUNED else ()))
    ]
    figures: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    costs = [len(c.rates) * (1.0 if c.policy is None else 4.0) for _, c in plan]
    with one_thread():
        for i, (name, c) in enumerate(plan):
            measured = MEASUREMENTS[name](c, config.lengths(), config.seed_numbers())
            figures.setdefault(name, {})[c.name] = {key: [_plain(v) for v in row] for key, row in measured.items()}
            if progress is not None:
                what = f"{name}: {c.name}"
                progress(Progress(i + 1, len(plan), sum(costs[: i + 1]), sum(costs), what, False))
    return {
        "suite": "habits", "config": config.to_dict(), "lr": DEFAULT_LR, "torch": torch.__version__,
        "lengths": config.lengths()._asdict(), "seeds": list(config.seed_numbers()),
        "noise_steps": [t for t in NOISE_STEPS if t <= config.lengths().noise],
        "policies": {label: policy.fingerprint() for label, policy in policies.items()}, "figures": figures,
    }  # fmt: skip


def policy_names(config: HabitsConfig) -> list[str]:
    """The policies that are measured, the bundled ones first."""
    return list(dict.fromkeys([*(bundled() if config.bundled else ()), *config.policies]))


def noise(c: Contender, lengths: Lengths, seeds: Sequence[int]) -> Figures:
    """Root mean square of a step on gradients that are independent normal numbers, over the learning rate."""
    steps = lengths.noise
    recorded = {round(t) for t in np.geomspace(1, steps, 40)} | {t for t in NOISE_STEPS if t <= steps}

    def run(seed: int) -> Figures:
        rng = _rng("noise", seed)
        params = _leaves(_tensors(None))
        driver, figures = c.driver(params, steps, DEFAULT_LR), {}
        for t in range(1, steps + 1):
            before = _copies(params) if t in recorded else {}
            for p in params.values():
                p.grad = torch.randn(p.shape, generator=rng)
            driver.step(0.0)
            for name, old in before.items():
                figures[f"{name}, step {t}"] = [_rms(params[name] - old) / DEFAULT_LR]
        return figures

    return merged([run(seed) for seed in seeds])


def changes(c: Contender, lengths: Lengths, seeds: Sequence[int]) -> Figures:
    """Mean loss of a small network after each of several changes of its target, the optimizer kept or made anew."""

    def run(lr: float, seed: int, anew: bool) -> Figures:
        rng = _rng("changes", seed)
        params = _leaves(_network(rng, 10, 64, 1))
        driver, losses = None, []
        for _ in range(CHANGES + 1):
            # Of one length: no target is harder than the others, and the losses can be compared.
            weights = torch.nn.functional.normalize(torch.randn(10, 1, generator=rng), dim=0) * math.sqrt(10.0)
            if driver is None or anew:
                driver = c.driver(params, lengths.target, lr, decay=0.01)
            batches = (
                (x, torch.tanh(x @ weights)) for _ in range(lengths.target)
                for x in (torch.randn(64, 10, generator=rng),)
            )  # fmt: skip
            losses.append(fmean(_train(driver, params, batches)[: lengths.window]))
        after = losses[1:]
        return {**{f"change {i}": [loss] for i, loss in enumerate(after, start=1)}, "mean": [fmean(after)]}

    figures: Figures = {}
    for anew in (False, True):
        lr, best = c.at_best_rate(lambda lr, anew=anew: [run(lr, seed, anew) for seed in seeds], "mean")
        kind = "made anew, " if anew else ""
        figures |= {f"{kind}learning rate": [lr], **{kind + name: row for name, row in best.items()}}
    return figures


def good_start(c: Contender, lengths: Lengths, seeds: Sequence[int]) -> Figures:
    """Error of a linear model beyond that of the true weights, at which it starts; labels are noisy, batches small.

    It is the mean over the last tenth of the run.
    """

    def run(seed: int, part: float) -> float:
        rng = _rng("good start", seed)
        truth = torch.randn(10, 20, generator=rng) / math.sqrt(20.0)
        params = _leaves({"weight": truth.clone()})
        driver, excess = c.driver(params, lengths.good_start, part * DEFAULT_LR), []
        for _ in range(lengths.good_start):
            x = torch.randn(4, 20, generator=rng)
            y = x @ truth.T + torch.randn(4, 10, generator=rng)
            _update(driver, params, (x @ params["weight"].T - y).square().mean())
            excess.append(float((params["weight"].detach() - truth).square().sum(1).mean()))
        return fmean(excess[-max(1, len(excess) // 10) :])

    return {f"lr {part * DEFAULT_LR:.2g}": [run(seed, part) for seed in seeds] for part in PARTS}


def flips(c: Contender, lengths: Lengths, seeds: Sequence[int]) -> Figures:
    """A gradient that turns its sign at every step: how far parameters get, and how large the steps are, over lr."""

    def run(seed: int) -> Figures:
        rng = _rng("flips", seed)
        params = _leaves(_tensors(None))
        gradients = _tensors(rng)
        driver, figures = c.driver(params, lengths.flips, DEFAULT_LR), {}
        before = middle = _copies(params)
        for t in range(lengths.flips):
            before = _copies(params)
            middle = before if t == lengths.flips // 2 else middle
            for name, p in params.items():
                p.grad = gradients[name] * (-1.0) ** t
            driver.step(0.0)
        for name, p in params.items():
            # Halfway between the ends of the last step: the step itself is no way covered.
            figures[f"{name}, way from the start"] = [_rms((p + before[name]) / 2.0) / DEFAULT_LR]
            figures[f"{name}, way in the second half"] = [_rms(p - middle[name]) / DEFAULT_LR]
            figures[f"{name}, last step"] = [_rms(p - before[name]) / DEFAULT_LR]
        return figures

    return merged([run(seed) for seed in seeds])


def rates(c: Contender, lengths: Lengths, seeds: Sequence[int]) -> Figures:
    """A small regression with noisy labels, fresh batches: final error without noise, also at 10 lr and with a cosine.

    ``inf`` is a run that diverged: a loss that is not finite, or an error at the end above 1.5 times the first one.
    """

    def run(lr: float, seed: int, schedule: Schedule) -> float:
        rng = _rng("rates", seed)
        truth, params = _network(rng, 16, 32, 4, scale=2.0), _leaves(_network(rng, 16, 64, 4))
        held_out = torch.randn(2048, 16, generator=rng)

        def error() -> float:
            with torch.no_grad():
                return float((_output(params, held_out) - _output(truth, held_out)).square().mean())

        first = error()
        driver = c.driver(params, lengths.training, lr, schedule=schedule, decay=0.01)
        batches = (
            (x, _output(truth, x) + 0.3 * torch.randn(32, 4, generator=rng)) for _ in range(lengths.training)
            for x in (torch.randn(32, 16, generator=rng),)
        )  # fmt: skip
        finite = math.isfinite(_train(driver, params, batches)[-1])
        return last if finite and (last := error()) <= DIVERGED_ABOVE * first else math.inf

    def at(lr: float, schedule: Schedule) -> list[Figures]:
        return [{"error": [run(lr, seed, schedule)]} for seed in seeds]

    lr, best = c.at_best_rate(lambda lr: at(lr, "constant"), "error")
    return {
        "learning rate": [lr], "right lr": best["error"], "ten times lr": merged(at(LARGER * lr, "constant"))["error"],
        "cosine": merged(at(lr, "cosine"))["error"],
    }  # fmt: skip


MEASUREMENTS: Mapping[str, Measurement] = {
    "noise": noise, "changes": changes, "good start": good_start, "flips": flips, "rates": rates,
}  # fmt: skip
#: Those in which AdamW's learning rate can be tuned: in the others a smaller one is always better.
TUNED = ("changes", "rates")


def merged(runs: Sequence[Figures]) -> Figures:
    """Figures of several runs, side by side."""
    return {name: [value for run in runs for value in run[name]] for name in runs[0]}


def _train(driver: Driver, params: Params, batches: Iterator[tuple[Tensor, Tensor]]) -> list[float]:
    """Losses before each step; ends with ``inf`` at the first one that is not finite."""
    losses: list[float] = []
    data = list(batches)
    for i, (x, y) in enumerate(data):
        loss = (_output(params, x) - y).square().mean()
        losses.append(value if math.isfinite(value := loss.item()) else math.inf)
        if math.isinf(losses[-1]):
            break
        _update(driver, params, loss, i / len(data))
    return losses


def _update(driver: Driver, params: Params, loss: Tensor, done: float = 0.0) -> None:
    for p, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
        p.grad = grad
    driver.step(done)


def _network(rng: torch.Generator, inputs: int, width: int, outputs: int, scale: float = 1.0) -> Params:
    """Weights of a network with one hidden layer, as ``nn.Linear`` starts them, times ``scale``."""
    shapes = {"w1": (width, inputs), "b1": (width,), "w2": (outputs, width), "b2": (outputs,)}
    bounds = {"1": scale / math.sqrt(inputs), "2": scale / math.sqrt(width)}
    return {n: torch.empty(s).uniform_(-bounds[n[1]], bounds[n[1]], generator=rng) for n, s in shapes.items()}


def _output(params: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w1"].T + params["b1"]) @ params["w2"].T + params["b2"]


def _tensors(rng: torch.Generator | None) -> Params:
    """A matrix and a vector of as many entries: normal numbers, or zeros."""
    shapes = {"matrix": (32, 32), "vector": (1024,)}
    return {n: torch.zeros(s) if rng is None else torch.randn(s, generator=rng) for n, s in shapes.items()}


def _leaves(tensors: Params) -> Params:
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def _copies(params: Params) -> Params:
    return {name: p.detach().clone() for name, p in params.items()}


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


def _rng(measurement: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"habits/{measurement}/{seed}".encode()))


def _plain(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
