"""A CUDA graph on a CPU: records the operations of a step with their very tensors, and does them again.

As on a GPU nothing happens while it is recorded, Python numbers are frozen, memory is read and written where it was,
and whatever asks for a value, or brings data from the host, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "equal", "is_nonzero", "masked_select")


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The arguments that an operation changes."""
    inputs = zip(func._schema.arguments, args, strict=False)
    by_name = ((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)
    changed = [x for a, x in (*inputs, *by_name) if a.alias_info is not None and a.alias_info.is_write]
    return [t for t in tree_leaves(changed) if isinstance(t, torch.Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.made: list[torch.Tensor] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(name in str(func) for name in REFUSED):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        written = _written(func, args, kwargs)
        for t in written:
            whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
            self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))
        out = func(*args, **kwargs)
        is_view = any(r.alias_info is not None for r in func._schema.returns) and not written
        if not is_view:
            self.operations.append((func, args, kwargs, None if written else out))
            self.made += [] if written else [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


_recording: list[_Recorder] = []


def is_recording(*_: Any) -> bool:
    return bool(_recording)


def launched(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel that is no operation of torch, whose launches are recorded, too."""

    def launch(*args: Any, **kwargs: Any) -> None:
        if _recording:
            _recording[-1].operations.append((kernel, args, kwargs, None))
        else:
            kernel(*args, **kwargs)

    return launch


class FakeCapture:
    """Stands in for :class:`learned_optim.engine.graph.CudaCapture` on CPUs."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.user_captures = False

    def works_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def is_capturing(self) -> bool:
        return self.user_captures

    def record(self, work: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        recorder = _Recorder()
        with torch.no_grad():
            _recording.append(recorder)
            try:
                with recorder:
                    result = work()
            finally:
                _recording.pop()
                for whole, before in recorder.before.values():
                    whole.copy_(before)
            for t in recorder.made:  # memory of the graph, in which nothing has been computed yet
                t.fill_(torch.nan) if t.is_floating_point() else t.zero_()
        self.recorded += 1

        @torch.no_grad()
        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, out in recorder.operations:
                new = func(*args, **kwargs)
                for old, t in zip(tree_leaves(out), tree_leaves(new), strict=True) if out is not None else ():
                    if isinstance(old, torch.Tensor):
                        old.copy_(t)

        return result, replay
