"""What a run of the habits suite is made of; free of torch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple


class Lengths(NamedTuple):
    """Inner steps of each measurement."""

    noise: int = 3000
    target: int = 500  #: between two changes of target
    window: int = 150  #: after a change, over which the loss is averaged
    good_start: int = 1500
    flips: int = 1000  #: even, so that both halves end with the same sign
    training: int = 1000


@dataclasses.dataclass(frozen=True)
class HabitsConfig:
    """What learned update rules do where training is unlike the tasks they were made on: noise, changes, good starts.

    Args:
        policies: what is measured: bundled names, folders, or Hub repositories.
        bundled: measure every bundled policy, too.
        seeds: runs of every measurement, with other data and initial parameters. Three are the least that show a
            spread.
        backend: how the learned rule is run, as in ``LearnedOptimizer``.
        quick: one seed and a twentieth of the steps: a look at the tool, not a measurement.

    Raises:
        ValueError: a value out of range, with what was found.
    """

    policies: tuple[str, ...] = ("default",)
    bundled: bool = True
    seeds: int = 3
    backend: Literal["auto", "eager", "compiled"] = "auto"
    quick: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"HabitsConfig.seeds must be 1 or more, found {self.seeds!r}")
        if not self.policies and not self.bundled:
            raise ValueError("HabitsConfig.policies must be at least one name where the bundled ones are left out")
        if self.backend not in ("auto", "eager", "compiled"):
            raise ValueError(f"HabitsConfig.backend must be 'auto', 'eager' or 'compiled', found {self.backend!r}")

    def seed_numbers(self) -> range:
        """The seeds that are run."""
        return range(1 if self.quick else self.seeds)

    def lengths(self) -> Lengths:
        """How long each measurement is."""
        return Lengths(*(length // 20 for length in Lengths())) if self.quick else Lengths()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
