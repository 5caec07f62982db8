"""State on the host, lent to a GPU chunk by chunk for the time of a step.

The next chunk is on its way while one is computed, and the one before on its way back: memory for three chunks in place
of all state, and both directions of the bus at once. Which tensors are run together changes no bits, so neither does
this. A step returns when all of its state is back; ``opt.state`` and a checkpoint never see half of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from learned_optim.engine.head import StepReport
from learned_optim.engine.packing import bins
from learned_optim.engine.param_state import ParamState
from learned_optim.engine.sharding import Shards
from learned_optim.engine.step import Backend, run_step

#: Coordinates of a chunk: a larger parameter is one by itself. 12 bytes each are 200 MB, 8 ms at 25 GB/s.
LENT = 1 << 24


@dataclass(frozen=True, eq=False)
class Loan:
    """State tensors that have a copy on a device."""

    device: torch.device
    on_host: list[Tensor]
    on_device: list[Tensor]
    arrival: Any  #: what to wait for


class Host(Protocol):
    """Where state lies between steps. Copies are begun, in order, and go on while the device computes."""

    def serves(self, device: torch.device) -> bool:
        """Whether the state of parameters on this device lies here."""
        ...

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a state tensor here."""
        ...

    def lend(self, tensors: list[Tensor], device: torch.device) -> Loan:
        """Begin to copy state tensors to the device."""
        ...

    def await_arrival(self, loan: Loan) -> None:
        """Let what the device is told from now on wait for the copies."""
        ...

    def take_back(self, loan: Loan) -> None:
        """Begin to copy back what the device has been told to compute so far."""
        ...

    def finish(self, device: torch.device) -> None:
        """Wait until everything is back."""
        ...


class PinnedMemory:
    """Page-locked memory, from and to which a GPU copies by itself: one stream for each direction."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def keep(self, tensor: Tensor) -> Tensor:
        return tensor.cpu().pin_memory()

    def _there_and_back(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

    def lend(self, tensors: list[Tensor], device: torch.device) -> Loan:
        there, _ = self._there_and_back(device)
        on_device = [torch.empty_like(t, device=device) for t in tensors]
        there.wait_stream(torch.cuda.current_stream(device))  # which may still use the memory for what was there before
        _copy(tensors, on_device, on_device, there)
        return Loan(device, tensors, on_device, there.record_event())

    def await_arrival(self, loan: Loan) -> None:
        torch.cuda.current_stream(loan.device).wait_event(loan.arrival)

    def take_back(self, loan: Loan) -> None:
        _, back = self._there_and_back(loan.device)
        back.wait_stream(torch.cuda.current_stream(loan.device))
        _copy(loan.on_device, loan.on_host, loan.on_device, back)

    def finish(self, device: torch.device) -> None:
        self._there_and_back(device)[1].synchronize()


def _copy(sources: list[Tensor], targets: list[Tensor], on_device: list[Tensor], stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
    for tensor in on_device:
        tensor.record_stream(stream)  # its memory is not given away before


class Offload:
    """Runs steps of parameters whose state lies on a host.

    Args:
        host: keeps it. State that was put into ``opt.state`` by hand need not be pinned, but is then copied slowly.
    """

    def __init__(self, host: Host | None = None) -> None:
        self.host = PinnedMemory() if host is None else host

    def run(
        self, backend: Backend, params: list[ParamState], shards: Sequence[Shards], skip_nonfinite: bool
    ) -> StepReport:
        """:func:`learned_optim.engine.step.run_step`; parameters of a device that is not served as always."""
        served = [p for p in params if p.numel and p.rows is None and self.host.serves(p.param.device)]
        if not served:
            return run_step(backend, params, shards, skip_nonfinite)
        backend.prepare(params)
        by_index = {p.param_index: p for p in served}
        report = run_step(backend, [p for p in params if p.param_index not in by_index], shards, skip_nonfinite)
        devices = dict.fromkeys(p.param.device for p in served)
        try:
            for device in devices:
                for one in self._run_chunks(backend, [p for p in served if p.param.device == device], skip_nonfinite):
                    report.add(one)
        finally:
            for device in devices:
                self.host.finish(device)
        report.left_out = [by_index.get(p.param_index, p) for p in report.left_out]  # not the state on the device
        return report

    def _run_chunks(self, backend: Backend, params: list[ParamState], skip_nonfinite: bool) -> Iterator[StepReport]:
        """Reports of a device's parameters, chunk by chunk; each parameter is lent once for all of its tensors."""
        whole = [list(tensors) for _, tensors in groupby(params, lambda p: p.param_index[:2])]
        chunks = list(bins(whole, lambda tensors: tensors[0].state_on_host[0].numel(), LENT))
        coming = self._lend(chunks[0])
        for following in [*chunks[1:], None]:
            loan, lent = coming
            if following is not None:
                coming = self._lend(following)
            self.host.await_arrival(loan)
            yield run_step(backend, lent, (), skip_nonfinite)
            self.host.take_back(loan)

    def _lend(self, chunk: list[list[ParamState]]) -> tuple[Loan, list[ParamState]]:
        """Begin to lend the state of some parameters; their tensors as they are on the device."""
        states = [tensors[0].state_on_host for tensors in chunk]
        loan = self.host.lend(list(chain.from_iterable(states)), chunk[0][0].param.device)
        on_device = iter(loan.on_device)
        lent = []
        for tensors, state in zip(chunk, states, strict=True):
            there = [next(on_device) for _ in state]
            lent += [tensor.with_state(there) for tensor in tensors]
        return loan, lent
