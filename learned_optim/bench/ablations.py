"""A policy with parts of it taken away: what does each learned part pay?

==========================  ==============================================================================
row                         the policy
==========================  ==============================================================================
mixture alone               all weights zero: the base mixture of the configuration
+ tensor head               the head's weights, the others zero
+ learned pace              head and pace
+ learned gates             those and the gates, where the cell is a mixture
+ amplitude                 all weights: the policy itself; ``+ GRU`` where that is the cell
without pace                the policy, the pace of every tensor held at 1
without orthogonalising     the policy, matrices moving as the mixture says
hidden state reset          the policy, its hidden state zeroed before every step
hidden state without        the policy, with averages over one step: the hidden state is the present gradient,
memory                      normalised
random weights              every weight tensor drawn anew, normal with the same root mean square
GRU cell                    another policy, whose cell is a GRU
==========================  ==============================================================================

None is trained again: parts that were learned together may rely on each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from learned_optim.bench.baselines import Memory
from learned_optim.policy.policy import PARTS, Policy
from learned_optim.rule.cells import CELLS
from learned_optim.rule.config import PolicyConfig


class Ablation(NamedTuple):
    """A row of the table."""

    name: str
    policy: Policy
    memory: Memory = "kept"


def with_parts(policy: Policy, parts: Sequence[str]) -> Policy:
    """A copy of ``policy`` in which the weights of all other parts are zero.

    Args:
        policy: where the weights come from; left as it is.
        parts: names out of ``learned_optim.policy.policy.PARTS``.

    Raises:
        ValueError: an unknown part.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown parts {unknown}; known are {sorted(PARTS)}")
    present = {name for part in parts for name in PARTS[part]}
    return variant(policy, {k: w if k in present else torch.zeros_like(w) for k, w in policy.weights().items()})


def random_weights(policy: Policy) -> Policy:
    """A copy of ``policy`` whose weight tensors are drawn anew, each normal with the root mean square it had."""
    rng = torch.Generator().manual_seed(0)
    return variant(
        policy,
        {k: torch.randn(w.shape, generator=rng) * w.detach().square().mean().sqrt() for k, w in
         sorted(policy.weights().items())},
    )  # fmt: skip


def ablations(policy: Policy, gru: Policy | None = None) -> tuple[list[Ablation], list[str]]:
    """The rows of the table, and notes on those that say nothing or cannot be made.

    Args:
        policy: what is taken apart.
        gru: the policy with a GRU cell; ``None`` takes an untrained one.

    Raises:
        ValueError: ``gru`` has another cell.
    """
    config = policy.config
    is_mixture = CELLS[config.cell].is_mixture
    rows = [
        Ablation("mixture alone", with_parts(policy, ())),
        Ablation("+ tensor head", with_parts(policy, ["tensor_head"])),
    ]
    if config.pace_rate:
        rows.append(Ablation("+ learned pace", with_parts(policy, ["tensor_head", "pace"])))
    if is_mixture:
        rows.append(Ablation("+ learned gates", with_parts(policy, ["tensor_head", "pace", "gates"])))
    rows.append(Ablation("+ amplitude" if is_mixture else f"+ {config.cell.upper()}", policy))
    if config.pace_gain or config.pace_rate:
        rest = {name: w for name, w in policy.weights().items() if name != "pace"}
        rows.append(Ablation("without pace", variant(policy, rest, pace_gain=0.0, pace_rate=0.0)))
    if config.orthogonal:
        rows.append(Ablation("without orthogonalising", variant(policy, orthogonal=0.0)))
    rows.append(Ablation("hidden state reset", policy, "reset"))
    notes = []
    if is_mixture:
        rows.append(Ablation("hidden state without memory", policy, "none"))
    rows.append(Ablation("random weights", random_weights(policy)))
    if not any(bool(w.detach().count_nonzero()) for w in policy.weights().values()):
        notes.append("the policy's weights are all zero, so most ablations are the policy itself")
    if gru is None:
        gru = Policy(PolicyConfig.gru(), generator=torch.Generator().manual_seed(0), source="untrained GRU")
        rows.append(Ablation("GRU cell, untrained", gru))
    elif CELLS[gru.config.cell].is_mixture:
        raise ValueError(f"the policy for the ablation with a GRU cell has cell={gru.config.cell!r}")
    else:
        rows.append(Ablation("GRU cell", gru))
    return rows, notes


def variant(policy: Policy, weights: Mapping[str, torch.Tensor] | None = None, **changes: Any) -> Policy:
    """A copy of ``policy`` with changes to its configuration and, if given, other weights."""
    other = Policy(dataclasses.replace(policy.config, **changes), generator=torch.Generator(), source=policy.source)
    weights = policy.weights() if weights is None else weights
    other.load_state_dict({name: w.detach().clone() for name, w in weights.items()})
    return other
