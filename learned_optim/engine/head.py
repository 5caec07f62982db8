"""The tensor head over many tensors at once, and what it leaves behind for diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.engine.hyperparameters import StepContext
from learned_optim.engine.packing import copy_all, to_device
from learned_optim.engine.param_state import ParamIndex, ParamState
from learned_optim.rule import update
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.layouts import Role, TensorShapes, indices_by
from learned_optim.rule.types import Coefficients, Spread, TensorState, TensorSums

#: The head is computed for a multiple of this many tensors, the missing ones being empty: whole SIMD vectors, so that a
#: tensor's bits do not depend on how many tensors are run with it.
COLUMNS = 16


def coefficient_count(config: PolicyConfig) -> int:
    """How many coefficients a tensor has: the rows of ``Coefficients.stack``."""
    return Coefficients.count(len(config.hidden_weights), len(config.windows) + len(config.rates))


class LengthFactors(NamedTuple):
    """By how much orthogonalising changed the lengths of updates."""

    params: list[ParamIndex]
    factors: Tensor  #: [len(params)]


class StepRecord(NamedTuple):
    """What the head saw and said of K tensors in their last step: a few dozen values each."""

    params: list[ParamIndex]
    contexts: list[StepContext]
    numel: Tensor  #: [K] and more
    sums: TensorSums  #: [K] each
    coefficients: Tensor  #: [C, K], see ``Coefficients.of_rows``
    tensor_state: TensorState  #: [K] and more, each
    left_out: bool = False  #: their gradients were not finite: nothing was computed, all of it is NaN

    @classmethod
    def of_left_out(cls, config: PolicyConfig, params: list[ParamState]) -> StepRecord:
        rows = coefficient_count(config)
        nan = torch.full((len(params),), torch.nan, dtype=torch.float64, device="cpu")
        sums = TensorSums(*[nan] * len(TensorSums._fields))
        state = TensorState(*[nan] * len(params[0].tensor_state))
        contexts = [p.context for p in params]
        return cls([p.param_index for p in params], contexts, nan, sums, nan.expand(rows, -1), state, left_out=True)


@dataclass
class StepReport:
    """What a step leaves behind for diagnostics."""

    records: list[StepRecord] = field(default_factory=list)
    length_factors: list[LengthFactors] = field(default_factory=list)  #: of what was orthogonalised
    left_out: list[ParamState] = field(default_factory=list)  #: because of gradients that are not finite
    names: Mapping[ParamIndex, str] = field(default_factory=dict)  #: of the parameters
    skipped: Mapping[ParamIndex, Tensor] = field(default_factory=dict)  #: how many steps were, of each

    def add(self, other: StepReport) -> None:
        """What the same step leaves behind of other parameters."""
        self.records += other.records
        self.length_factors += other.length_factors
        self.left_out += other.left_out
        self.skipped = {**self.skipped, **other.skipped}


HeadPass = Callable[[list[ParamState], TensorSums], tuple[Tensor, list[StepRecord]]]


class Orthogonalizer(Protocol):
    """Orthogonalises directions in place."""

    def takes(self, param: ParamState, d: Tensor) -> bool:
        """Whether this is for the direction, [numel], of a whole matrix."""
        ...

    def __call__(self, params: Sequence[ParamState], directions: Sequence[Tensor], shares: Sequence[Tensor]) -> Tensor:
        """By how much each was damped, [K]; see :func:`learned_optim.rule.orthogonalize.orthogonalize`."""
        ...


@lru_cache(maxsize=256)
def _padded_shapes(
    shapes: tuple[torch.Size, ...], roles: tuple[Role | None, ...], device: torch.device
) -> TensorShapes:
    """Of K tensors, and of as many empty ones as make K a multiple of ``COLUMNS``."""
    spare = -len(shapes) % COLUMNS
    return TensorShapes.of((*shapes, *[torch.Size((0,))] * spare), device, (*roles, *[None] * spare))


def head_pass(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    tensor_shapes: TensorShapes,
    sums: TensorSums,
    state: TensorState,
    step: Spread,
) -> tuple[Tensor, TensorState]:
    """:func:`learned_optim.rule.update.coefficients`, stacked to [C, K]."""
    coeff, state = update.coefficients(weights, config, tensor_shapes, sums, state, step)
    return coeff.stack(), state


class TensorHead:
    """The policy's tensor head."""

    def __init__(self, config: PolicyConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: w.detach().to(torch.float64, copy=True) for name, w in weights.items()}
        self.compiled: dict[torch.device, Callable] = {}  #: in place of :func:`head_pass`
        #: Moves parameters of a dtype along directions, on CPUs.
        self.moves: dict[torch.dtype, Callable[[list[ParamState], list[Tensor], Tensor], None]] = {}
        #: Of directions on CPUs, by their dtype.
        self.orthogonalizers: dict[torch.dtype, Orthogonalizer] = {}
        self.native: dict[torch.dtype, HeadPass] = {}  #: in place of all of it, on CPUs, by the dtype of the arithmetic
        self._weights: dict[torch.device, dict[str, Tensor]] = {}
        self._buffers: dict[tuple[int, torch.device], tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, params: list[ParamState], sums: TensorSums) -> tuple[Tensor, list[StepRecord]]:
        """Coefficients, [C, len(params)] in float64; the per-tensor state is updated in place."""
        if not self.native or params[0].param.device.type != "cpu":
            return self._run(params, sums)
        if len({p.arithmetic for p in params}) == 1:
            return self.native.get(params[0].arithmetic, self._run)(params, sums)
        indices = indices_by(p.arithmetic for p in params)
        parts = [
            self.native.get(dtype, self._run)([params[i] for i in some], TensorSums(*(s[some] for s in sums)))
            for dtype, some in indices.items()
        ]
        order = torch.tensor([i for some in indices.values() for i in some], device="cpu").argsort()
        stacked = torch.cat([stacked for stacked, _ in parts], 1)[:, order].contiguous()
        return stacked, [record for _, records in parts for record in records]

    def flat_weights(self, names: Iterable[str]) -> Tensor:
        """Weights in one vector, float64."""
        return torch.cat([self.weights[name].flatten() for name in names])

    def _run(self, params: list[ParamState], sums: TensorSums) -> tuple[Tensor, list[StepRecord]]:
        device, count = sums.u_u.device, len(params)
        tensor_shapes = _padded_shapes(tuple([p.shape for p in params]), tuple([p.role for p in params]), device)
        spare = len(tensor_shapes.numel) - count
        if any(p.rows is not None for p in params):
            tensor_shapes = tensor_shapes.counting([p.counted for p in params] + [1] * spare)
        padded = TensorSums(*torch.nn.functional.pad(torch.stack(sums), (0, spare)).unbind())
        scalars = [value for field in zip(*(p.tensor_state for p in params), strict=True) for value in field]
        matrix, views = self._buffer(len(scalars) // count, count, device)
        copy_all(views, scalars)
        state = TensorState(*torch.nn.functional.pad(matrix, (0, spare)).unbind())
        contexts = [p.context for p in params]
        step = to_device([context.step for context in contexts] + [1.0] * spare, torch.float64, device)
        if device not in self._weights:
            self._weights[device] = {k: w.to(device) for k, w in self.weights.items()}
        run = self.compiled.get(device, head_pass)
        stacked, state = run(self._weights[device], self.config, tensor_shapes, padded, state, step)
        matrix.copy_(torch.stack(state.tensors)[:, :count])
        copy_all(scalars, views)
        stacked, indices = stacked[:, :count], [p.param_index for p in params]
        return stacked, [StepRecord(indices, contexts, tensor_shapes.numel, sums, stacked, state)]

    def _buffer(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """A matrix in float64 to write into, and views of its entries: those of the last call, if they fit."""
        buffer = self._buffers.get((rows, device))
        if buffer is None or buffer[0].shape[1] != columns:
            with torch.inference_mode(False), torch.no_grad():
                matrix = torch.zeros(rows, columns, dtype=torch.float64, device=device)
                buffer = self._buffers[rows, device] = matrix, list(matrix.view(-1).unbind())
        return buffer
