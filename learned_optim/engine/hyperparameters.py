"""Parameter groups: checks in torch.optim's own words, and the hyperparameters of a step."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor

from learned_optim.rule.types import Hyperparameters, StepScalars

T = TypeVar("T")

#: Keys of a parameter group without which there is no step, but for ``maximize``, which old states lack.
GROUP_KEYS = ("lr", "betas", "eps", "weight_decay")
#: Attributes of the optimizer that state and engine are made for.
FIXED = ("policy", "state_dtype", "safeguard", "skip_nonfinite", "capturable", "offload")
#: Types of most values; bool is neither.
_PLAIN = frozenset((float, int))


def hyperparameters(group: Mapping[str, Any], read: bool = True) -> Hyperparameters:
    """Those of a parameter group, as floats; each tensor is read once, which waits for a GPU.

    Called in every step, since anything may have been written into a group: plain numbers in range take a microsecond.

    Args:
        group: of the optimizer.
        read: without, tensors on a GPU stay what they are, unchecked, as steps need that are captured in a CUDA graph.

    Raises:
        TypeError, ValueError: those of torch.optim, for the first hyperparameter that is no number or out of range.
    """
    betas, maximize = group["betas"], group["maximize"]
    if type(betas) in (tuple, list) and len(betas) == 2 and (maximize is False or maximize is True):
        lr, (beta1, beta2), eps, weight_decay = group["lr"], betas, group["eps"], group["weight_decay"]
        if (
            _PLAIN.issuperset(map(type, (lr, beta1, beta2, eps, weight_decay)))
            and 0.0 <= lr < math.inf
            and 0.0 <= beta1 < 1.0
            and 0.0 <= beta2 < 1.0
            and 0.0 <= eps < math.inf
            and 0.0 <= weight_decay < math.inf
        ):
            return Hyperparameters(float(lr), float(beta1), float(beta2), float(eps), float(weight_decay))
    return _looked_at_closely(group, read)


def check_flags(**flags: Any) -> None:
    """Check arguments of the optimizer that are on or off.

    Raises:
        TypeError, ValueError: one is neither, or two do not go together.
    """
    for option, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"Invalid {option}: {value!r}; expected True or False")
    if flags["skip_nonfinite"] and flags["capturable"]:
        raise ValueError("skip_nonfinite=True waits to hear of every gradient, which capturable=True rules out")
    if flags["offload"] and flags["capturable"]:
        raise ValueError("offload=True copies state from and to the host in each step, which capturable=True rules out")


def of_groups(groups: Iterable[Mapping[str, Any]], read: bool = True) -> list[Hyperparameters]:
    """:func:`hyperparameters` of each; errors say of which."""
    return each_group(lambda group: hyperparameters(group, read), groups)


def each_group(look: Callable[[Mapping[str, Any]], T], groups: Iterable[Mapping[str, Any]]) -> list[T]:
    """What ``look`` says of each group; its errors, before anything was changed, say of which."""
    seen = []
    for number, group in enumerate(groups):
        try:
            seen.append(look(group))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (in param_groups[{number}]; nothing was changed)") from error
    return seen


def checked_new_group(group: dict[str, Any], defaults: Mapping[str, Any], others: Sequence[str]) -> dict[str, Any]:
    """A group as it is added: ``None`` is the default, and the policy is named in the optimizer's words.

    ``ZeroRedundancyOptimizer`` writes all arguments of the constructor into the groups, the policy as it was given.

    Args:
        group: as the user gives it.
        defaults: of the optimizer.
        others: further keys that are read.

    Raises:
        TypeError, ValueError: those of :func:`hyperparameters`; or the group asks for a policy of its own, whose name
            would only end up in checkpoints, which could not be loaded then.
    """
    unset = {name: defaults[name] for name in ("betas", "eps") if group.get(name, ...) is None}
    group = {**group, **unset}
    hyperparameters({**defaults, **group})
    _warn_of_misspelt_keys(group, [*defaults, *others])
    if "policy" not in group:
        return group
    asked, ours = group["policy"], defaults["policy"]
    fingerprint, _, source = ours.partition(" ")
    if hasattr(asked, "fingerprint"):
        same = asked.fingerprint() == fingerprint
    else:
        same = asked == ours or source.endswith((f"({asked})", f":{asked})", f"/{asked})"))
    if not same:
        raise ValueError(
            f"a parameter group asks for policy {asked!r}, the optimizer runs {ours!r}, the same for "
            "all groups: leave 'policy' out of the group, or make an optimizer for each policy"
        )
    return {**group, "policy": ours}


def _warn_of_misspelt_keys(group: Mapping[str, Any], known: Sequence[str]) -> None:
    """A group may hold anything, as those of torch may; what looks like a slip would have no effect."""
    for key in group:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.82)
        if key not in known and near:
            what = f"a parameter group has {key!r}, which is not read: did you mean {near[0]!r}?"
            warnings.warn(what, UserWarning, stacklevel=2)


def _looked_at_closely(group: Mapping[str, Any], read: bool) -> Hyperparameters:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    rate = _number("learning rate", lr, read)
    betas = group["betas"]
    if not isinstance(betas, Iterable) or isinstance(betas, str) or len(betas := tuple(betas)) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; expected two numbers or None")
    if len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise ValueError("betas must be either both floats or both Tensors")
    beta1, beta2 = (_number(f"beta parameter at index {i}", beta, read, below=1.0) for i, beta in enumerate(betas))
    eps = _number("epsilon value", group["eps"], read)
    weight_decay = _number("weight_decay value", group["weight_decay"], read)
    if group["maximize"] not in (True, False):
        raise TypeError(f"Invalid maximize: {group['maximize']!r}; expected True or False")
    return Hyperparameters(rate, beta1, beta2, eps, weight_decay)


def _number(what: str, value: Any, read: bool, below: float = math.inf) -> Any:
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"Invalid {what}: {value!r} ({type(value).__name__}); expected a number")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Invalid {what}: a Tensor of shape {tuple(value.shape)}; expected 1 element")
    if not read and isinstance(value, Tensor) and _is_on_gpu(value):
        return value.detach().double().view(())
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not 0.0 <= number < below:
        raise ValueError(f"Invalid {what}: {value}")
    return number


def on_host(value: Tensor) -> float | None:
    """A number that the host can read without waiting for a device."""
    return None if _is_on_gpu(value) else float(value)


def _is_on_gpu(value: Tensor) -> bool:
    return value.device.type != "cpu"


class StepContext:
    """A step t >= 1 under some hyperparameters; equal ones are the same object within a step."""

    def __init__(self, step: float, hyper: Hyperparameters) -> None:
        self.step: Any = step  # a number; on a device a 0-d tensor
        self.hyper = hyper
        self.scalars = StepScalars.at(step, hyper)
