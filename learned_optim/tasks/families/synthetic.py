"""Training families without a data set: quadratics, factorisations, toy problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..base import BatchMaker, LossFn, ModuleTask, Task, TaskFamily, forked_global_rng
from ..nets import initialise, mlp, random_style
from ..objectives import classification, regression
from ..sampling import (
    Data,
    chance,
    choice,
    dataset_task,
    integer,
    log_int,
    log_uniform,
    run_length,
    spawn,
    split,
    uniform,
)
from .vision import hidden_widths, mlp_work


def stream_task(
    rng: torch.Generator,
    make_module: Callable[[], nn.Module],
    draw: Callable[[torch.Generator, int], Data],
    loss_fn: LossFn,
    *,
    batch_size: int,
    length: int,
) -> ModuleTask:
    """A task whose examples are drawn afresh, ``draw(rng, n)``, and never seen twice."""

    def batches(batch_rng: torch.Generator) -> Iterator[Data]:
        while True:
            yield draw(batch_rng, batch_size)

    make_rng = spawn(rng)
    make_batches: BatchMaker = batches
    return ModuleTask(make_module, make_batches, loss_fn, length=length, eval_batch=lambda: draw(make_rng(), 512))


class Quadratic(nn.Module):
    """A point in n dimensions, held as several tensors; buffers: curvatures ``[n]`` and, perhaps, a rotation."""

    curvature: Tensor
    rotation: Tensor | None

    def __init__(self, shapes: Sequence[tuple[int, ...]], curvature: Tensor, rotation: Tensor | None) -> None:
        super().__init__()
        self.point = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.register_buffer("curvature", curvature)
        self.register_buffer("rotation", rotation)

    def forward(self, optima: Tensor) -> Tensor:
        distance = torch.cat([block.flatten() for block in self.point]) - optima
        if self.rotation is not None:
            distance = distance @ self.rotation
        return 0.5 * (self.curvature * distance.square()).sum(1).mean()


def noisy_quadratic(rng: torch.Generator) -> Task:
    """``mean over examples of (x - c)' H (x - c) / 2``, the optima c scattered round 0; condition number to 1e5.

    Gradient noise then has the covariance ``H^2`` up to a factor, and the loss has a floor above 0.
    """
    rotated = chance(rng, 0.5)
    blocks = [log_int(rng, 6, 100 if rotated else 3000) for _ in range(integer(rng, 1, 4))]
    shapes = [(n,) if chance(rng, 0.5) else (n // max(2, math.isqrt(n)), max(2, math.isqrt(n))) for n in blocks]
    n = sum(math.prod(shape) for shape in shapes)
    condition, exponent, make_rng = log_uniform(rng, 1.0, 1e5), choice(rng, (0.5, 1.0, 2.0)), spawn(rng)
    curvature = condition ** -(torch.rand(n, generator=rng) ** exponent) * log_uniform(rng, 0.01, 100.0)
    noise = log_uniform(rng, 0.01, 1.0)

    def make() -> nn.Module:
        # The rotation belongs to the task: the same for every initialisation.
        with forked_global_rng(make_rng().initial_seed()):
            rotation = torch.linalg.qr(torch.randn(n, n)).Q if rotated else None
        return Quadratic(shapes, curvature, rotation)

    def draw(batch_rng: torch.Generator, size: int) -> Data:
        return (noise * torch.randn(size, n, generator=batch_rng),)

    batch_size, length = log_int(rng, 1, 64) if n < 2000 else log_int(rng, 1, 8), run_length(rng, 200, 800)
    return stream_task(rng, make, draw, lambda m, batch: m(batch[0]), batch_size=batch_size, length=length)


class Factors(nn.Module):
    """A matrix as a product of two or three factors; entries ``[batch]`` at (row, column) pairs ``[batch, 2]``."""

    def __init__(self, rows: int, columns: int, rank: int, scale: float, deep: bool) -> None:
        super().__init__()
        self.left = nn.Parameter(scale * torch.randn(rows, rank))
        self.right = nn.Parameter(scale * torch.randn(columns, rank))
        self.middle = nn.Parameter(torch.eye(rank)) if deep else None

    def forward(self, pairs: Tensor) -> Tensor:
        left = self.left[pairs[:, 0]]
        return ((left if self.middle is None else left @ self.middle) * self.right[pairs[:, 1]]).sum(1)


def matrix_factorisation(rng: torch.Generator) -> Task:
    rows, columns, rank = log_int(rng, 20, 2000), log_int(rng, 20, 2000), log_int(rng, 2, 32)
    scale, deep, make_rng = log_uniform(rng, 0.03, 0.5), chance(rng, 0.4), spawn(rng)
    data_rng = make_rng()
    decay = torch.arange(1, rank + 1) ** -uniform(rng, 0.0, 1.0)
    true_left = decay * torch.randn(rows, rank, generator=data_rng)
    true_right = torch.randn(columns, rank, generator=data_rng) / decay.norm()
    noise = log_uniform(rng, 0.01, 0.5)

    def draw(batch_rng: torch.Generator, size: int) -> Data:
        pairs = (torch.rand(size, 2, generator=batch_rng) * torch.tensor([rows, columns])).long()
        entries = (true_left[pairs[:, 0]] * true_right[pairs[:, 1]]).sum(1)
        return pairs, entries + noise * torch.randn(size, generator=batch_rng)

    def make() -> nn.Module:
        return Factors(rows, columns, rank, scale, deep)

    batch_size, length = log_int(rng, 32, 512), run_length(rng, 200, 800)
    return stream_task(rng, make, draw, regression, batch_size=batch_size, length=length)


class Sine(nn.Module):
    """``sin(omega * x)``."""

    def __init__(self, omega: float) -> None:
        super().__init__()
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        return (self.omega * x).sin()


def siren(inputs: int, width: int, depth: int, omega: float) -> nn.Sequential:
    """Sine network; the weights are drawn so that every layer's input to the sine has a deviation of about 1."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layer = nn.Linear(inputs if i == 0 else width, width)
        bound = 1 / inputs if i == 0 else math.sqrt(6 / width) / omega
        nn.init.uniform_(layer.weight, -bound, bound)
        layers += [layer, Sine(omega)]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def sine_regression(rng: torch.Generator) -> Task:
    """A function of one or two coordinates, a sum of waves, fitted by a network of sines."""
    inputs, waves, make_rng = integer(rng, 1, 2), integer(rng, 2, 12), spawn(rng)
    data_rng = make_rng()
    frequency = log_uniform(rng, 2.0, 15.0) * torch.randn(inputs, waves, generator=data_rng)
    phase = 2 * math.pi * torch.rand(waves, generator=data_rng)
    width, depth, omega = log_int(rng, 16, 192), integer(rng, 1, 4), uniform(rng, 3.0, 30.0)

    def draw(batch_rng: torch.Generator, size: int) -> Data:
        x = 2 * torch.rand(size, inputs, generator=batch_rng) - 1
        return x, (x @ frequency + phase).sin().sum(1, keepdim=True) / math.sqrt(waves / 2)

    batch_size = log_int(rng, 16, 256)
    length = run_length(rng, 200, 800, batch_size * depth * width**2)
    return stream_task(
        rng, lambda: siren(inputs, width, depth, omega), draw, regression, batch_size=batch_size, length=length
    )


def contrastive(rng: torch.Generator) -> Task:
    """Two noisy nonlinear views of the same hidden vector must find each other in the batch (InfoNCE, nats)."""
    hidden, inputs, code, make_rng = integer(rng, 3, 10), log_int(rng, 16, 200), log_int(rng, 4, 32), spawn(rng)
    data_rng = make_rng()
    mixing = torch.randn(2, hidden, inputs, generator=data_rng) / math.sqrt(hidden)
    shared, noise, temperature = chance(rng, 0.6), uniform(rng, 0.1, 0.6), log_uniform(rng, 0.1, 1.0)
    style, widths = random_style(rng), [inputs, *hidden_widths(rng, 16, 160, (1, 3)), code]

    def draw(batch_rng: torch.Generator, size: int) -> Data:
        z = torch.randn(size, hidden, generator=batch_rng)
        views = [(2 * z @ mixing[0 if shared else i]).tanh() for i in range(2)]
        return tuple(view + noise * torch.randn(view.shape, generator=batch_rng) for view in views)

    def loss(module: nn.Module, batch: Data) -> Tensor:
        a, b = (nn.functional.normalize(module(view), dim=1) for view in batch)
        return nn.functional.cross_entropy(a @ b.T / temperature, torch.arange(len(a), device=a.device))

    batch_size, length = log_int(rng, 16, 128), run_length(rng, 200, 600)
    return stream_task(
        rng, lambda: initialise(mlp(widths, style), style), draw, loss, batch_size=batch_size, length=length
    )


def _toy_points(kind: str, rng: torch.Generator, size: int) -> Data:
    turn = torch.rand(size, generator=rng)
    labels = torch.randint(2, (size,), generator=rng)
    if kind == "spirals":
        radius, angle = turn, 9 * turn + math.pi * labels
    elif kind == "rings":
        radius, angle = 0.5 + 0.5 * labels, 2 * math.pi * turn
    else:  # quadrants
        labels = (turn * 4).long() % 2
        radius, angle = torch.rand(size, generator=rng), 2 * math.pi * turn
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return points + 0.05 * torch.randn(size, 2, generator=rng), labels


def tiny_mlp(rng: torch.Generator) -> Task:
    """Two inputs, at most a few hundred parameters."""
    kind, style = choice(rng, ("spirals", "rings", "quadrants")), random_style(rng, norms=("none", "none", "layer"))
    widths, scale = [2, *hidden_widths(rng, 3, 24, (1, 3)), 2], log_uniform(rng, 0.3, 3.0)

    def draw(batch_rng: torch.Generator, size: int) -> Data:
        points, labels = _toy_points(kind, batch_rng, size)
        return scale * points, labels

    batch_size, length = log_int(rng, 8, 256), run_length(rng, 200, 800)
    return stream_task(
        rng, lambda: initialise(mlp(widths, style), style), draw, classification, batch_size=batch_size, length=length
    )


def sparse_linear(rng: torch.Generator) -> Task:
    """Logistic regression, or one hidden layer, on up to 3000 counts of which most are zero, as in bags of words."""
    inputs, classes, n = log_int(rng, 200, 3000), integer(rng, 2, 20), log_int(rng, 400, 1500)
    present, counts, make_rng = log_uniform(rng, 5.0, 60.0), chance(rng, 0.5), spawn(rng)
    hidden, style = [] if chance(rng, 0.5) else [log_int(rng, 8, 64)], random_style(rng, norms=("none", "layer"))
    widths = [inputs, *hidden, classes]

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        labels = torch.randint(classes, (n,), generator=data_rng)
        rate = 1 / torch.arange(1, inputs + 1)  # the r-th most frequent word comes 1/r as often as the first
        rate = rate * torch.randn(classes, inputs, generator=data_rng).exp()
        rate = present * rate / rate.sum(1, keepdim=True)
        x = torch.poisson(rate[labels], generator=data_rng)
        return split((torch.log1p(x) if counts else (x > 0).float(), labels), data_rng)

    batch_size = log_int(rng, 8, 128)
    length = run_length(rng, 200, 800, batch_size * mlp_work(widths))
    return dataset_task(
        lambda: initialise(mlp(widths, style), style), load, classification, batch_size=batch_size, length=length
    )


class SequenceRegressor(nn.Module):
    """LSTM or GRU over ``[batch, time, inputs]``; the last state gives ``[batch, 1]``."""

    def __init__(self, cell: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn = (nn.GRU if cell == "gru" else nn.LSTM)(inputs, hidden, batch_first=True)
        self.output = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.rnn(x)[0][:, -1])


def recurrent_adding(rng: torch.Generator) -> Task:
    """Add the two marked numbers of a sequence: long stretches of time without any gradient signal."""
    cell, hidden, time = choice(rng, ("gru", "lstm")), log_int(rng, 8, 48), log_int(rng, 6, 20)

    def draw(batch_rng: torch.Generator, size: int) -> Data:
        values = torch.rand(size, time, generator=batch_rng)
        marked = torch.rand(size, time, generator=batch_rng).argsort(1) < 2
        total = (values * marked).sum(1, keepdim=True) - 1.0
        return torch.stack([values, marked.float()], 2), total / math.sqrt(1 / 6)

    batch_size, length = log_int(rng, 16, 64), run_length(rng, 250, 600)
    return stream_task(
        rng, lambda: SequenceRegressor(cell, 2, hidden), draw, regression, batch_size=batch_size, length=length
    )


FAMILIES = (
    TaskFamily("noisy_quadratic", "quadratics with noisy gradients, condition to 1e5", "train", noisy_quadratic),
    TaskFamily("matrix_factorisation", "low-rank factors of a noisy matrix", "train", matrix_factorisation),
    TaskFamily("sine_regression", "sine networks that fit sums of waves", "train", sine_regression),
    TaskFamily("contrastive", "encoders that match two views of a vector", "train", contrastive),
    TaskFamily("tiny_mlp", "perceptrons of a few hundred parameters on the plane", "train", tiny_mlp),
    TaskFamily("sparse_linear", "logistic regression on sparse counts", "train", sparse_linear),
    TaskFamily("recurrent_adding", "GRUs and LSTMs that add two marked numbers", "train", recurrent_adding),
)
