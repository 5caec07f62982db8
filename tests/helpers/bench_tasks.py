"""Tasks that train in milliseconds, for the tests of the bench."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from learned_optim.tasks import ModuleTask


class Line:
    """Linear regression with noise; has held-out data and can be sent to another process."""

    def __init__(self, name: str = "line", length: int = 40) -> None:
        self.name = name
        self.length = length

    def init(self, rng: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"hidden": 0.3 * torch.randn(6, 4, generator=rng), "output": torch.zeros(1, 6)}, {}

    def batches(self, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randn(16, 4, generator=rng)
            yield x, x.sum(1, keepdim=True) + 0.1 * torch.randn(16, 1, generator=rng)

    def loss(self, params: dict[str, Tensor], buffers: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (x @ params["hidden"].T @ params["output"].T - y).square().mean()

    def eval_loss(self, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return self.loss(params, buffers, next(self.batches(torch.Generator().manual_seed(99))))


class Cliff(Line):
    """A line whose loss is NaN once any weight is beyond 1.5: bold settings diverge."""

    def loss(self, params: dict[str, Tensor], buffers: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().loss(params, buffers, batch)
        return loss / 0.0 if float(params["hidden"].detach().abs().max()) > 1.5 else loss


def normed(length: int = 20) -> ModuleTask:
    """A network with BatchNorm."""

    def batches(rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randn(16, 4, generator=rng)
            yield x, x.sum(1, keepdim=True)

    return ModuleTask(
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)),
        batches,
        lambda module, batch: (module(batch[0]) - batch[1]).square().mean(),
        name="normed", length=length, eval_batch=lambda: next(batches(torch.Generator().manual_seed(5))),
    )  # fmt: skip
