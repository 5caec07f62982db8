"""Meta-training: make update rules by training them on tasks. Names are imported on first use.

config.py            what a run is made of
outer_loop.py        the loop, and ``meta_train``: start here
preflight.py         what is found out before a run begins
result.py            what it leaves behind
trajectories.py      which task, seed and length comes next, and how far it has come
estimators.py        back-propagation, ES, PES: from a trajectory to a meta-gradient
guided.py            ES in directions that back-propagation points out
imitation.py         back-propagation of how far updates are from a teacher's
estimator_choice.py  the one that a configuration names
meta_loss.py         what is minimised
time_ratio.py        the time one run takes over another's, which ES and validation compare
aggregate.py         many estimates into one meta-gradient
meta_optimizer.py    what makes a step of it
problem.py           a task as the unroll sees it
unroll.py            differentiable inner training
vectorized.py        many runs of one task as one batch of tensors
compiled_update.py   the update rule compiled for both
backend.py           whether that pays
validation.py        how good a policy is on other tasks
checkpoint.py        the folder of a run
distributed.py       several processes
signals.py           ends that wait for an outer step
progress.py          what the user sees; curves.py: the picture of a run
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learned_optim.meta_train.config import MetaTrainConfig as MetaTrainConfig
    from learned_optim.meta_train.outer_loop import meta_train as meta_train
    from learned_optim.meta_train.result import MetaTrainResult as MetaTrainResult

_WHERE = {"MetaTrainConfig": "config", "MetaTrainResult": "result", "meta_train": "outer_loop"}
__all__ = ["MetaTrainConfig", "MetaTrainResult", "meta_train"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'learned_optim.meta_train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"learned_optim.meta_train.{_WHERE[name]}"), name)
