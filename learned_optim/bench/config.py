"""What a run of the step suite is made of; without torch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StepBenchConfig:
    """What a step costs: ours against hand-designed optimizers, alternating in one process.

    Args:
        sizes: parameters of the single tensors; sizes that do not fit into a third of the free memory are left out.
        repeats: steps of each optimizer, after two that do not count.
        threads: that torch computes with; 0 leaves its setting.
        model: also time a GPT of 12.6 million parameters in 76 tensors: its optimizer steps, and whole training steps.
    """

    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000, 8_000_000, 10_000_000, 100_000_000)
    repeats: int = 15
    threads: int = 0
    model: bool = True

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"StepBenchConfig.sizes must be positive, found {self.sizes}")
        if self.repeats < 1:
            raise ValueError(f"StepBenchConfig.repeats must be 1 or more, found {self.repeats}")
        if self.threads < 0:
            raise ValueError(f"StepBenchConfig.threads must be 0 or more, found {self.threads}")
