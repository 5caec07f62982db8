"""What users do around an optimizer: learning-rate schedules, weight decay, gradient clipping."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

Schedule = Callable[[float], float]
"""Factor of the learning rate as a function of the part of the run that is done, in [0, 1)."""


def constant(done: float) -> float:
    """1 all along."""
    return 1.0


def warmup(done: float) -> float:
    """Linear warm-up over the first tenth, then 1."""
    return min(1.0, (done + 1e-3) / 0.1)


def cosine(done: float) -> float:
    """Cosine decay to zero."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def decay(done: float) -> float:
    """1, then linear decay to zero over the last fifth."""
    return min(1.0, (1.0 - done) / 0.2)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "warmup": warmup,
    "cosine": cosine,
    "warmup_cosine": lambda done: warmup(done) * cosine(done),
    "decay": decay,
}
"""By name."""


class TrainingRecipe(NamedTuple):
    """How a run is trained, whatever the optimizer."""

    schedule: str = "constant"  #: name out of ``SCHEDULES``
    weight_decay: float = 0.01  #: decoupled, as in AdamW
    clip_norm: float = math.inf  #: gradients of a larger norm, over all parameters together, are shortened to this one

    def lr_factor(self, step: int, steps: int) -> float:
        """Factor of the learning rate in the step number ``step``, from 0, of ``steps``."""
        return SCHEDULES[self.schedule](step / steps)


def draw_recipe(rng: random.Random) -> TrainingRecipe:
    """A recipe as users combine them: half keep the learning rate constant, a third clip."""
    return TrainingRecipe(
        schedule="constant" if rng.random() < 0.5 else rng.choice(list(SCHEDULES)[1:]),
        weight_decay=rng.choice((0.0, 0.01, 0.01, 0.1)),
        clip_norm=rng.choice((math.inf, math.inf, 1.0)),
    )
