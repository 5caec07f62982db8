"""Whether a meta-training run compiles its update rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from learned_optim.engine.kernels import find_compiler
from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.rule.cells import CELLS
from learned_optim.rule.config import PolicyConfig
from learned_optim.tasks import TaskFamily
from learned_optim.tasks.base import Task

#: Inner steps from which ``auto`` compiles. Compiled, an inner step is some 2 ms shorter; the kernels of whole
#: trajectories take 20 to 30 s to make, those of the unroll with their backward pass about a minute.
WORTH_COMPILING = {
    "es": 10_000, "guided": 30_000, "pes": 30_000, "backprop": 30_000, "mixed": 30_000,
    "imitation": math.inf,  # not made for it
}  # fmt: skip

#: What the length of a family's tasks is taken to be.
USUAL_LENGTH = 400


def chosen_backend(
    config: MetaTrainConfig, policy: PolicyConfig, tasks: Sequence[Task | TaskFamily]
) -> Literal["eager", "compiled"]:
    """What ``config.backend`` stands for; ``auto`` depends on the planned work and on whether there is a compiler.

    A checkpoint keeps the choice, so that a resumed run ends with the bytes of an undisturbed one.
    """
    if config.backend != "auto":
        return config.backend
    if not CELLS[policy.cell].is_mixture or find_compiler(config.device) is None:
        return "eager"
    return "compiled" if planned_inner_steps(config, tasks) >= WORTH_COMPILING[config.estimator] else "eager"


def planned_inner_steps(config: MetaTrainConfig, tasks: Sequence[Task | TaskFamily]) -> int:
    """Inner steps that a run makes, about, validation aside."""
    if config.compares_runs:
        lengths = [USUAL_LENGTH if isinstance(task, TaskFamily) else task.length for task in tasks]
        length = fmean(min(length, config.max_length or length) for length in lengths)
        return round(config.outer_steps * config.meta_batch * config.pairs * 2 * length)
    runs = {"backprop": 1.0, "imitation": 1.0, "pes": 2.0, "mixed": 1.5}[config.estimator]
    return int(config.outer_steps * config.meta_batch * config.unroll_length * runs)
