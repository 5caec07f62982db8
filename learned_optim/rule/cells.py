"""The recurrent cells. Each keeps a hidden state per coordinate and says in which direction the coordinate moves.

A new cell is a class with the members of :class:`Cell` and an entry in :data:`CELLS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.rule.ops import add_product, bounded_ratio, clamp_positive, linear, per_column
from learned_optim.rule.types import Coefficients, Spread

Shapes = dict[str, tuple[int, ...]]
#: By name; nested lists of 0-d tensors or floats in compiled kernels and in the eager step.
Weights = Mapping[str, Tensor | list]


class CellConfig(Protocol):
    """The part of :class:`~learned_optim.rule.config.PolicyConfig` that cells see."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def hidden_weights(self) -> tuple[float, ...]: ...
    @property
    def windows(self) -> tuple[float, ...]: ...
    @property
    def rates(self) -> tuple[float, ...]: ...
    @property
    def gate_bound(self) -> float: ...
    @property
    def amplitude_bound(self) -> float: ...
    @property
    def features(self) -> tuple[str, ...]: ...
    @property
    def context(self) -> tuple[str, ...]: ...


class CellInputs(NamedTuple):
    """What a cell sees of its coordinates in a step, [n] each."""

    x: list[Tensor]  #: features
    u: Tensor  #: normalised gradient
    b: Tensor  #: Adam's direction
    hidden: Sequence[Tensor]  #: units before this step
    gate_floor: Spread  #: 1 / age


class Cell(Protocol):
    """A recurrent cell."""

    #: Whether hidden units change their sign with the gradient: averages of it do.
    odd_hidden: bool
    #: Whether directions are mixtures of averages, weighted by the head: what kernels and the safeguard can handle.
    is_mixture: bool
    #: Names of the weights that start at random; all others start at zero.
    random_weights: tuple[str, ...]

    def problem(self, config: CellConfig) -> tuple[str, str] | None:
        """Name of a field whose value does not fit the others, and what it has to be."""
        ...

    def tensor_weights(self, config: CellConfig) -> Shapes:
        """Name and shape of the weights that are applied once per tensor."""
        ...

    def coordinate_weights(self, config: CellConfig) -> Shapes:
        """Name and shape of the weights that are applied at every coordinate."""
        ...

    def rates(self, weights: Mapping[str, Tensor], config: CellConfig, context: Tensor, age: Tensor) -> list[Tensor]:
        """What the gates are before features have their say, [K] each; ``context`` is [C, K], ``age`` [K]."""
        ...

    def __call__(
        self, weights: Weights, config: CellConfig, coeff: Coefficients, inputs: CellInputs
    ) -> tuple[list[Tensor], Tensor]:
        """New hidden units and the direction d, [n] each; ``coeff`` is spread over the coordinates."""
        ...


class GatedCell(Cell):
    """A bank of gated averages of the normalised gradient.

    z_j = clamp(rate_j f(W_j x), 1/age, 1),  h_j = h_j + z_j (u - h_j),  d = s (w_b b + w_u u + sum_j w_j h_j) f(Q x)
    """

    odd_hidden = True
    is_mixture = True
    random_weights = ()

    def problem(self, config: CellConfig) -> tuple[str, str] | None:
        units = len(config.windows) + len(config.rates)
        if units != config.hidden_size:
            return "hidden_size", f"the number of windows and rates ({units})"
        if len(config.hidden_weights) != config.hidden_size:
            return "hidden_weights", f"{config.hidden_size} numbers"
        return None

    def tensor_weights(self, config: CellConfig) -> Shapes:
        return {"gate_context": (config.hidden_size, len(config.context))}

    def coordinate_weights(self, config: CellConfig) -> Shapes:
        features = len(config.features)
        return {"gate_features": (config.hidden_size, features), "amplitude": (features,)}

    def rates(self, weights: Mapping[str, Tensor], config: CellConfig, context: Tensor, age: Tensor) -> list[Tensor]:
        growing = [k / (age + k - 1.0) for k in config.windows]
        shift = bounded_ratio(per_column(weights["gate_context"], context), config.gate_bound)
        return [rate * row for rate, row in zip((*growing, *config.rates), shift.unbind(), strict=True)]

    def __call__(
        self, weights: Weights, config: CellConfig, coeff: Coefficients, inputs: CellInputs
    ) -> tuple[list[Tensor], Tensor]:
        x, u, b, hidden, gate_floor = inputs
        d = add_product(coeff.momentum * b, coeff.gradient, u)
        new_hidden = []
        shifts = linear(weights["gate_features"], x)
        for h, rate, weight, shift in zip(hidden, coeff.rates, coeff.hidden, shifts, strict=True):
            z = clamp_positive(rate * bounded_ratio(shift, config.gate_bound), gate_floor, 1.0)
            h = torch.addcmul(h, z, u - h)
            d = add_product(d, weight, h)
            new_hidden.append(h)
        (shift,) = linear([weights["amplitude"]], x)
        return new_hidden, d * bounded_ratio(shift, config.amplitude_bound)


class GruCell(Cell):
    """A GRU (Cho et al. 2014) over the features; its outputs multiply the amplitude and both directions."""

    odd_hidden = False
    is_mixture = False
    random_weights = ("gru_input", "gru_hidden")

    def problem(self, config: CellConfig) -> tuple[str, str] | None:
        return None

    def tensor_weights(self, config: CellConfig) -> Shapes:
        return {}

    def coordinate_weights(self, config: CellConfig) -> Shapes:
        hidden = config.hidden_size
        return {
            "gru_input": (3 * hidden, len(config.features)),
            "gru_hidden": (3 * hidden, hidden),
            "gru_bias": (3 * hidden,),
            "gru_output": (3, hidden),
        }

    def rates(self, weights: Mapping[str, Tensor], config: CellConfig, context: Tensor, age: Tensor) -> list[Tensor]:
        return []

    def __call__(
        self, weights: Weights, config: CellConfig, coeff: Coefficients, inputs: CellInputs
    ) -> tuple[list[Tensor], Tensor]:
        x, u, b, hidden, _ = inputs
        size = config.hidden_size
        from_input = linear(weights["gru_input"], x)
        from_hidden = linear(weights["gru_hidden"], list(hidden))
        bias = weights["gru_bias"]
        new_hidden = []
        for j, h in enumerate(hidden):
            reset = torch.sigmoid(from_input[j] + from_hidden[j] + bias[j])
            z = torch.sigmoid(from_input[size + j] + from_hidden[size + j] + bias[size + j])
            candidate = torch.tanh(from_input[2 * size + j] + reset * from_hidden[2 * size + j] + bias[2 * size + j])
            new_hidden.append(h + z * (candidate - h))
        outputs = linear(weights["gru_output"], new_hidden)
        amplitude, of_b, of_u = (bounded_ratio(o, config.amplitude_bound) for o in outputs)
        return new_hidden, amplitude * (coeff.momentum * b * of_b + coeff.gradient * u * of_u)


CELLS: dict[str, Cell] = {"gated": GatedCell(), "gru": GruCell()}
