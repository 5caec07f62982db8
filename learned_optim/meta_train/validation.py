"""How good a policy is on tasks it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from learned_optim.cells import Hyperparameters
from learned_optim.meta_train import distributed
from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.estimators import run_plan
from learned_optim.meta_train.problem import FromInit
from learned_optim.meta_train.trajectories import Plan, seed_of
from learned_optim.policy import Policy
from learned_optim.tasks import TaskFamily
from learned_optim.tasks.base import Task, Tensors
from learned_optim.tasks.rollout import smoothed

#: Log-loss that a diverged run counts as, above the loss it started from.
DIVERGED = 3.0


def validate(
    policy: Policy,
    families: Sequence[TaskFamily | Task],
    config: MetaTrainConfig,
    backend: str,
    init: Tensors | None = None,
) -> dict[str, float]:
    """Train the validation tasks, always the same ones, at ``config.inner_lr``.

    Args:
        policy: to train them with.
        families: what to train; ``config.validation_seeds`` tasks of each.
        config: lengths and learning rate. With ``held_out`` the loss is that on held-out data, where there is any.
        backend: how the update rule is run.
        init: learned initial parameters, in place of the tasks' own.

    Returns:
        By ``family/seed``: log of the final training loss, smoothed, or of the held-out one. In several processes
        each trains its share.
    """
    wanted = [(family, seed) for family in families for seed in range(config.validation_seeds)]
    results = []
    for i in distributed.mine(len(wanted)):
        family, seed = wanted[i]
        task = family.task(seed) if isinstance(family, TaskFamily) else family
        if init is not None:
            task = FromInit(task, init)
        length = min(task.length, config.validation_length) if config.validation_length else task.length
        betas, eps = policy.config.betas, policy.config.eps
        hyper = Hyperparameters(config.inner_lr, *betas, eps, config.inner_weight_decay)
        plan = Plan(family.name, task, seed_of("validation", seed), length, hyper)
        curve = run_plan(policy, plan, length, backend, config.held_out)
        start = math.log(max(curve.losses[0], 1e-10))
        final = smoothed(curve.losses, length) if curve.held_out is None else curve.held_out
        end = start + DIVERGED if curve.diverged or not math.isfinite(final) else math.log(max(final, 1e-10))
        results.append((i, f"{family.name}/{seed}", end))
    return {name: value for _, name, value in sorted(distributed.gather(results))}


def mean_difference(after: dict[str, float], before: dict[str, float]) -> float:
    """Mean over tasks of the change in log-loss; negative is better."""
    return sum(after[name] - before[name] for name in after) / len(after)
