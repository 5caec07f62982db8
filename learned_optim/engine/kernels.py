"""What compiles kernels, and the tensor head as few launches for GPUs.

The passes over coordinates are in :mod:`learned_optim.engine.native_library` for CPUs and in
:mod:`learned_optim.engine.gpu_kernels` for GPUs.
"""

from __future__ import annotations

import os
import shutil
import types
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.layouts import TensorShapes
from learned_optim.rule.types import TensorState, TensorSums


class CompilationError(RuntimeError):
    """A kernel could not be made; the cause is chained."""

    @classmethod
    def of(cls, error: Exception, said: str | None = None) -> CompilationError:
        """The first line of what a compiler said, or else of the error."""
        first_line = ((said or str(error)).strip().splitlines() or [""])[0]
        failure = cls(f"{type(error).__name__}: {first_line}")
        failure.__cause__ = error
        return failure


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


#: What is said where :func:`find_compiler` finds nothing; for other devices there is nothing to install.
NO_COMPILER = {"cpu": "no C++ compiler: install g++ or clang++, or set CXX", "cuda": "no Triton: install triton"}


def find_compiler(device: str) -> str | None:
    """What would compile kernels for this type of device, or ``None``."""
    if device == "cpu":
        names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
        return next((name for name in names if name and shutil.which(name)), None)
    if device == "cuda":
        from importlib.util import find_spec

        return "triton" if find_spec("triton") is not None else None
    return None
