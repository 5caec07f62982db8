"""Fine-tune the bundled rule on two tasks of your own, for about ten minutes, and compare on seeds it has not seen.

    python examples/meta_train_two_tasks.py

A perceptron that predicts from twelve sensors, and a small convolutional network that tells strokes apart, each made of
an ordinary ``nn.Module`` and with held-out data. All settings of ``MetaTrainConfig`` but their number of outer steps
are the defaults.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from learned_optim import LearnedOptimizer, Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.time_ratio import Outcome, compare, held_out_steps
from learned_optim.tasks import ModuleTask
from learned_optim.tasks.rollout import Curve, train

UNSEEN = 2**40  # the first of the seeds that meta-training does not draw
Data = tuple[Tensor, Tensor]


@cache
def readings(part: int) -> Data:
    """A thousand readings of twelve sensors, and a noisy function of them."""
    x = torch.randn(1000, 12, generator=torch.Generator().manual_seed(part))
    a, b, c = (x @ torch.randn(12, 3, generator=torch.Generator().manual_seed(99)) / math.sqrt(12)).split(1, dim=1)
    return x, (2 * a).sin() + b * c + 0.3 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(50 + part))


@cache
def strokes(part: int) -> Data:
    """A thousand noisy pictures of a row, a column or a diagonal of either kind."""
    rng = torch.Generator().manual_seed(part)
    kinds, images = torch.randint(4, (1000,), generator=rng), torch.zeros(1000, 1, 12, 12)
    at = torch.arange(12)
    for image, kind, shift in zip(images, kinds.tolist(), torch.randint(2, 10, (1000,), generator=rng), strict=True):
        rows, columns = ((shift, at), (at, shift), (at, (at + shift) % 12), (at, (shift - at) % 12))[kind]
        image[0, rows, columns] = 1.0
    return images + 0.7 * torch.randn(images.shape, generator=rng), kinds


def batches_of(data: Data, rng: torch.Generator) -> Iterator[Data]:
    while True:
        index = torch.randint(len(data[0]), (32,), generator=rng)
        yield data[0][index], data[1][index]


SENSORS = ModuleTask(
    lambda: nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)),
    lambda rng: batches_of(readings(0), rng),
    lambda net, batch: functional.mse_loss(net(batch[0]), batch[1]),
    name="sensors", length=200, eval_batch=lambda: readings(1),
)  # fmt: skip
STROKES = ModuleTask(
    lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 4),
    ),
    lambda rng: batches_of(strokes(0), rng),
    lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1]),
    name="strokes", length=150, eval_batch=lambda: strokes(1),
)  # fmt: skip


class Gain(NamedTuple):
    """What a policy gains over another on a task: one number per seed."""

    log_speedup: list[float]
    held_out: list[float]  #: held-out loss at the end, over the other's


def runs(policy: Policy, task: ModuleTask, seeds: int) -> list[Curve]:
    """The task trained with seeds that meta-training does not draw."""
    at = held_out_steps(task.length)
    make = lambda params: LearnedOptimizer(params, policy=policy)  # noqa: E731
    return [train(task, UNSEEN + seed, make, task.length, evaluate_at=at) for seed in range(seeds)]


def gain(after: list[Curve], before: list[Curve]) -> Gain:
    pairs = list(zip(after, before, strict=True))
    outcomes = [tuple(Outcome.of(run.losses, run.held_out_along) for run in pair) for pair in pairs]
    return Gain([-compare(*pair) for pair in outcomes], [a.held_out_along[-1] / b.held_out_along[-1] for a, b in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outer-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=10, help="unseen ones to compare on")
    parser.add_argument("--out", default=None, help="folder for the run and the policy")
    args = parser.parse_args()
    torch.set_num_threads(1)  # for networks as small as these, several are slower
    config = MetaTrainConfig(outer_steps=args.outer_steps, start="default")
    result = meta_train(config, tasks=[SENSORS, STROKES], out=args.out)
    for task in (SENSORS, STROKES):
        before = runs(Policy.from_pretrained("default"), task, args.seeds)
        logs, held_out = gain(runs(result.policy, task, args.seeds), before)
        speedup, ratio = math.exp(statistics.fmean(logs)), math.exp(statistics.fmean(map(math.log, held_out)))
        better = sum(log > 0.0 for log in logs)
        print(
            f"{task.name}: {speedup:.2f} times as fast as before (faster on {better} of {args.seeds} unseen seeds), "
            f"held-out loss {ratio:.2f} of what it was"
        )


if __name__ == "__main__":
    main()
