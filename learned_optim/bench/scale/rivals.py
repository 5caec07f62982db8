"""The optimizers: their settings, how they are tuned and how they are built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim.bench.baselines import DEFAULT_LR, SOAP_LARGEST, hidden_matrices
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.policy.policy import Policy
from learned_optim.tasks.recipe import decay

Schedule = Literal["constant", "decay", "warmup_decay"]
OptimizerName = Literal["learned", "adamw", "muon", "soap"]

#: Part of the run over which rivals' learning rates grow; they fall, as with ours where it decays, over the last fifth.
WARMUP = 0.05
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
#: Learning rates are powers of two times this one.
UNIT = 1e-3
#: What is left of a run's steps in the next shorter one, and of the model's steps in the shortest.
SHORTER, LEAST_PART = 0.8, 0.2
#: Exponents of the first grid for the smallest model; larger ones begin around the best of the next smaller one.
FIRST_GRID = {"adamw": (1, 2, 3, 4), "muon": (2, 3, 4, 5), "soap": (1, 2, 3, 4)}
#: A larger model's grid, as exponents from the smaller one's best: the right learning rate falls with the size.
AROUND = (-2, -1, 0, 1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """An optimizer with what shapes its run.

    Args:
        optimizer: which one. ``muon`` is ``torch.optim.Muon`` for the hidden matrices, with updates of AdamW's size
            (``adjust_lr_fn="match_rms_adamw"``), and AdamW for all else.
        exponent: of the learning rate, ``UNIT * 2**exponent``; ours has 0, which is the optimizer's own default, and
            others to see whether that remains right.
        auxiliary: exponent of the learning rate of Muon's AdamW, from Muon's own.
        schedule: of the learning rate.
        policy: label of the policy (``learned`` only).
        part: of the model's steps that the run takes: with a schedule, the run that ends at some loss must be found
            by its length.
    """

    optimizer: OptimizerName
    exponent: int = 0
    auxiliary: int = 0
    schedule: Schedule = "warmup_decay"
    policy: str = ""
    part: float = 1.0

    @property
    def lr(self) -> float:
        """The learning rate."""
        return (DEFAULT_LR if self.optimizer == "learned" else UNIT) * 2.0**self.exponent

    @property
    def text(self) -> str:
        """Part of a cell's name."""
        part = f".part{self.part:g}" if self.part != 1.0 else ""
        if self.optimizer == "learned":
            rate = f".lr{self.lr:g}" if self.exponent else ""
            return f"{self.policy.replace('/', '-')}.{self.schedule}{rate}{part}"
        auxiliary = f".aux{2.0**self.auxiliary:g}" if self.optimizer == "muon" else ""
        return f"{self.optimizer}.lr{self.lr:g}{auxiliary}{part}"

    def factor(self, done: float) -> float:
        """Factor of the learning rate after the part ``done`` of the run, in [0, 1)."""
        if self.schedule == "constant":
            return 1.0
        warm = min(1.0, (done + 1e-3) / WARMUP) if self.schedule == "warmup_decay" else 1.0
        return warm * decay(done)


def ours(policy: str, exponent: int = 0) -> tuple[Setting, Setting]:
    """A policy with default arguments, and with the rivals' decay besides; or at another learning rate."""
    constant = Setting("learned", exponent, schedule="constant", policy=policy)
    return constant, dataclasses.replace(constant, schedule="decay")


def shorter(setting: Setting) -> Setting | None:
    """The same over four fifths of the steps; ``None`` where that would be less than ``LEAST_PART`` of them."""
    part = round(SHORTER * setting.part, 2)
    return dataclasses.replace(setting, part=part) if part >= LEAST_PART else None


def tuning(
    optimizer: OptimizerName, losses: Mapping[Setting, float], smaller: Setting | None
) -> tuple[list[Setting], Setting | None]:
    """What is left to be tried of a rival on one model, most telling first; and the best so far.

    Four learning rates by factors of two, the middle ones first; then further ones as long as the best lies at the
    edge; then, for Muon, half and twice the learning rate of the auxiliary AdamW at the best, again until the best is
    not at the edge.

    Args:
        optimizer: the rival.
        losses: final held-out losses of what was tried, ``inf`` where it diverged.
        smaller: the best setting of the next smaller model, if it is known.
    """
    first = FIRST_GRID[optimizer] if smaller is None else tuple(smaller.exponent + i for i in AROUND)
    middle = sum(first) / len(first)
    auxiliary = smaller.auxiliary if smaller is not None else 0
    grid = [Setting(optimizer, e, auxiliary) for e in sorted(first, key=lambda e: (abs(e - middle - 0.1), e))]
    # Of equals the same one whatever the order of the runs, and one that leads back: a flat loss has an end too.
    best = min(losses, key=lambda s: (losses[s], abs(s.auxiliary), abs(s.exponent), s.exponent), default=None)
    missing = [setting for setting in grid if setting not in losses]
    if missing or best is None:
        return missing, best
    fields = ("exponent", "auxiliary") if optimizer == "muon" else ("exponent",)
    for field in fields:
        beside = [dataclasses.replace(best, **{field: getattr(best, field) + i}) for i in (-1, 1)]
        missing = [setting for setting in beside if setting not in losses]
        if missing:
            return (missing, best) if math.isfinite(losses[best]) else ([], best)
    return [], best


def build(setting: Setting, network: nn.Module, policy: Policy | None) -> list[Optimizer]:
    """The optimizers of a run.

    Raises:
        ValueError: a learned setting without its policy.
    """
    named = dict(network.named_parameters())
    if setting.optimizer == "learned":
        if policy is None:
            raise ValueError("a learned setting needs its policy")
        return [LearnedOptimizer(named.values(), lr=setting.lr, policy=policy)]
    if setting.optimizer == "soap":
        from pytorch_optimizer import SOAP

        return [SOAP(_groups(named), lr=setting.lr, weight_decay=WEIGHT_DECAY, max_precondition_dim=SOAP_LARGEST)]
    if setting.optimizer == "adamw":
        return [torch.optim.AdamW(_groups(named), lr=setting.lr, betas=BETAS, fused=True)]
    hidden = hidden_matrices(named)
    matrices = [named.pop(name) for name in hidden]
    return [
        torch.optim.Muon(matrices, lr=setting.lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(_groups(named), lr=setting.lr * 2.0**setting.auxiliary, betas=BETAS, fused=True),
    ]


def _groups(named: Mapping[str, Tensor]) -> list[dict[str, object]]:
    """Weight decay on all but vectors: biases, norms and layer scales."""
    decayed = [p for p in named.values() if p.ndim > 1]
    rest = [p for p in named.values() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]


def set_rates(optimizers: Sequence[Optimizer], rates: Sequence[Sequence[float]], factor: float) -> None:
    """Learning rates of all groups, as ``rates`` has them, times ``factor``."""
    for optimizer, own in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate * factor
