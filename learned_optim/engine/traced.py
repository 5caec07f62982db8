"""The rule's passes over coordinates, traced for one of them: the statements that every kernel is made around."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learned_optim.engine.codegen import Language, Names, generate
from learned_optim.engine.head import coefficient_count
from learned_optim.engine.param_state import arithmetic_dtype
from learned_optim.rule import update
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.stochastic_rounding import rounded_state
from learned_optim.rule.types import Coefficients, CoordinateState, Spread, StepScalars, TensorSums

#: Tensors that the first pass reads: parameter, gradient, both moments, first hidden unit.
MEASURED = 5
SCALARS, SUMS = len(StepScalars._fields), len(TensorSums._fields)


class Passes(NamedTuple):
    """Statements, and the expressions of what they compute.

    Those of the first pass read ``p, g, x0, x1, x2`` (the state) and the scalars ``s``; those of the second read all of
    the state, and the coefficients ``c`` and weights ``w`` besides. A parameter ``p`` is moved along a direction ``d``,
    given its own ``decay``.
    """

    measure: str
    sums: list[str]  #: terms, in the order of :class:`TensorSums`
    apply: str
    direction: str
    moved: str  #: the parameter
    state: list[str]
    move: str
    there: str  #: where the parameter then is


class _PerCoordinate:
    """A layout in which nothing is added up: the loop does that."""

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def total(self, x: Tensor) -> Tensor:
        return x

    def spread(self, values: Tensor) -> Sequence[Spread]:
        return values.unbind()


def weight_count(config: PolicyConfig) -> int:
    """How many weights the cell has that are applied at every coordinate."""
    return sum(math.prod(shape) for shape in config.coordinate_weights().values())


def passes(
    config: PolicyConfig, dtypes: Sequence[torch.dtype], language: Language, element: Callable[[str, int], str]
) -> Passes:
    """The passes in a language.

    Args:
        config: the policy's.
        dtypes: of parameter, gradient and state tensors.
        language: of the statements.
        element: the expression of an element of ``s``, ``c`` or ``w``.
    """
    arithmetic, shapes = arithmetic_dtype(dtypes[0]), config.coordinate_weights()
    hidden, state = len(config.hidden_weights), len(dtypes) - 2
    rows, count = coefficient_count(config), weight_count(config)

    def measured(p: Tensor, g: Tensor, x: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
        return list(update.measure(_PerCoordinate(), p, g, CoordinateState.of(x), StepScalars(*scalars)))

    def applied(p: Tensor, g: Tensor, x: list[Tensor], scalars: list[Tensor], coeff: list[Tensor], flat: list[Tensor]
                ) -> list[Tensor]:  # fmt: skip
        now = StepScalars(*scalars)
        weights, rest = {}, iter(flat)
        for name, shape in shapes.items():
            row = shape[-1]
            values = [[next(rest) for _ in range(row)] for _ in range(math.prod(shape) // row)]
            weights[name] = values if len(shape) == 2 else values[0]
        d, new = update.apply(weights, config, Coefficients.of_rows(coeff, hidden), p, g, CoordinateState.of(x), now)
        moved = update.move(p, d, now, Coefficients.of_rows(coeff, hidden).decay)
        return [d, moved, *rounded_state(new, dtypes[2:]).tensors]

    def some(n: int) -> list[Tensor]:  # tracing tells tensors apart by identity
        return [torch.ones((), dtype=arithmetic, device="cpu") for _ in range(n)]

    def names(*expressions: str) -> list[Names]:
        return [np.array(e, dtype=object) for e in expressions]

    x = [f"x{i}" for i in range(state)]
    s, c, w = ([element(name, i) for i in range(n)] for name, n in (("s", SCALARS), ("c", rows), ("w", count)))
    measure, sums = generate(
        measured, (*some(2), some(MEASURED - 2), some(SCALARS)), names("p", "g", *x[: MEASURED - 2], *s), "m", language
    )
    apply, (direction, moved, *new) = generate(
        applied, (*some(2), some(state), some(SCALARS), some(rows), some(count)),
        names("p", "g", *x, *s, *c, *w), "a", language,
    )  # fmt: skip
    move, (there,) = generate(
        lambda p, d, decay, scalars: [update.move(p, d, StepScalars(*scalars), decay)], (*some(3), some(SCALARS)),
        names("p", "d", "decay", *s), "v", language,
    )  # fmt: skip
    return Passes(
        measure, [t.item() for t in sums], apply, direction.item(), moved.item(), [t.item() for t in new],
        move, there.item(),
    )  # fmt: skip
