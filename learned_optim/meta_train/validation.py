"""How good a policy is on tasks it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from learned_optim.meta_train import distributed
from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.estimators import run_plan
from learned_optim.meta_train.problem import FromInit
from learned_optim.meta_train.time_ratio import Outcome, compare
from learned_optim.meta_train.trajectories import Plan, hyperparameters, seed_of
from learned_optim.policy.policy import Policy
from learned_optim.tasks import TaskFamily
from learned_optim.tasks.base import Task, Tensors

#: That validation is made of where the configuration leaves the number of seeds open.
USUAL_RUNS = 8


def validate(
    policy: Policy,
    families: Sequence[TaskFamily | Task],
    config: MetaTrainConfig,
    backend: str,
    init: Tensors | None = None,
) -> dict[str, Outcome]:
    """Train the validation tasks, always the same ones, at ``config.inner_lr``.

    Args:
        policy: to train them with.
        families: what to train; ``config.validation_seeds`` tasks of each, or as many as make ``USUAL_RUNS`` runs.
        config: lengths and learning rate.
        backend: how the update rule is run.
        init: learned initial parameters, in place of the tasks' own.

    Returns:
        By ``family/seed`` what :func:`mean_difference` compares. In several processes each trains its share.

    Raises:
        RuntimeError: a task raised; named.
    """
    seeds = config.validation_seeds or math.ceil(USUAL_RUNS / max(len(families), 1))
    wanted = [(family, seed) for family in families for seed in range(seeds)]
    results = []
    for i in distributed.mine(len(wanted)):
        family, seed = wanted[i]
        task = family.task(seed) if isinstance(family, TaskFamily) else family
        if init is not None:
            task = FromInit(task, init)
        length = min(task.length, config.validation_length) if config.validation_length else task.length
        hyper = hyperparameters(policy.config, config.inner_lr, config.inner_weight_decay)
        plan = Plan(family.name, task, seed_of("validation", seed), length, hyper)
        try:
            curve = run_plan(policy, plan, length, backend, config.held_out_share > 0.0)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"task {task.name!r} raised in validation: {what}") from error
        results.append((i, f"{family.name}/{seed}", Outcome.of(curve.losses, curve.held_out_along)))
    return {name: value for _, name, value in sorted(distributed.gather(results))}


def mean_difference(after: dict[str, Outcome], before: dict[str, Outcome], held_out_share: float = 0.0) -> float:
    """Mean over tasks of the logarithm of the time taken, of what was before: -0.1 is ten per cent fewer steps.

    Negative is better; see :func:`~learned_optim.meta_train.time_ratio.compare` for ``held_out_share``.
    """
    return sum(compare(after[name], before[name], held_out_share) for name in after) / len(after)
