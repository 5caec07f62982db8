"""The update rule's two passes as compiled kernels, each one loop over memory.

Coordinates come in rows of ``WIDTH``, and every row has scalars of its own: those of its tensor. One kernel then serves
tensors of every shape, alone or side by side, with any learning rate and any policy of the same configuration; nothing
is ever compiled twice. A row's bits depend on that row alone, not on the number of threads or on other rows.

They go through ``torch.compile``, which keeps what it made in inductor's cache folder, under a key that names the GPU.
For CPUs see :mod:`learned_optim.engine.native_library`.
"""

from __future__ import annotations

import math
import os
import shutil
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.engine.param_state import arithmetic_dtype
from learned_optim.rule import update
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.layouts import TensorShapes
from learned_optim.rule.stochastic_rounding import rounded_state
from learned_optim.rule.types import Coefficients, CoordinateState, Spread, StepScalars, TensorState, TensorSums

#: Coordinates in a row.
WIDTH = 512

Kernel = Callable[[list[Tensor]], Sequence[Tensor]]


class CompilationError(RuntimeError):
    """A kernel could not be made; the cause is chained."""


class Kind(NamedTuple):
    """What a kernel is specialised to."""

    config: PolicyConfig
    device: str  #: one of several GPUs
    dtypes: tuple[torch.dtype, ...]  #: parameter, gradient, state tensors

    @property
    def arithmetic(self) -> torch.dtype:
        return arithmetic_dtype(self.dtypes[0])


class Kernels(NamedTuple):
    """The two passes over R rows. Tensors are [R, WIDTH], contiguous; ``scalars`` [R, 9], see :class:`StepScalars`.

    ``measure([param, grad, exp_avg, exp_avg_sq, hidden_0, scalars])`` returns ``[sums]``, [7, R].
    ``apply([param, grad, *state, scalars, coefficients, weights])`` writes the update into its first arguments;
    ``coefficients`` is [R, C], ``weights`` see :func:`flat_weights`. With ``StepScalars.for_directions`` the direction
    is written in place of the parameter, so that no third kernel is needed.
    """

    measure: Kernel
    apply: Kernel


class Rows:
    """A layout (see :mod:`learned_optim.rule.layouts`) in which every row of [R, WIDTH] is a tensor of its own."""

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(1)

    def total(self, x: Tensor) -> Tensor:
        return x.sum(1)

    def spread(self, values: Tensor) -> Sequence[Spread]:
        return values.unsqueeze(2).unbind()


def flat_weights(config: PolicyConfig, weights: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The cell's weights in one vector, with dtype and device of ``like``."""
    return torch.cat([weights[name].flatten() for name in config.coordinate_weights()]).to(like)


class _Measure(torch.nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, h: Tensor, scalars: Tensor) -> tuple[Tensor, ...]:
        p, g, m, v, h = (t.to(self.kind.arithmetic) for t in (p, g, m, v, h))
        now = StepScalars(*scalars.unsqueeze(1).unbind(2))
        return (torch.stack(update.measure(Rows(), p, g, CoordinateState(m, v, (h,)), now)),)


class _Apply(torch.nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        config, dtype = self.kind.config, self.kind.arithmetic
        (*tensors, scalars, coefficients, flat) = inputs
        p, g, *state = (t.to(dtype) for t in tensors)
        shapes = config.coordinate_weights()
        pieces = flat.split([math.prod(shape) for shape in shapes.values()])
        weights = {name: _nested(w, shape) for (name, shape), w in zip(shapes.items(), pieces, strict=True)}
        now = StepScalars(*scalars.unsqueeze(1).unbind(2))
        coeff = update.spread_coefficients(config, Rows(), coefficients.T, dtype)
        d, new_state = update.apply(weights, config, coeff, p, g, CoordinateState.of(state), now)
        moved = update.move(p, d, now)
        new_state = rounded_state(new_state, self.kind.dtypes[2:])
        for old, new in zip((tensors[0], *tensors[2:]), (moved, *new_state.tensors), strict=True):
            old.copy_(new)
        return ()


def _nested(weight: Tensor, shape: tuple[int, ...]) -> list:
    """Lists of 0-d tensors."""
    return [list(row.unbind()) for row in weight.view(shape)] if len(shape) == 2 else list(weight.unbind())


def kernels(kind: Kind) -> Kernels:
    """The kernels for tensors of this kind, compiled or loaded on the first call in a process.

    Raises:
        CompilationError: whatever went wrong; it is not tried again in this process.
    """
    made = _made(kind)
    if isinstance(made, CompilationError):
        raise made
    return made


def coefficient_count(config: PolicyConfig) -> int:
    """Columns of ``coefficients``: the rows of ``Coefficients.stack``."""
    return Coefficients.count(len(config.hidden_weights), len(config.windows) + len(config.rates))


@cache
def _made(kind: Kind) -> Kernels | CompilationError:
    rows = 4096  # an example's; enough that the compiler expects work for several threads
    tensors = [torch.empty(rows, WIDTH, dtype=dtype, device=kind.device) for dtype in kind.dtypes]
    scalars = torch.empty(rows, len(StepScalars._fields), dtype=kind.arithmetic, device=kind.device)
    coefficients = scalars.new_empty(rows, coefficient_count(kind.config))
    weights = scalars.new_empty(sum(math.prod(s) for s in kind.config.coordinate_weights().values()))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return Kernels(
                _compiled(_Measure(kind), [*tensors[:5], scalars], 6),
                _compiled(_Apply(kind), [*tensors, scalars, coefficients, weights], len(tensors) + 2),
            )
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        failure = CompilationError(f"{type(error).__name__}: {first_line}")
        failure.__cause__ = error
        return failure


def _compiled(module: _Measure | _Apply, example: list[Tensor], with_rows: int) -> Kernel:
    compiled = torch.compile(_own_code(module.forward), fullgraph=True)

    def kernel(inputs: list[Tensor]) -> Sequence[Tensor]:
        return compiled(*inputs)

    example = [torch.zeros_like(t) for t in example]
    for tensor in example[:with_rows]:
        torch._dynamo.mark_dynamic(tensor, 0)
    kernel(example)
    return kernel


def _own_code(method: Any) -> Callable:
    """The same function with a code object of its own: dynamo keeps eight compiled forms of one, and looks at each."""
    function = method.__func__
    code = function.__code__.replace()
    fresh = types.FunctionType(code, function.__globals__, function.__name__, closure=function.__closure__)
    return types.MethodType(fresh, method.__self__)


@cache
def compiled_head(function: Callable) -> Callable:
    """The head's small operations as few kernels, for any number of tensors and any policy of a configuration.

    Args:
        function: :func:`~learned_optim.engine.head.head_pass`.
    """
    heads: dict[tuple, Callable | None] = {}

    def head(weights: Mapping[str, Tensor], config: PolicyConfig, *inputs: Any) -> Any:
        tensor_shapes, sums, state, step = inputs
        key = (config, step.device, state.trust is None)
        if key not in heads:
            heads[key] = torch.compile(_own_code(_Head(config, function).forward), fullgraph=True)
        compiled = heads[key]
        if compiled is None:
            return function(weights, config, *inputs)
        tensors = [*tensor_shapes, torch.stack(sums), step, *state.tensors]
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, tensor.ndim - 1)
        try:
            stacked, *new_state = compiled(dict(weights), *tensors)
        except Exception as error:  # nothing has been changed
            heads[key] = None
            what = f"{type(error).__name__}: {str(error).strip()[:500]}"
            warnings.warn(f"learned_optim: the tensor head could not be compiled: {what}", RuntimeWarning, stacklevel=2)
            return function(weights, config, *inputs)
        return stacked, TensorState(*new_state)

    return head


class _Head(torch.nn.Module):
    def __init__(self, config: PolicyConfig, function: Callable) -> None:
        super().__init__()
        self.config, self.function = config, function

    def forward(
        self, weights: dict[str, Tensor], numel: Tensor, context: Tensor, sums: Tensor, step: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = TensorShapes(numel, context), TensorSums(*sums.unbind()), TensorState(*state), step
        stacked, new_state = self.function(weights, self.config, *inputs)
        return stacked, *new_state.tensors


def find_compiler(device: str) -> str | None:
    """What would compile kernels for this type of device, or ``None``."""
    if device == "cpu":
        names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
        return next((name for name in names if name and shutil.which(name)), None)
    if device == "cuda":
        from importlib.util import find_spec

        return "triton" if find_spec("triton") is not None else None
    return None
