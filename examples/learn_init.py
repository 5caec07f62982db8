"""Learn the initial parameters of a network: few-shot regression of sinusoids (Finn et al. 2017).

    python examples/learn_init.py

The loss after five inner steps is back-propagated to the parameters that they began with. From these, five steps on
ten points of a new sinusoid go much further than from an ordinary initialisation.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.problem import FromInit
from learned_optim.tasks import ModuleTask, TaskFamily
from learned_optim.tasks.rollout import train

STEPS = 5
#: Plain gradient descent: where eps is this large, Adam's direction is the gradient over eps.
GRADIENT_DESCENT, INNER_LR = PolicyConfig.adamw(betas=(0.0, 0.999), eps=1000.0), 0.02 * 1000.0


def sinusoid(rng: torch.Generator) -> ModuleTask:
    """Ten points to learn from, the same in every step; a hundred others to be judged by."""
    amplitude, phase = 0.1 + 4.9 * torch.rand((), generator=rng), math.pi * torch.rand((), generator=rng)

    def points(count: int) -> tuple[Tensor, Tensor]:
        x = 10 * torch.rand(count, 1, generator=rng) - 5
        return x, amplitude * (x + phase).sin()

    support, query = points(10), points(100)
    return ModuleTask(
        lambda: nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)),
        lambda _: iter(lambda: support, None), lambda net, batch: (net(batch[0]) - batch[1]).square().mean(),
        length=STEPS, eval_batch=query,
    )  # fmt: skip


SINUSOIDS = TaskFamily("sinusoids", "amplitude 0.1 to 5, phase 0 to pi, 10 points", "train", sinusoid)


def loss_after_steps(policy: Policy, init: dict[str, Tensor] | None, count: int) -> float:
    """Mean loss on the other points of fresh sinusoids, after the inner steps."""

    def optimizer(params: list[Tensor]) -> LearnedOptimizer:
        return LearnedOptimizer(params, lr=INNER_LR, weight_decay=0.0, policy=policy)

    total = 0.0
    for i in range(count):
        task = SINUSOIDS.task(1_000_000 + i)
        if init is not None:
            task = FromInit(task, init)
        total += train(task, i, optimizer, STEPS, held_out=True).held_out or 0.0
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outer-steps", type=int, default=800)
    parser.add_argument("--tasks", type=int, default=200, help="fresh sinusoids to compare on")
    args = parser.parse_args()
    torch.set_num_threads(1)  # for networks as small as these, several are slower
    config = MetaTrainConfig(
        learn="init", estimator="backprop", second_order=True, meta_loss="final", held_out_share=1.0,
        unroll_length=STEPS, max_length=STEPS, inner_lr=INNER_LR, inner_weight_decay=0.0,
        outer_steps=args.outer_steps, meta_lr=3e-3, validate_every=0,
    )  # fmt: skip
    result = meta_train(config, tasks=[SINUSOIDS], start=Policy(GRADIENT_DESCENT))
    usual, learned = (loss_after_steps(result.last, init, args.tasks) for init in (None, result.init))
    print(f"loss after {STEPS} steps on {args.tasks} new sinusoids: {usual:.3f} from the usual initialisation,")
    print(f"{learned:.3f} from the learned one: {usual / learned:.1f} times less")


if __name__ == "__main__":
    main()
