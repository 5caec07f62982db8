"""The choice between compiled kernels and plain torch operations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from learned_optim.engine.eager import EagerBackend
from learned_optim.engine.gpu import GpuBackend
from learned_optim.engine.head import TensorHead
from learned_optim.engine.kernels import NO_COMPILER, CompilationError, find_compiler
from learned_optim.engine.native import NativeBackend
from learned_optim.engine.param_state import Format, ParamState
from learned_optim.engine.step import Backend, Bucket
from learned_optim.rule.cells import CELLS
from learned_optim.rule.config import PolicyConfig

#: On a GPU ``auto`` compiles for a dtype of which a model has this many parameters, which takes some 20 s once per
#: machine, most of them for the tensor head. On a CPU it always does: some 3 s once per machine, a few milliseconds
#: from then on.
WORTH_COMPILING = 1_000_000


class AutoBackend:
    """Compiled kernels where they are wanted and can be had, plain torch operations elsewhere.

    What is used is decided at the first step, per device and dtype, from the number of parameters in it and from
    whether there is a compiler: a run that is resumed in the same environment goes on with the same bits.

    Args:
        head: the policy's, with configuration and weights.
        always: compile whatever the size of the model.
    """

    def __init__(self, head: TensorHead, always: bool) -> None:
        self.head, self.always = head, always
        self._eager, self._native, self._gpu = EagerBackend(head), NativeBackend(head), GpuBackend(head)
        self._compile: dict[tuple[str, torch.dtype], bool] = {}
        self._reasons: dict[str, None] = {}
        self._failed = False

    @property
    def name(self) -> str:
        return "; ".join(self._reasons) or "not chosen before the first step"

    def prepare(self, params: list[ParamState]) -> None:
        sizes: dict[tuple[str, torch.dtype], int] = {}
        if all(key in self._compile for key in {_key(form) for form in {p.format for p in params}}):
            return
        for p in params:
            key = _key(p.format)
            if key not in self._compile:
                sizes[key] = sizes.get(key, 0) + math.prod(p.shape)
        for (device, dtype), size in sizes.items():
            count = f"{size:,} parameters" if not self._compile and len(sizes) == 1 else f"{size:,} {dtype} parameters"
            compiled, why = self._choice(device, size)
            self._compile[device, dtype] = compiled
            self._reasons[f"{'compiled' if compiled else 'eager'} ({count}{why})"] = None

    def before_capture(self, params: list[ParamState]) -> None:
        compiled = [p for p in params if self._compile.get(_key(p.format), False) and p.format.device.type != "cpu"]
        self._gpu.before_capture(compiled)

    def _choice(self, device: str, size: int) -> tuple[bool, str]:
        if self._failed:
            return False, "; compilation failed"
        if self.always:
            return True, ""
        if not CELLS[self.head.config.cell].is_mixture:
            return False, "; only the gated cell is compiled"
        if device != "cpu" and size < WORTH_COMPILING:
            return False, f", compiled from {WORTH_COMPILING:,}"
        if find_compiler(device) is None:
            if device in NO_COMPILER:
                _warn_once(NO_COMPILER[device])
            return False, f"; no compiler for {device}"
        return True, ""

    def buckets(self, params: list[ParamState]) -> Iterator[Bucket]:
        formats = {p.format for p in params}
        wanted = {form for form in formats if self._compile.get(_key(form), False)}
        try:
            for form in wanted:
                self._of(form).load(form)
        except CompilationError as error:
            self._fail(error)
            wanted = set()
        parts: dict[Backend, list[ParamState]] = {}
        by_format = {form: self._of(form) if form in wanted else self._eager for form in formats}
        for p in params:
            parts.setdefault(by_format[p.format], []).append(p)
        for backend, some in parts.items():
            yield from backend.buckets(some)

    def _of(self, form: Format) -> NativeBackend | GpuBackend:
        return self._native if form.device.type == "cpu" else self._gpu

    def _fail(self, error: CompilationError) -> None:
        self._failed = True
        self.head.native.clear()
        self.head.moves.clear()
        self._compile = dict.fromkeys(self._compile, False)
        self._reasons = {f"eager (compilation failed: {error})": None}
        _warn_once(str(error))


def _key(form: Format) -> tuple[str, torch.dtype]:
    return form.device.type, form.param


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"learned_optim: the update rule could not be compiled and runs as plain torch operations, about five times "
        f"slower: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def make_backend(name: str, config: PolicyConfig, weights: Mapping[str, Tensor]) -> Backend:
    """The backend of that name: ``"eager"``, ``"compiled"`` or ``"auto"``.

    Raises:
        ValueError: another name.
    """
    if name not in ("auto", "eager", "compiled"):
        raise ValueError(f"Invalid backend: {name!r}; choose 'auto', 'eager' or 'compiled'")
    head = TensorHead(config, weights)
    return EagerBackend(head) if name == "eager" else AutoBackend(head, always=name == "compiled")
