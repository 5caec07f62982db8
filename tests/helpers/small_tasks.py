"""Small tasks for the tests of meta-training; in any dtype, with tied weights and with BatchNorm."""

import torch
from torch import nn

from learned_optim.tasks import ModuleTask


def regression(dtype=torch.float32, module=None, name="regression", length=12):
    """A teacher seen through a small network; held-out data is the whole data set."""
    x = torch.randn(120, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    y = (x[:, :1] * x[:, 1:2]).tanh()

    def batches(rng):
        while True:
            index = torch.randint(len(x), (16,), generator=rng)
            yield x[index], y[index]

    def loss(net, batch):
        return (net(batch[0]) - batch[1]).square().mean()

    def make():
        return (module() if module else nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))).to(dtype)

    return ModuleTask(make, batches, loss, name=name, length=length, eval_batch=(x, y))


class Tied(nn.Module):
    """The first and the last layer are one tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.last = nn.Linear(5, 5)
        self.last.weight = self.first.weight
        self.out = nn.Linear(5, 1)

    def forward(self, x):
        return self.out(self.last(self.first(x).tanh()))


def normalised():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


class Quadratic:
    """|A w - b|^2 without any module: the protocol is met by a plain class."""

    name, length = "quadratic", 12

    def __init__(self, dtype=torch.float32):
        rng = torch.Generator().manual_seed(3)
        self.a = torch.randn(6, 4, generator=rng, dtype=dtype)
        self.b = torch.randn(6, generator=rng, dtype=dtype)

    def init(self, rng):
        return {"w": torch.randn(4, generator=rng, dtype=self.a.dtype)}, {}

    def batches(self, rng):
        while True:
            yield torch.randn(6, generator=rng, dtype=self.a.dtype) * 0.1

    def loss(self, params, buffers, batch):
        return (self.a @ params["w"] - self.b + batch).square().sum() + 0.1
