"""What makes a step of the meta-gradient: any optimizer of torch, or a learned one."""

from __future__ import annotations

import torch
from torch import Tensor

from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.optimizer import LearnedOptimizer


def meta_optimizer(config: MetaTrainConfig, params: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of the meta-parameters that the configuration names.

    Raises:
        ValueError: there is no such class.
    """
    if config.meta_optimizer == "LearnedOptimizer":
        return LearnedOptimizer(params, lr=config.meta_lr, weight_decay=0.0)
    known = {name: cls for name, cls in vars(torch.optim).items() if isinstance(cls, type)}
    cls = known.get(config.meta_optimizer)
    if cls is None or not issubclass(cls, torch.optim.Optimizer):
        names = sorted(n for n, c in known.items() if issubclass(c, torch.optim.Optimizer) and n != "Optimizer")
        raise ValueError(
            f"unknown meta_optimizer {config.meta_optimizer!r}; known are LearnedOptimizer, {', '.join(names)}"
        )
    return cls(params, lr=config.meta_lr)  # pyright: ignore[reportCallIssue]
