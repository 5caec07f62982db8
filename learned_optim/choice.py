"""The choice between compiled kernels and plain torch operations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import cache

import torch

from learned_optim.backends import Backend, EagerBackend, Unit
from learned_optim.compiled import CompiledBackend
from learned_optim.jobs import Format, Job
from learned_optim.kernels import CompilationError, find_compiler
from learned_optim.policy import Policy
from learned_optim.waves import Head

#: ``auto`` compiles for a dtype of which a model has this many parameters. A kernel saves some 15 ns per parameter and
#: step, so that 20 s of compilation are repaid within about 1,300 steps, and there is nothing to wait for later.
WORTH_COMPILING = 1_000_000


class ChosenBackend:
    """Compiled kernels where they are wanted and can be had, plain torch operations elsewhere.

    What is used is decided at the first step, per device and dtype, from the number of parameters in it and from
    whether there is a compiler: a run that is resumed in the same environment goes on with the same bits.

    Args:
        policy: the rule's.
        always: compile whatever the size of the model.
    """

    def __init__(self, policy: Policy, always: bool) -> None:
        self.always = always
        self._eager, self._compiled = EagerBackend(policy), CompiledBackend(policy)
        self._chosen: dict[tuple[str, torch.dtype], bool] = {}
        self._reasons: dict[str, None] = {}
        self._failed = False

    @property
    def name(self) -> str:
        return "; ".join(self._reasons) or "not chosen before the first step"

    @property
    def head(self) -> Head:
        return self._eager.head

    def prepare(self, jobs: list[Job]) -> None:
        sizes: dict[tuple[str, torch.dtype], int] = {}
        if all(key in self._chosen for key in {_choice_key(form) for form in {job.format for job in jobs}}):
            return
        for job in jobs:
            key = _choice_key(job.format)
            if key not in self._chosen:
                sizes[key] = sizes.get(key, 0) + math.prod(job.shape)
        for (device, dtype), size in sizes.items():
            count = f"{size:,} parameters" if not self._chosen and len(sizes) == 1 else f"{size:,} {dtype} parameters"
            compiled, why = self._choice(device, size)
            self._chosen[device, dtype] = compiled
            self._reasons[f"{'compiled' if compiled else 'eager'} ({count}{why})"] = None

    def _choice(self, device: str, size: int) -> tuple[bool, str]:
        if self._failed:
            return False, "; compilation failed"
        if self.always:
            return True, ""
        if self._eager.head.config.cell != "gated":
            return False, "; only the gated cell is compiled"
        if size < WORTH_COMPILING:
            return False, f", compiled from {WORTH_COMPILING:,}"
        if find_compiler(device) is None:
            return False, f"; no compiler for {device}"
        return True, ""

    def units(self, jobs: list[Job]) -> Iterator[tuple[Unit, int]]:
        formats = {job.format for job in jobs}
        wanted = {form for form in formats if self._chosen.get(_choice_key(form), False)}
        try:
            for form in wanted:
                self._compiled.kernels(form)
        except CompilationError as error:
            self._fail(error)
            wanted = set()
        compiled = [job for job in jobs if job.format in wanted]
        eager = [job for job in jobs if job.format not in wanted] if len(wanted) < len(formats) else []
        yield from self._compiled.units(compiled)
        yield from self._eager.units(eager)

    def _fail(self, error: CompilationError) -> None:
        self._failed = True
        self._chosen = dict.fromkeys(self._chosen, False)
        self._reasons = {f"eager (compilation failed: {error})": None}
        _warn_once(str(error))


def _choice_key(form: Format) -> tuple[str, torch.dtype]:
    return form.device.type, form.param


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"learned_optim: the update rule could not be compiled and runs as plain torch operations, about five times "
        f"slower: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def make_backend(name: str, policy: Policy) -> Backend:
    """The backend of that name: ``"eager"``, ``"compiled"`` or ``"auto"``.

    Raises:
        ValueError: another name.
    """
    if name not in ("auto", "eager", "compiled"):
        raise ValueError(f"Invalid backend: {name!r}; choose 'auto', 'eager' or 'compiled'")
    return EagerBackend(policy) if name == "eager" else ChosenBackend(policy, always=name == "compiled")
