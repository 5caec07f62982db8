"""A host and a device that are both the CPU: copies arrive when they are waited for, and not before.

As where a GPU copies by itself, memory that is on its way holds nothing of use, be it on the device or on the host, and
copies are made in the order in which they were begun.
"""

from __future__ import annotations

import torch

from learned_optim.engine.offload import Loan


class FakeHost:
    """Stands in for :class:`learned_optim.engine.offload.PinnedMemory`.

    Args:
        device: type of the device that it serves.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.kept: list[torch.Tensor] = []
        self.lent: list[Loan] = []  #: not yet taken back
        self.coming: list[Loan] = []
        self.returning: list[Loan] = []
        self.loans = self.at_once = 0  #: how many, and coordinates that were on the device together, at most

    def serves(self, device: torch.device) -> bool:
        return device.type == self.device

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach().to("cpu", copy=True)
        self.kept.append(kept)
        return kept

    def lend(self, tensors: list[torch.Tensor], device: torch.device) -> Loan:
        on_device = [torch.full_like(t, torch.nan) for t in tensors]
        loan = Loan(device, tensors, on_device, [t.clone(memory_format=torch.preserve_format) for t in tensors])
        for t in tensors:  # the optimizer has no business there until it is back
            t.fill_(torch.nan)
        self.lent.append(loan)
        self.coming.append(loan)
        self.loans += 1
        self.at_once = max(self.at_once, sum(t.numel() for one in self.lent for t in one.on_device))
        return loan

    def await_arrival(self, loan: Loan) -> None:
        while loan in self.coming:
            first = self.coming.pop(0)
            for there, value in zip(first.on_device, first.arrival, strict=True):
                there.copy_(value)

    def take_back(self, loan: Loan) -> None:
        assert loan not in self.coming
        self.returning.append(loan)
        while len(self.returning) > 1:  # the one before has had the time of a chunk
            self._arrive()

    def finish(self, device: torch.device) -> None:
        while self.returning:
            self._arrive()

    def _arrive(self) -> None:
        loan = self.returning.pop(0)
        for host, there in zip(loan.on_host, loan.on_device, strict=True):
            host.copy_(there)
            there.fill_(torch.nan)
        self.lent.remove(loan)
