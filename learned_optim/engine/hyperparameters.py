"""Parameter groups: checks in torch.optim's own words, and the hyperparameters of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from learned_optim.rule.types import Hyperparameters, StepScalars


def check_group(group: Mapping[str, Any]) -> None:
    """Raise the error that torch.optim would, for the first hyperparameter out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    _check_number("learning rate", lr)
    betas = group["betas"]
    if not isinstance(betas, Iterable) or isinstance(betas, str) or len(tuple(betas)) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; expected two numbers or None")
    if len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        _check_number(f"beta parameter at index {i}", beta, below=1.0)
    _check_number("epsilon value", group["eps"])
    _check_number("weight_decay value", group["weight_decay"])
    if group["maximize"] not in (True, False):
        raise TypeError(f"Invalid maximize: {group['maximize']!r}; expected True or False")


def _check_number(what: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"Invalid {what}: {value!r} ({type(value).__name__}); expected a number")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Invalid {what}: a Tensor of shape {tuple(value.shape)}; expected 1 element")
    if not 0.0 <= number(value) < below:
        raise ValueError(f"Invalid {what}: {value}")


def number(value: Any) -> float:
    """A number, or a tensor of one element, as a float."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    """Those of a parameter group, as floats."""
    beta1, beta2 = group["betas"]
    return Hyperparameters(*map(number, (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])))


class StepContext:
    """A step t >= 1 under some hyperparameters; equal ones are the same object within a step."""

    def __init__(self, step: float, hyper: Hyperparameters) -> None:
        self.step, self.hyper = step, hyper
        self.scalars = StepScalars.at(step, hyper)
        self.for_directions = self.scalars.for_directions()
