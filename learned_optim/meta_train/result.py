"""What a run leaves behind, and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from learned_optim.policy.policy import Policy


class MetaTrainResult(NamedTuple):
    """What a run leaves behind."""

    policy: Policy  #: the best by validation; the last one where there is no validation
    last: Policy  #: after the last outer step
    history: list[dict[str, Any]]  #: a dict per outer step, as in ``metrics.jsonl``
    init: dict[str, Tensor] | None  #: learned initial parameters of the optimizee, by name
    #: number of the signal that ended the run early, where the program has a handler for it that returned
    stopped_by: int | None

    def __repr__(self) -> str:
        init = "None" if self.init is None else f"{len(self.init)} tensors"
        return (
            f"MetaTrainResult({outer_steps_done(self.history)} outer steps, {verdict(self.history)}; "
            f"policy={self.policy.fingerprint()}, last={self.last.fingerprint()}, history={len(self.history)} dicts, "
            f"init={init}, stopped_by={self.stopped_by})"
        )


def outer_steps_done(history: Sequence[dict[str, Any]]) -> int:
    """How many outer steps there were."""
    return history[-1]["outer_step"] + 1 if history else 0


def validations(history: Sequence[dict[str, Any]]) -> list[float]:
    """What validation said, each time that it was asked."""
    return [m["validation"] for m in history if m.get("validation") is not None]


def improved(history: Sequence[dict[str, Any]]) -> bool:
    """Whether validation liked a policy better than the start, or there was none to ask."""
    values = validations(history)
    return not values or any(value < 0.0 for value in values)


def verdict(history: Sequence[dict[str, Any]]) -> str:
    """What came of a run, in half a line."""
    values = validations(history)
    if not values:
        return "no validation; best is the last"
    if not improved(history):
        return "no improvement on validation; best is the start"
    best = min(0.0, *values)
    return f"best validation {best:+.3f}: {math.exp(best):.2f} of the time that the start takes"
