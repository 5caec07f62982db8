"""A saved optimizer state: whether it fits, and how it arrives as it was saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from learned_optim.engine.collect import StateKeys, name_of
from learned_optim.engine.hyperparameters import GROUP_KEYS
from learned_optim.engine.kinds import KIND_KEYS, TensorKind
from learned_optim.engine.param_state import GUARDED_TENSOR_KEYS, SKIPPED, TENSOR_KEYS
from learned_optim.engine.sharding import is_dtensor
from learned_optim.engine.state_checks import check_fits


class AsSaved:
    """Hides a value from ``Optimizer.load_state_dict``, which would cast it to the parameter's dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value


def checked(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], policy: str, keys: Sequence[str]
) -> dict[str, Any]:
    """Check that a saved state fits the optimizer, and wrap its values so that they arrive as they were saved.

    What the tensors of a group are (:data:`KIND_KEYS`) belongs to the model: the optimizer's groups keep it.

    Args:
        state_dict: what was saved.
        groups: the optimizer's.
        policy: its fingerprint and source.
        keys: names of the state tensors that it keeps.

    Raises:
        ValueError: it does not fit.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        found = sorted(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"not an optimizer state: expected the keys 'state' and 'param_groups', found {found}")
    saved_groups = state_dict["param_groups"]
    for group in saved_groups:
        saved = group.get("policy")
        if not isinstance(saved, str):
            keys = sorted(k for k in group if k not in ("params", "param_names"))
            way = "start with a fresh optimizer"
            if "amsgrad" in group:
                way = (
                    "To go on from AdamW, load it into a torch.optim.AdamW of these parameters and call "
                    f"LearnedOptimizer.from_adamw(adamw), or {way}"
                )
            raise ValueError(
                f"this state was not saved by LearnedOptimizer: its parameter groups name no policy (keys {keys}). "
                f"{way[0].upper()}{way[1:]}"
            )
        if saved.partition(" ")[0] != policy.partition(" ")[0]:
            raise ValueError(
                f"this state was made by policy {saved}, the optimizer runs policy {policy}: "
                "construct LearnedOptimizer with the policy of the checkpoint, or start with a fresh optimizer"
            )
        if lacking := [key for key in GROUP_KEYS if key not in group]:
            raise ValueError(f"a parameter group of this state lacks {lacking}, which every step reads")
    saved_ids = [i for group in saved_groups for i in group["params"]]
    params = [(p, TensorKind.of(group)) for group in groups for p in group["params"]]
    sizes = ([len(g["params"]) for g in saved_groups], [len(g["params"]) for g in groups])
    if sizes[0] != sizes[1]:
        raise ValueError(f"the state's parameter groups hold {sizes[0]} parameters, the optimizer's hold {sizes[1]}")
    needed = ["step", *keys, *TENSOR_KEYS]
    state = dict(state_dict["state"])
    for key, (p, kind) in zip(saved_ids, params, strict=True):
        values = state.get(key)
        if not values:
            continue
        missing = [name for name in needed if name not in values]
        if missing:
            raise ValueError(f"the state of parameter {key!r} lacks {missing}")
        for name in keys:
            tensor = values[name]
            if not isinstance(tensor, Tensor) or tensor.shape != p.shape or tensor.is_complex() != p.is_complex():
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor)
                raise ValueError(
                    f"the state of parameter {key!r} holds as {name} {found}, "
                    f"the parameter is {p.dtype} of shape {tuple(p.shape)}"
                )
            if is_dtensor(tensor) != is_dtensor(p):
                kinds = ("a shard", "whole") if is_dtensor(tensor) else ("whole", "sharded (a DTensor)")
                raise ValueError(
                    f"the state of parameter {key!r} is {kinds[0]}, the parameter is {kinds[1]}: load it with "
                    "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which cuts and gathers"
                )
        numbers = kind.numbers(p)
        for name in TENSOR_KEYS:
            if (shape := tuple(torch.as_tensor(values[name]).shape)) != numbers:
                ours = f"shape {numbers}: stacked and split say that it holds {numbers[0]}" if numbers else "one tensor"
                raise ValueError(
                    f"the state of parameter {key!r} holds as {name} a tensor of shape {shape}, the parameter is "
                    f"{ours}. Give the groups the stacked and split that they were saved with"
                )
        state[key] = {name: AsSaved(value) for name, value in values.items()}
    saved_groups = [
        {**{k: v for k, v in saved.items() if k not in KIND_KEYS}, **{k: ours[k] for k in KIND_KEYS if k in ours}}
        for saved, ours in zip(saved_groups, groups, strict=True)
    ]
    return {**state_dict, "state": state, "param_groups": saved_groups}


def restored(keys: StateKeys, p: Any, key: str, value: Any) -> Any:
    """A saved value as an optimizer keeps it: torch itself would have cast it to the parameter's dtype."""
    if key == "step":
        return torch.as_tensor(value, dtype=torch.float32, device=keys.device_of_step(p)).detach().clone()
    if not isinstance(value, Tensor) or not isinstance(p, Tensor):
        return value
    if key not in keys.coordinate:
        return value.detach().to(device=p.device, copy=True)
    return keys.where_it_lies(p, value.detach().to(device=p.device, dtype=keys.dtype_of(p, key), copy=True))


#: Options of AdamW that say how it is run, and its betas and eps: the rule has its own.
_NOT_TAKEN_OVER = {
    "params", "param_names", "betas", "eps", "amsgrad", "foreach", "capturable", "differentiable", "fused",
    "decoupled_weight_decay",
}  # fmt: skip


def groups_of_adamw(adamw: Any, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """AdamW's parameter groups as :class:`learned_optim.LearnedOptimizer` takes them.

    Args:
        adamw: see :meth:`learned_optim.LearnedOptimizer.from_adamw`.
        options: what is given for all groups in place of what AdamW has.

    Raises:
        TypeError: it is another optimizer.
        ValueError: it adds weight decay to the gradient.
    """
    if not isinstance(adamw, torch.optim.Adam | torch.optim.AdamW):
        raise TypeError(f"from_adamw takes a torch.optim.AdamW or torch.optim.Adam, found {type(adamw).__name__}")
    groups = []
    for group in adamw.param_groups:
        decoupled = group.get("decoupled_weight_decay", isinstance(adamw, torch.optim.AdamW))
        if not decoupled and float(group["weight_decay"]) != 0.0:
            raise ValueError(
                "this Adam adds weight decay to the gradient, so that its moments are not those of the gradient: "
                "start with a fresh LearnedOptimizer, or pass an AdamW or an Adam with weight_decay=0"
            )
        taken = {key: value for key, value in group.items() if key not in {*_NOT_TAKEN_OVER, *options}}
        if "initial_lr" in taken and "lr" in options:
            taken["initial_lr"] = options["lr"]  # what a schedule that goes on multiplies
        for key in {"lr", "initial_lr"} & taken.keys():
            taken[key] = taken[key].clone() if isinstance(taken[key], Tensor) else taken[key]
        names = group.get("param_names")
        params = list(zip(names, group["params"], strict=True)) if names else list(group["params"])
        groups.append({**taken, "params": params})
    return groups


def state_of_adamw(adamw: Any, groups: Sequence[Mapping[str, Any]], keys: StateKeys) -> dict[Tensor, dict[str, Tensor]]:
    """Copies of AdamW's moments and step counts as state of this optimizer, by parameter.

    Args:
        adamw: as for :func:`groups_of_adamw`.
        groups: those made of it.
        keys: what is kept.

    Raises:
        RuntimeError: AdamW's own state does not fit its parameters.
    """
    states: dict[Tensor, dict[str, Tensor]] = {}
    for g, (theirs, ours) in enumerate(zip(adamw.param_groups, groups, strict=True)):
        for i, p in enumerate(theirs["params"]):
            saved = adamw.state.get(p)
            if not saved or float(saved.get("step", 0.0)) == 0.0:
                continue
            step = float(saved["step"])
            saved = {**saved, "step": torch.tensor(step, dtype=torch.float32, device="cpu")}
            check_fits(name_of(groups, (g, i)), p, saved, ("exp_avg", "exp_avg_sq"), ())
            state = states[p] = keys.missing(p, {}, TensorKind.of(ours).numbers(p))
            state["step"].fill_(step)
            state["age"].fill_(step)
            for key, mine, other in zip(("exp_avg", "exp_avg_sq"), ours["betas"], theirs["betas"], strict=True):
                # So that the bias-corrected moment is the same, whatever the decay rate.
                state[key].copy_(saved[key]).mul_((1.0 - float(mine) ** step) / (1.0 - float(other) ** step))
    return states


def without_pieces_of_fsdp(saved: dict[str, Any], params: Iterable[Tensor]) -> dict[str, Any]:
    """What ``Optimizer.state_dict`` returned, with the per-tensor state of classic FSDP's flat pieces set to 0.

    Every process has another one for its piece, which FSDP refuses to save. The age becomes the step count, which is
    the same in all of them: a tensor of age 0 would throw its hidden state away.
    """
    for key, p in enumerate(params):
        if getattr(p, "_fsdp_flattened", False) and key in saved["state"]:
            values = saved["state"][key]
            own = [name for name in values if name in (*GUARDED_TENSOR_KEYS, SKIPPED)]
            zeros = {name: torch.zeros_like(values[name]) for name in own}
            age = torch.full_like(values["age"], float(values["step"]))
            saved["state"][key] = {**values, **zeros, "age": age}
    return saved
