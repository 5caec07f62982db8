"""Meta-training: make update rules by training them on tasks. Names are imported on first use.

config.py         what a run is made of
problem.py        a task as the unroll sees it
unroll.py         differentiable inner training
meta_loss.py      what is minimised
trajectories.py   which task, seed and length comes next
estimators.py     back-propagation, ES, PES
combine.py        many estimates into one meta-gradient
outer_loop.py     the loop, and ``meta_train``
validation.py     how good a policy is on other tasks
checkpoint.py     the folder of a run
distributed.py    several processes
progress.py       what the user sees
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learned_optim.meta_train.config import MetaTrainConfig as MetaTrainConfig
    from learned_optim.meta_train.outer_loop import MetaTrainResult as MetaTrainResult
    from learned_optim.meta_train.outer_loop import meta_train as meta_train

_WHERE = {"MetaTrainConfig": "config", "MetaTrainResult": "outer_loop", "meta_train": "outer_loop"}
__all__ = ["MetaTrainConfig", "MetaTrainResult", "meta_train"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'learned_optim.meta_train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"learned_optim.meta_train.{_WHERE[name]}"), name)
