"""Meta-train the update rule on a task of your own, and compare on seeds that it has not seen.

    python examples/meta_train_own_task.py

The task is a plain class: initial parameters, batches, loss. One line meta-trains on it.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from learned_optim import LearnedOptimizer, Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.tasks.rollout import smoothed, train

INNER_LR = 1e-3


class Spirals:
    """Two spirals, told apart by a network with one hidden layer."""

    name, length = "spirals", 100

    def init(self, rng: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        w1, w2 = (torch.randn(i, o, generator=rng) / math.sqrt(i) for i, o in ((2, 64), (64, 1)))
        return {"w1": w1, "b1": torch.randn(64, generator=rng), "w2": w2, "b2": torch.zeros(1)}, {}

    def batches(self, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            side = torch.randint(2, (64,), generator=rng)
            angle = 6 * torch.rand(64, generator=rng)
            phase = angle + math.pi * side
            yield torch.stack([phase.cos(), phase.sin()], 1) * angle[:, None] / 3, side.float()[:, None]

    def loss(self, params: dict[str, Tensor], buffers: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = (batch[0] @ params["w1"] + params["b1"]).relu()
        outputs = hidden @ params["w2"] + params["b2"]
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, batch[1])


def final_losses(policy: Policy, seeds: int) -> list[float]:
    """The training loss at the end, smoothed, for seeds that meta-training does not draw."""
    losses = []
    for seed in range(seeds):
        curve = train(Spirals(), 2**40 + seed, lambda p: LearnedOptimizer(p, lr=INNER_LR, policy=policy), 100)
        losses.append(smoothed(curve.losses, 100))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", default="default", help="policy to begin with: bundled, a folder or on the Hub")
    parser.add_argument("--outer-steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=10, help="unseen ones to compare on")
    parser.add_argument("--out", default=None, help="folder for the run and the policy")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, found {args.seeds}")
    torch.set_num_threads(1)  # for networks as small as these, several are slower
    config = MetaTrainConfig(outer_steps=args.outer_steps, start=args.start, inner_lr=INNER_LR)
    result = meta_train(config, tasks=[Spirals()], out=args.out)
    before = final_losses(Policy.from_pretrained(args.start), args.seeds)
    after = final_losses(result.policy, args.seeds)
    for name, losses in ((args.start, before), ("meta-trained", after)):
        spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
        print(f"{name:>14}: loss {statistics.fmean(losses):.4f} ± {spread:.4f} over {args.seeds} unseen seeds")
    better = sum(a < b for a, b in zip(after, before, strict=True))
    print(f"better on {better} of {args.seeds}")


if __name__ == "__main__":
    main()
