"""Two experiments of "Learning to learn by gradient descent by gradient descent" (Andrychowicz et al. 2016), in small.

    python examples/article_experiments.py --out article

A GRU per coordinate, with random weights, is trained by back-propagation through windows of 20 of 100 inner steps: on
random quadratics of ten dimensions, and on a network with one hidden layer of 20 units that classifies drawn shapes.
On instances it has not seen it is compared with SGD and Adam, each at the best of nine learning rates for these very
instances. Prints final losses, and draws the curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.tasks import ModuleTask, TaskFamily
from learned_optim.tasks.data_images import preprocess, shapes
from learned_optim.tasks.rollout import train

STEPS, FRESH = 100, 1_000_000  # inner steps; seeds from here on are not drawn in meta-training
RATES = [10 ** (exponent / 2) for exponent in range(-6, 3)]


class Quadratics:
    """Sums of |W theta - y|^2 (normal W, y, theta). The rule sees one tensor at a time: several just save time."""

    name, length = "quadratics", STEPS

    def __init__(self, rng: torch.Generator, count: int) -> None:
        self.w, self.y = torch.randn(count, 10, 10, generator=rng), torch.randn(count, 10, generator=rng)

    def init(self, rng: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {f"theta{i}": torch.randn(10, generator=rng) for i in range(len(self.w))}, {}

    def batches(self, rng: torch.Generator) -> Iterator[Tensor]:
        while True:
            yield self.y

    def loss(self, params: dict[str, Tensor], buffers: dict[str, Tensor], batch: Tensor) -> Tensor:
        theta = torch.stack(list(params.values()))
        return (torch.einsum("kij,kj->ki", self.w, theta) - batch).square().sum()


@cache
def images() -> tuple[Tensor, Tensor]:
    pictures, labels = shapes(torch.Generator().manual_seed(0), 4000, 10, 12)
    return preprocess(pictures, "standardised").flatten(1), labels


def image_network(_: torch.Generator) -> ModuleTask:
    def batches(rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = images()
        while True:
            index = torch.randint(len(x), (64,), generator=rng)
            yield x[index], y[index]

    return ModuleTask(
        lambda: nn.Sequential(nn.Linear(144, 20), nn.Sigmoid(), nn.Linear(20, 10)), batches,
        lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]), length=STEPS,
    )  # fmt: skip


CONFIG = MetaTrainConfig(
    start="gru", estimator="backprop", unroll_length=20, max_length=STEPS, inner_weight_decay=0.0, validate_every=20,
    validation_seeds=20, validation_length=STEPS,
)  # fmt: skip
EIGHT = TaskFamily("eight quadratics", "", "train", lambda rng: Quadratics(rng, 8))
ONE = TaskFamily("one quadratic", "", "validation", lambda rng: Quadratics(rng, 1))
NETWORK = TaskFamily("network", "", "train", image_network)
#: What is trained on, what is compared on, settings.
EXPERIMENTS = {
    "quadratics": (EIGHT, ONE, {"inner_lr": 0.7, "meta_lr": 0.03, "meta_batch": 2, "outer_steps": 300}),
    "network": (NETWORK, NETWORK, {"inner_lr": 0.03, "meta_lr": 0.02, "meta_batch": 4, "outer_steps": 200}),
}


def curves(family: TaskFamily, make: Callable[[list[Tensor]], Any], count: int) -> Tensor:
    """Losses on fresh instances, [count, STEPS]."""
    return torch.tensor([train(family.task(FRESH + i), FRESH + i, make, STEPS).losses for i in range(count)])


def compare(family: TaskFamily, policy: Policy, inner_lr: float, count: int) -> dict[str, Tensor]:
    losses = {}
    for cls in (torch.optim.SGD, torch.optim.Adam):
        tried = {lr: curves(family, lambda p, lr=lr, cls=cls: cls(p, lr=lr), count) for lr in RATES}
        best = min(tried, key=lambda lr: float(tried[lr][:, -1].mean().nan_to_num(math.inf)))
        losses[f"{cls.__name__}, lr {best:.2g}"] = tried[best]
    learned = lambda p: LearnedOptimizer(p, lr=inner_lr, weight_decay=0.0, policy=policy)  # noqa: E731
    return losses | {"learned": curves(family, learned, count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("article"), help="folder for curves.png")
    parser.add_argument("--outer-steps", type=int, help="instead of each experiment's own number")
    parser.add_argument("--instances", type=int, default=40, help="fresh ones to compare on")
    args = parser.parse_args()
    torch.set_num_threads(1)  # for networks as small as these, several are slower
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, (family, fresh, settings)) in zip(figure.subplots(1, 2), EXPERIMENTS.items(), strict=True):
        config = dataclasses.replace(CONFIG, **settings)
        if args.outer_steps:
            config = dataclasses.replace(config, outer_steps=args.outer_steps)
        policy = meta_train(config, tasks=[family], validation=[fresh]).policy
        for label, losses in compare(fresh, policy, config.inner_lr, args.instances).items():
            final = losses[:, -1]
            figures = f"{final.mean():.4f} ± {final.std():.4f}, geometric mean {final.log().mean().exp():.4f}"
            print(f"{name:>10}, {label:>15}: final loss {figures}", flush=True)
            (line,) = axes.plot(losses.median(0).values, label=label)
            quartiles = losses.quantile(torch.tensor([0.25, 0.75]), 0)
            axes.fill_between(range(STEPS), *quartiles, alpha=0.2, color=line.get_color(), lw=0)
        axes.set(
            title=f"{name}: median and middle half of {args.instances} runs",
            xlabel="inner step",
            ylabel="loss",
            yscale="log",
        )
        axes.legend(frameon=False)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
