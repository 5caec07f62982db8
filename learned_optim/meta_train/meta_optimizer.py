"""What makes a step of the meta-gradient: any optimizer of torch, or a learned one."""

from __future__ import annotations

import torch
from torch import Tensor

from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.optimizer import LearnedOptimizer

#: Of ``torch.optim``: the base class, one that evaluates a closure, and one for sparse gradients.
_UNFIT = ("Optimizer", "LBFGS", "SparseAdam")


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of that name.

    Raises:
        ValueError: there is none, or it cannot make steps of a meta-gradient.
    """
    known: dict[str, type[torch.optim.Optimizer]] = {"LearnedOptimizer": LearnedOptimizer}
    for of_torch, cls in sorted(vars(torch.optim).items()):
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and of_torch not in _UNFIT:
            known[of_torch] = cls
    if name not in known:
        raise ValueError(f"unknown meta_optimizer {name!r}; known are {', '.join(sorted(known))}")
    return known[name]


def meta_optimizer(config: MetaTrainConfig, params: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of the meta-parameters that the configuration names.

    Raises:
        ValueError: that of :func:`optimizer_class`.
    """
    cls = optimizer_class(config.meta_optimizer)
    if cls is LearnedOptimizer:
        return LearnedOptimizer(params, lr=config.meta_lr, weight_decay=0.0)
    return cls(params, lr=config.meta_lr)  # pyright: ignore[reportCallIssue]
