"""The optimizers of the quality suite, the grids they are tuned over, and how each is built and driven."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim.optimizer import LearnedOptimizer
from learned_optim.policy.policy import Policy
from learned_optim.tasks.recipe import cosine

Schedule = Literal["constant", "cosine"]
Memory = Literal["kept", "reset", "none"]
OptimizerName = Literal["adamw", "schedule-free", "muon", "soap", "sgd", "learned"]

_OURS = inspect.signature(LearnedOptimizer).parameters
#: What ``LearnedOptimizer(params)`` takes if nothing is said.
DEFAULT_LR: float = _OURS["lr"].default
DEFAULT_WEIGHT_DECAY: float = _OURS["weight_decay"].default

_EMBEDDINGS, _OUTPUTS = ("embed", "position"), ("output", "head")


@dataclasses.dataclass(frozen=True)
class Setting:
    """An optimizer with everything that shapes its run; part of the key under which the run is kept.

    Args:
        optimizer: which one. ``muon`` orthogonalises the updates of hidden matrices and leaves the rest to AdamW at the
            same learning rate, with updates of AdamW's size (``adjust_lr_fn="match_rms_adamw"``). ``soap`` is Adam in
            the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321), with the paper's betas of
            0.95 and a new basis every 10 steps; sides longer than ``SOAP_LARGEST`` stay as they are.
        lr: learning rate, in the optimizer's own unit.
        schedule: constant, or a cosine decay to zero over the run.
        warmup: part of the run over which the learning rate grows linearly (``schedule-free`` only, which has its own).
        weight_decay: decoupled, except for ``sgd``, where it is the gradient of an L2 penalty.
        momentum: of ``sgd``.
        policy: fingerprint of the policy (``learned`` only).
        memory: ``kept``; ``reset``: the hidden state is zeroed before every step; ``none``: the hidden state is the
            present normalised gradient, an average over one step (``learned`` only).
        backend: as in ``LearnedOptimizer`` (``learned`` only).
    """

    optimizer: OptimizerName
    lr: float
    schedule: Schedule = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.01
    momentum: float = 0.0
    policy: str = ""
    memory: Memory = "kept"
    backend: str = ""

    def __str__(self) -> str:
        warm = f", warm-up {self.warmup:.0%}" if self.warmup else ""
        return f"lr {self.lr:g} {self.schedule}{warm}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: every field that differs from its default, and the first two."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {f.name: values[f.name] for f in dataclasses.fields(self) if values[f.name] != f.default}

    def factor(self, done: float) -> float:
        """Factor of the learning rate after the part ``done`` of the run, in [0, 1)."""
        return cosine(done) if self.schedule == "cosine" else 1.0


ADAMW_1E3 = Setting("adamw", 1e-3)

#: Longest side of a tensor that SOAP turns. The library's is 10,000, with which a new basis takes minutes on one core.
SOAP_LARGEST = 2048
#: Optimizers from libraries of the extra ``bench``: the module, and what notes call the optimizer.
LIBRARIES = {"schedule-free": ("schedulefree", "schedule-free AdamW"), "soap": ("pytorch_optimizer", "SOAP")}


def grid(optimizer: OptimizerName, *, quick: bool = False) -> tuple[Setting, ...]:
    """What an optimizer is tuned over, task by task.

    AdamW: 7 learning rates, constant and cosine. Muon, SOAP and SGD with momentum 0.9: 5, constant and cosine.
    Schedule-free AdamW: 5, with and without a warm-up of 5% of the run. ``learned``: 3 around its default, constant and
    cosine.
    ``quick`` takes every second learning rate or so.
    """
    lrs: dict[str, tuple[float, ...]] = {
        "adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "schedule-free": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "muon": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "soap": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        "learned": (3e-4, 1e-3, 3e-3),
    }
    quick_lrs: dict[str, tuple[float, ...]] = {
        "adamw": (1e-3, 3e-3, 1e-2), "schedule-free": (1e-2,), "muon": (3e-3,), "soap": (3e-3,), "sgd": (1e-1,),
        "learned": (1e-3, 3e-3),
    }  # fmt: skip
    rates = (quick_lrs if quick else lrs)[optimizer]
    if optimizer == "schedule-free":
        return tuple(Setting(optimizer, lr, warmup=warmup) for lr in rates for warmup in (0.0, 0.05))
    decay, momentum = (0.0, 0.9) if optimizer == "sgd" else (0.01, 0.0)
    schedules: tuple[Schedule, ...] = ("constant", "cosine")
    return tuple(
        Setting(optimizer, lr, schedule, weight_decay=decay, momentum=momentum)
        for lr in rates for schedule in schedules
    )  # fmt: skip


def missing(optimizer: OptimizerName) -> str | None:
    """Why an optimizer cannot be run here, or ``None``."""
    for name, (module, title) in LIBRARIES.items():
        if optimizer == name and importlib.util.find_spec(module) is None:
            return f'{title} was left out: pip install {module}, or in the clone pip install -e ".[bench]"'
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        return f"Muon was left out: torch {torch.__version__} has no torch.optim.Muon (2.9 has)"
    return None


def hidden_matrices(names: Mapping[str, Tensor]) -> list[str]:
    """Names of the matrices that Muon is meant for: those that are neither embedding nor output layer.

    The output layer is what is called so, or else the last matrix.
    """
    matrices = [name for name, p in names.items() if p.ndim == 2 and not any(word in name for word in _EMBEDDINGS)]
    if any(word in name for name in names for word in _OUTPUTS):
        return [name for name in matrices if not any(word in name for word in _OUTPUTS)]
    return matrices[:-1]


class Driver:
    """The optimizers of one run behind one interface.

    Args:
        setting: what to build.
        params: by name, leaves.
        steps: length of the run in inner steps.
        policy: of a learned setting.
    """

    def __init__(self, setting: Setting, params: Mapping[str, Tensor], steps: int, policy: Policy | None) -> None:
        self.setting = setting
        self.optimizers = _build(setting, params, steps, policy)
        self._rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    def step(self, done: float) -> None:
        """One update after the part ``done`` of the run."""
        if self.setting.schedule != "constant":
            for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * self.setting.factor(done)
        for optimizer in self.optimizers:
            if self.setting.memory != "kept":
                _forget(optimizer, self.setting.memory)
            optimizer.step()

    def evaluation_mode(self, on: bool) -> bool:
        """Put the weights in the parameters that are to be evaluated, or back; whether they are other ones at all."""
        if self.setting.optimizer != "schedule-free":
            return False
        for optimizer in self.optimizers:
            getattr(optimizer, "eval" if on else "train")()
        return True


def _build(setting: Setting, params: Mapping[str, Tensor], steps: int, policy: Policy | None) -> list[Optimizer]:
    tensors, lr, decay = list(params.values()), setting.lr, setting.weight_decay
    if setting.optimizer == "adamw":
        return [torch.optim.AdamW(tensors, lr=lr, weight_decay=decay)]
    if setting.optimizer == "sgd":
        return [torch.optim.SGD(tensors, lr=lr, momentum=setting.momentum, weight_decay=decay)]
    if setting.optimizer == "schedule-free":
        import schedulefree

        warmup = round(setting.warmup * steps)
        optimizer = schedulefree.AdamWScheduleFree(tensors, lr=lr, weight_decay=decay, warmup_steps=warmup)
        optimizer.train()
        return [optimizer]
    if setting.optimizer == "soap":
        from pytorch_optimizer import SOAP

        return [SOAP(tensors, lr=lr, weight_decay=decay, max_precondition_dim=SOAP_LARGEST)]
    if setting.optimizer == "muon":
        hidden = hidden_matrices(params)
        rest = [p for name, p in params.items() if name not in hidden]
        both: list[Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=decay)] if rest else []
        if hidden:
            matrices = [params[name] for name in hidden]
            both.append(torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        return both
    if policy is None:
        raise ValueError("a learned setting needs its policy")
    return [LearnedOptimizer(tensors, lr=lr, weight_decay=decay, policy=policy, backend=setting.backend or "auto")]


@torch.no_grad()
def _forget(optimizer: Optimizer, memory: Memory) -> None:
    for group in optimizer.param_groups:
        _, beta2 = group["betas"]
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state or p.grad is None:
                continue
            value: Tensor | float = 0.0
            if memory == "none":
                # An average that already is at u stays there, whatever its gate.
                v = beta2 * state["exp_avg_sq"] + (1.0 - beta2) * p.grad.square()
                value = p.grad / ((v / (1.0 - beta2 ** (float(state["step"]) + 1.0))).sqrt() + group["eps"])
            for key, tensor in state.items():
                if key.startswith("hidden_"):
                    tensor.copy_(torch.as_tensor(value, dtype=tensor.dtype))
