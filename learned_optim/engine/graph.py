"""The whole step as one CUDA graph: a few launches from the host in place of hundreds, and the same bits.

After ``WARM_UP`` steps in which nothing but numbers changed, a step is captured and from then on replayed. What a step
reads from the host, its count and learning rate and what follows from them, lies in rows on the device that are written
before each step (:class:`~learned_optim.engine.device_scalars.DeviceRows`): a schedule reaches replays. The steps
before the first capture run the same operations on the same rows, so a run that is resumed has the bits of one that was
not. Everything else that a step depends on is compared with what was captured:

    other parameters or state, at other addresses, other dtypes,     captured again, after ``WARM_UP`` further steps
    or steps that parameters of a group no longer share
    gradients at other addresses                                     captured again at once, ``MOVES`` times

``zero_grad`` sets gradients to ``None``, and backward passes allocate new ones. Torch's allocator mostly gives them the
addresses of the step before, since each step allocates and frees the same; a gradient that accumulates stays where it
is anyway. Where gradients keep moving, the graph gets buffers of its own instead, into which they are copied before
each replay: 4 bytes per float32 parameter and some tenth of the step's memory traffic.

A captured step keeps the memory of its temporaries until it is captured again or the optimizer is gone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.engine.device_scalars import DeviceRows
from learned_optim.engine.head import StepReport
from learned_optim.engine.hyperparameters import StepContext
from learned_optim.engine.offload import Offload
from learned_optim.engine.packing import copy_all
from learned_optim.engine.param_state import Format, ParamIndex, ParamState, have_changed
from learned_optim.engine.sharding import Shards
from learned_optim.engine.step import Backend, run_step

#: Steps that run as they are before one is captured: all that is compiled, cached or allocated once is made in them.
WARM_UP = 3
#: How often moved gradients are answered by another capture, which takes about as long as two steps without a graph.
MOVES = 3

Work = Callable[[], StepReport]
#: Of a gradient: address and strides.
Address = tuple[int, tuple[int, ...]]


class Capture(Protocol):
    """What records a step's work on a device and does it again."""

    def works_on(self, device: torch.device) -> bool: ...

    def is_capturing(self) -> bool:
        """Whether someone else is recording at the moment: the user, a whole training step."""
        ...

    def record(self, work: Work, device: torch.device) -> tuple[StepReport, Callable[[], None]]:
        """What ``work`` returned, filled by each replay, and the replay. Recording changes nothing on the device.

        Raises:
            RuntimeError: some of the work cannot be recorded.
        """
        ...


class CudaCapture:
    """``torch.cuda.CUDAGraph``."""

    def works_on(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def is_capturing(self) -> bool:
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def record(self, work: Work, device: torch.device) -> tuple[StepReport, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that load data, may allocate while this one captures.
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            report = work()
        return report, graph.replay


class _Captured(NamedTuple):
    report: StepReport
    replay: Callable[[], None]
    gradients: list[Address]  #: that it reads


class _Layout(NamedTuple):
    """What must stay as it is from one step to the next. Holds the tensors, so that no other can get their ids."""

    params: list[ParamState]
    formats: list[Format]
    rows: list[int]  #: the row of numbers that each parameter reads
    flags: tuple[Any, ...]  #: of torch, that choose between kernels

    def same_as(self, other: _Layout | None) -> bool:
        return (
            other is not None
            and len(self.params) == len(other.params)
            and all(map(is_, self.params, other.params))
            and all(map(is_, self.formats, other.formats))
            and (self.rows, self.flags) == (other.rows, other.flags)
        )


class StepGraph:
    """Runs steps, through a graph where there is something to gain and nothing in the way.

    Args:
        capture: records.
        capturable: step counts lie on the device, so that the user can capture; then there is no graph of its own.
        own: whether there is one otherwise.
        offload: lends state that lies on the host; then there is no graph.
    """

    def __init__(
        self, capture: Capture, capturable: bool = False, own: bool = True, offload: Offload | None = None
    ) -> None:
        self._offload = offload
        self._run_step = run_step if offload is None else offload.run
        self._capture, self._capturable, self._own = capture, capturable, own
        self._obstacle = ""
        self._failure = ""
        self.forget()

    def forget(self) -> None:
        """Let go of the graph with its memory, and of all tensors."""
        self._layout: _Layout | None = None
        self._rows: DeviceRows | None = None
        self._seen = 0  #: steps of this layout
        self._moves = 0
        self._captured: _Captured | None = None
        self._buffers: list[Tensor] | None = None  #: for gradients that do not stay where they are

    def described(self, backend: str) -> str:
        """The backend's name, and whether there is a graph, or why not."""
        if self._obstacle or self._failure:
            return f"{backend}; no CUDA graph: {self._obstacle or self._failure}"
        if self._captured is None:
            return backend
        return f"{backend}; one CUDA graph{', gradients copied' if self._buffers else ''}"

    def run(
        self, backend: Backend, params: list[ParamState], shards: Sequence[Shards], skip_nonfinite: bool
    ) -> StepReport:
        """:func:`learned_optim.engine.step.run_step`, or a replay of it."""
        capture = self._capture
        device = params[0].param.device if params else None
        if device is None or not self._own or not capture.works_on(device):
            return self._run_step(backend, params, shards, skip_nonfinite)
        self._obstacle = self._obstacles(params, shards, skip_nonfinite)
        if self._obstacle or self._failure:
            self.forget()
            return self._run_step(backend, params, shards, skip_nonfinite)
        contexts = self._write_rows(params, device)
        if self._captured is None and (self._seen < WARM_UP or any(p.is_second for p in params)):
            self._seen += 1  # the host must see whether a tensor whose second step this is ever had a gradient
            return _as_on_host(run_step(backend, params, ()), contexts)
        try:
            captured = self._fitting(capture, backend, params, device)
        except RuntimeError as error:
            self._failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            warnings.warn(
                f"learned_optim: the step could not be captured as a CUDA graph and runs without: {error}",
                RuntimeWarning,
                stacklevel=4,
            )
            self.forget()
            return _as_on_host(run_step(backend, params, ()), contexts)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            captured.replay()
        have_changed(params)
        return _as_on_host(captured.report, contexts)

    def check(self, groups: Iterable[Mapping[str, Any]], states: Mapping[Tensor, Any]) -> None:
        """Look, before anything has changed, whether the user captures a step that can be captured.

        Raises:
            RuntimeError: it needs the host, or state that replays would set to zero again and again.
        """
        if not self._capture.is_capturing():
            return
        if not self._capturable:
            raise RuntimeError(
                "step() is being captured in a CUDA graph, but its step counts lie on the host, which replays do not "
                "come by. Nothing was changed. Make the optimizer with capturable=True"
            )
        if any(p.grad is not None and not states.get(p) for group in groups for p in group["params"]):
            raise RuntimeError(
                "step() is being captured in a CUDA graph before all parameters have state, which every replay would "
                "make anew. Nothing was changed. Run a step or two before the capture"
            )

    def _obstacles(self, params: list[ParamState], shards: Sequence[Shards], skip_nonfinite: bool) -> str:
        """Why there can be no graph, or nothing."""
        if self._capturable:
            return "capturable=True leaves capturing to you"
        if self._offload is not None:
            return "offload=True copies state to and fro"
        if shards:
            return "sharded parameters"
        if skip_nonfinite:
            return "skip_nonfinite looks at gradients"
        if any(p.rows is not None for p in params):
            return "sparse gradients"
        if any(p.complex for p in params):
            return "complex parameters"
        if len({p.format.device for p in params}) > 1:
            return "parameters on several devices"
        return ""

    def _write_rows(self, params: list[ParamState], device: torch.device) -> dict[ParamIndex, StepContext]:
        """Give the parameters the rows of their numbers; the contexts that they had.

        A row belongs to a group, not to the values in it, so that two schedules may meet and part again.
        """
        contexts = {p.param_index: p.context for p in params}
        in_rows: dict[tuple[int, StepContext], int] = {}
        rows = [in_rows.setdefault((p.param_index[0], p.context), len(in_rows)) for p in params]
        values = [context for _, context in in_rows]
        flags = torch.are_deterministic_algorithms_enabled(), torch.is_inference_mode_enabled()
        layout = _Layout(params, [p.format for p in params], rows, flags)
        if self._rows is None or not layout.same_as(self._layout):
            self.forget()
            self._layout, self._rows = layout, DeviceRows(values, device)
        self._rows.write(values)
        for p, row in zip(params, rows, strict=True):
            p.context = self._rows.contexts[row]
        return contexts

    def _fitting(self, capture: Capture, backend: Backend, params: list[ParamState], device: torch.device) -> _Captured:
        """A graph that reads the gradients where they are now, or in buffers into which they have been copied."""
        if self._buffers is not None:
            copy_all(self._buffers, [p.grad for p in params])
        addresses = [(p.grad.data_ptr(), p.grad.stride()) for p in params] if self._buffers is None else []
        if self._captured is not None and self._captured.gradients == addresses:
            return self._captured
        if self._captured is not None:
            self._captured = None  # its memory goes before the next one is captured
            self._moves += 1
            if self._moves > MOVES:
                self._buffers = [p.grad.clone(memory_format=torch.preserve_format) for p in params]
                addresses = []
        if self._buffers is not None:
            for p, buffer in zip(params, self._buffers, strict=True):
                p.grad = buffer
        backend.before_capture(params)
        self._captured = _Captured(*capture.record(lambda: run_step(backend, params, ()), device), addresses)
        return self._captured


def _as_on_host(report: StepReport, contexts: Mapping[ParamIndex, StepContext]) -> StepReport:
    """A report whose records tell step and learning rate as the host knows them: rows are written over."""
    records = [r._replace(contexts=[contexts[index] for index in r.params]) for r in report.records]
    return replace(report, records=records)
