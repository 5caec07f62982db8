"""Training family that forecasts generated series: linear models, convolutions in time, patches, recurrent networks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import LossFn, ModuleTask, Task, TaskFamily
from ..nets import Residual, Style, initialise, mlp, norm_layer, random_style, transformer_blocks
from ..sampling import Data, chance, choice, integer, log_int, run_length, spawn, uniform


class Panel:
    """Many series of several channels, ``[series, time, channels]``, all of one kind and each with its own numbers.

    Every channel is a mixture of components that the channels of a series share: two seasons of a random wave form,
    a trend that turns now and then, an autoregression whose noise changes between a calm and a wild regime, and in
    some panels a chaotic system (Lorenz's, or coupled logistic maps).
    """

    def __init__(self, rng: torch.Generator, series: int, time: int, channels: int) -> None:
        self.shape = series, time, channels
        self.noise, self.trend = uniform(rng, 0.05, 0.4), choice(rng, (0.0, 0.3, 1.0))
        self.chaos = choice(rng, ("none", "lorenz", "lorenz", "maps"))
        self.periods = log_int(rng, 5, 14), log_int(rng, 15, 60)
        self.make_rng = spawn(rng)

    def make(self) -> Tensor:
        """The panel; every channel of every series has deviation 1."""
        rng, (series, _, channels) = self.make_rng(), self.shape
        parts = [self._season(rng, period) for period in self.periods]
        parts += [self._regression(rng), self.trend * self._trend(rng)]
        if self.chaos != "none":
            parts.append(2.0 * (self._lorenz(rng) if self.chaos == "lorenz" else self._maps(rng)))
        components = torch.stack(parts, 2)
        mixing = torch.randn(series, len(parts), channels, generator=rng)
        x = components @ (0.6 * mixing + 0.8 * torch.randn(1, len(parts), channels, generator=rng))
        x = x / (x.std(1, keepdim=True) + 1e-6)
        return x + 0.2 * self.noise * torch.randn(x.shape, generator=rng)

    def _season(self, rng: torch.Generator, period: int) -> Tensor:
        series, time, _ = self.shape
        waves = torch.randn(3, 2, generator=rng) / torch.arange(1, 4)[:, None]
        # Every series has a period of its own, to be seen in its past.
        stretch = (0.3 * torch.randn(series, 1, generator=rng)).exp()
        angle = 2 * math.pi * (stretch * torch.arange(time) / period + torch.rand(series, 1, generator=rng))
        x = sum(a * (k * angle).sin() + b * (k * angle).cos() for k, (a, b) in enumerate(waves.tolist(), 1))
        swell = 1 + 0.4 * (angle / 7.3).sin()  # a season is stronger in some years than in others
        return x * swell

    def _regression(self, rng: torch.Generator) -> Tensor:
        series, time, _ = self.shape
        radius, angle = uniform(rng, 0.6, 0.97), uniform(rng, 0.1, 1.5)
        a, b = 2 * radius * math.cos(angle), -radius * radius
        wild = torch.zeros(series, dtype=torch.bool)
        now = before = torch.zeros(series)
        values = []
        for _ in range(time):
            wild = wild ^ (torch.rand(series, generator=rng) < 0.02)
            shock = self.noise * torch.where(wild, 1.5, 0.4) * torch.randn(series, generator=rng)
            now, before = a * now + b * before + shock, now
            values.append(now)
        return torch.stack(values, 1)

    def _trend(self, rng: torch.Generator) -> Tensor:
        series, time, _ = self.shape
        turn = torch.rand(series, time, generator=rng) < 0.01
        slope = (turn * torch.randn(series, time, generator=rng)).cumsum(1) / 40
        return (slope - 0.5 * slope.mean(1, keepdim=True)).cumsum(1) / 5

    def _lorenz(self, rng: torch.Generator) -> Tensor:
        x, y, z = (8 * torch.randn(3, self.shape[0], generator=rng)).unbind(0)
        z, speed, values = z.abs() + 20, uniform(rng, 0.3, 1.0), []
        for _ in range(self.shape[1]):
            for _ in range(4):
                step = 0.02 * speed
                x, y, z = x + step * 10 * (y - x), y + step * (x * (28 - z) - y), z + step * (x * y - 8 / 3 * z)
            values.append(x / 8)
        return torch.stack(values, 1)

    def _maps(self, rng: torch.Generator) -> Tensor:
        x, rate, values = torch.rand(self.shape[0], 3, generator=rng), uniform(rng, 3.6, 3.9), []
        for _ in range(self.shape[1]):
            x = rate * x * (1 - x)
            x = 0.9 * x + 0.1 * x.mean(1, keepdim=True)
            values.append(4 * (x[:, 0] - 0.5))
        return torch.stack(values, 1)


class Decomposed(nn.Module):
    """One linear map over time for the moving average and one for the rest, shared by channels (DLinear)."""

    def __init__(self, past: int, future: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.slow, self.fast = nn.Linear(past, future), nn.Linear(past, future)

    def forward(self, x: Tensor) -> Tensor:  # [batch, channels, past] to [batch, channels, future]
        side = self.window // 2
        padded = torch.cat([x[..., :1].expand(-1, -1, side), x, x[..., -1:].expand(-1, -1, side)], 2)
        slow = padded.unfold(2, 2 * side + 1, 1).mean(3)
        return self.slow(slow) + self.fast(x - slow)


class Causal(nn.Module):
    """A convolution that sees the present and the past only, on ``[batch, channels, time]``."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (2 * self.conv.dilation[0], 0)))


class Convolutional(nn.Module):
    """Residual blocks of dilated causal convolutions (TCN); the last moment gives ``[batch, channels, future]``."""

    def __init__(self, channels: int, future: int, width: int, depth: int, style: Style) -> None:
        super().__init__()
        blocks = [
            Residual(
                nn.Sequential(
                    Causal(width, width, 2**i),
                    *norm_layer(style.norm, width, 1),
                    style.act(),
                    Causal(width, width, 2**i),
                    style.act(),
                )
            )
            for i in range(depth)
        ]
        self.body = nn.Sequential(Causal(channels, width, 1), *blocks)
        self.output = nn.Linear(width, channels * future)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.body(x)[..., -1]).view(*x.shape[:2], -1)


class Patches(nn.Module):
    """A transformer over patches of each channel by itself (PatchTST): to ``[batch, channels, future]``."""

    def __init__(self, past: int, future: int, patch: int, width: int, depth: int, heads: int, style: Style) -> None:
        super().__init__()
        self.patch, count = patch, past // patch
        self.embed, self.position = nn.Linear(patch, width), nn.Parameter(0.02 * torch.randn(count, width))
        self.blocks = transformer_blocks(width, depth, heads, style, causal=False)
        self.output = nn.Linear(count * width, future)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _ = x.shape
        patches = x.reshape(batch * channels, -1, self.patch)
        return self.output(self.blocks(self.embed(patches) + self.position).flatten(1)).view(batch, channels, -1)


class Recurrent(nn.Module):
    """A GRU over time; the last state gives ``[batch, channels, future]``."""

    def __init__(self, channels: int, future: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(channels, hidden, layers, batch_first=True)
        self.output = nn.Linear(hidden, channels * future)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.rnn(x.transpose(1, 2))[0][:, -1]).view(*x.shape[:2], -1)


class Stacks(nn.Module):
    """Perceptrons that each forecast a part and explain a part of the past away (N-BEATS), shared by channels."""

    def __init__(self, past: int, future: int, width: int, depth: int, style: Style) -> None:
        super().__init__()
        self.past = past
        self.blocks = nn.ModuleList(mlp([past, width, width, past + future], style) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        rest, forecast = x.flatten(0, 1), 0.0
        for block in self.blocks:
            out = block(rest)
            rest, forecast = rest - out[:, : self.past], forecast + out[:, self.past :]
        return torch.as_tensor(forecast).view(*x.shape[:2], -1)


def quantile_loss(error: Tensor, quantiles: Tensor) -> Tensor:
    """Pinball loss of ``error`` = target - forecast, ``[..., quantiles]``."""
    return 2 * torch.maximum(quantiles * error, (quantiles - 1) * error).mean()


def forecast_loss(kind: str, centred: bool) -> LossFn:
    """``"mse"``, ``"huber"``, or ``"quantile"`` (the mean over the 10, 50 and 90% quantiles).

    Batch ``(past [batch, channels, past], future [batch, channels, future])``; with ``centred`` the network sees and
    forecasts differences from the last value.
    """

    def loss(module: nn.Module, batch: Data) -> Tensor:
        past, future = batch
        if centred:
            past, future = past - past[..., -1:], future - past[..., -1:]
        forecast = module(past)
        if kind == "quantile":
            quantiles = torch.tensor([0.1, 0.5, 0.9], device=future.device)
            return quantile_loss(future.unsqueeze(3) - forecast.view(*future.shape, 3), quantiles)
        return F.mse_loss(forecast, future) if kind == "mse" else F.huber_loss(forecast, future, delta=0.5)

    return loss


def _forecaster(
    rng: torch.Generator, past: int, outputs: int, channels: int
) -> tuple[Callable[[], nn.Module], float, tuple[int, int]]:
    """A random network, its multiply-adds per example, and the range of its batch sizes."""
    kind = choice(rng, ("linear", "convolutional", "patches", "recurrent", "stacks"))
    style = random_style(rng, norms=("none", "layer", "batch"), inits=("default", "xavier", "scaled", "zero_output"))
    width, depth = log_int(rng, 12, 64), integer(rng, 1, 3)
    if kind == "linear":
        window = choice(rng, (5, 9, 25))
        return lambda: initialise(Decomposed(past, outputs, window), style), 2 * channels * past * outputs, (64, 256)
    if kind == "convolutional":
        make = lambda: initialise(Convolutional(channels, outputs, width, depth + 1, style), style)  # noqa: E731
        return make, 6 * (depth + 1) * past * width**2, (32, 128)
    if kind == "patches":
        width, heads, patch = choice(rng, (16, 32, 48)), choice(rng, (1, 2, 4)), choice(rng, (4, 8))
        style = Style(style.activation, "rms" if style.norm == "batch" else "layer", style.init, 1.0)
        make = lambda: initialise(Patches(past, outputs, patch, width, depth, heads, style), style)  # noqa: E731
        return make, channels * (past // patch) * depth * 12 * width**2, (16, 64)
    if kind == "recurrent":
        layers = choice(rng, (1, 1, 2))
        return lambda: Recurrent(channels, outputs, width, layers), 8 * past * layers * 3 * width**2, (32, 128)
    width *= 2
    make = lambda: initialise(Stacks(past, outputs, width, depth + 1, style), style)  # noqa: E731
    return make, channels * (depth + 1) * width * (2 * past + outputs + width), (32, 256)


def forecasting(rng: torch.Generator) -> Task:
    """Windows at random places of a generated panel; the network forecasts the values that follow each.

    As demand, load or weather: seasons, trends that turn, shocks that come in clusters, sometimes chaos, and much
    that cannot be foreseen. Held-out is the last fifth of every series' time.
    """
    past, future, channels = 8 * integer(rng, 3, 9), log_int(rng, 4, 20), integer(rng, 1, 5)
    panel = Panel(rng, log_int(rng, 20, 120), integer(rng, 400, 800), channels)
    kind, centred = choice(rng, ("mse", "mse", "huber", "quantile")), chance(rng, 0.5)
    make, work, sizes = _forecaster(rng, past, future * (3 if kind == "quantile" else 1), channels)
    batch_size, make_rng = log_int(rng, *sizes), spawn(rng)

    @functools.cache
    def windows() -> Tensor:
        """``[series, places, channels, past + future]``, a view."""
        return panel.make().unfold(1, past + future, 1)

    def draw(window_rng: torch.Generator, size: int, held_out: bool) -> Data:
        series, places = windows().shape[:2]
        # In short panels with long windows a fifth of the time holds no window: the last eight places then.
        cut = min(int(0.8 * (places + past + future)), places - 8)
        low, high = (cut, places) if held_out else (0, cut - past - future + 1)
        which = torch.randint(series, (size,), generator=window_rng)
        x = windows()[which, torch.randint(low, high, (size,), generator=window_rng)]
        return x[..., :past].contiguous(), x[..., past:].contiguous()

    def batches(batch_rng: torch.Generator) -> Iterator[Data]:
        while True:
            yield draw(batch_rng, batch_size, False)

    return ModuleTask(
        make,
        batches,
        forecast_loss(kind, centred),
        length=run_length(rng, 250, 800, batch_size * work),
        eval_batch=lambda: draw(make_rng(), 512, True),
    )


FAMILIES = (TaskFamily("forecasting", "linear, convolutional, patch and GRU forecasters", "train", forecasting),)
