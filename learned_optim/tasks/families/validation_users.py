"""Validation families of users' work: physics-informed networks, recommendation from sessions, forecasts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import ModuleTask, Task, TaskFamily
from ..sampling import chance, choice, dataset_batches, integer, log_int, log_uniform, spawn, split, uniform


class FourierPerceptron(nn.Module):
    """A field ``[n]`` at points ``[n, 2]``: random Fourier features (Tancik et al. 2020), then tanh layers."""

    def __init__(self, features: int, pitch: float, width: int, depth: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", pitch * torch.randn(2, features))
        widths = [2 + 2 * features, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(width, 1)

    def forward(self, points: Tensor) -> Tensor:
        angle = points @ self.frequencies  # pyright: ignore[reportOperatorIssue]
        x = torch.cat([points, angle.sin(), angle.cos()], 1)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x).squeeze(1)


def derivative(field: Tensor, points: Tensor) -> Tensor:
    """``[n, 2]``: derivatives of a field ``[n]`` at its points, themselves differentiable."""
    return torch.autograd.grad(field.sum(), points, create_graph=True)[0]


class Equation(NamedTuple):
    """A differential equation on x in [-1, 1], y or t in [0, 1], and what holds at the edges.

    ``"helmholtz"``: u_xx + u_yy + k^2 u = f, u = 0 at all edges; f belongs to a sum of three modes. ``"wave"``:
    u_tt = k^2 u_xx, u = 0 at both ends, starting at rest. ``"allen_cahn"``: u_t = d u_xx + k (u - u^3), no flow
    through the ends.
    """

    kind: str
    speed: float  # k
    amplitudes: tuple[float, ...]  # of the modes 1, 2, 3
    weight: float  # of the edges

    def modes(self, points: Tensor) -> Tensor:
        """``[3, n]``: the modes at y = 0, or of the solution of Helmholtz's equation, with their amplitudes."""
        x, y = points.detach().unbind(1)
        k = math.pi * torch.arange(1, 4, device=x.device)[:, None]
        amplitudes = torch.tensor(self.amplitudes, device=x.device)[:, None]
        if self.kind == "allen_cahn":
            return amplitudes * (k * x).cos()
        across = (k * y).sin() if self.kind == "helmholtz" else 1.0
        return amplitudes * (k * (x + 1) / 2).sin() * across

    def residual(self, network: nn.Module, points: Tensor) -> Tensor:
        """How far the network is from solving the equation at each point; points carry gradients."""
        u = network(points)
        first = derivative(u, points)
        xx = derivative(first[:, 0], points)[:, 0]
        if self.kind == "allen_cahn":
            return first[:, 1] - 0.05 * xx - self.speed * (u - u**3)
        yy = derivative(first[:, 1], points)[:, 1]
        if self.kind == "wave":
            return (yy - self.speed**2 * xx) / 10
        k = math.pi * torch.arange(1, 4, device=points.device)[:, None]
        source = ((self.speed**2 - 1.25 * k**2) * self.modes(points)).sum(0)
        return (xx + yy + self.speed**2 * u - source) / 10  # of the order of 1, as the errors at the edges

    def edges(self, network: nn.Module, points: Tensor) -> Tensor:
        """The squared errors at the points moved to the sides and to the start (for Helmholtz: the bottom)."""
        x, y = points.unbind(1)
        sides = torch.stack([torch.where(x < 0, -1.0, 1.0), y], 1)
        start = torch.stack([x, torch.zeros_like(y)], 1)
        at_sides, at_start = network(sides), network(start)
        wanted = self.modes(start).sum(0) if self.kind != "helmholtz" else torch.zeros_like(x)
        error = (at_start - wanted).square()
        if self.kind == "allen_cahn":
            return error + derivative(at_sides, sides)[:, 0].square()
        other = derivative(at_start, start)[:, 1] if self.kind == "wave" else network(torch.stack([x, y * 0 + 1], 1))
        return error + at_sides.square() + other.square()


def physics_loss(module: Any, batch: tuple[Tensor], equation: Equation) -> Tensor:
    """Mean squared residual at the points ``[n, 2]`` plus the weighted one at the edges; needs second derivatives."""
    with torch.enable_grad():  # the held-out loss is asked for without
        points = batch[0].detach().requires_grad_()
        edge = points[: len(points) // 4]
        return equation.residual(module, points).square().mean() + equation.weight * equation.edges(module, edge).mean()


def val_physics_informed(rng: torch.Generator) -> Task:
    """A network that solves Helmholtz's, the wave or the Allen-Cahn equation, given nothing but the equation.

    Losses made of derivatives of the network, as in physics-informed networks, are badly conditioned, and their
    terms pull against each other. Points are drawn afresh for every step; the held-out loss is that at other points.
    """
    equation = Equation(
        choice(rng, ("helmholtz", "wave", "allen_cahn")),
        uniform(rng, 1.0, 3.0),
        tuple(uniform(rng, -1.0, 1.0) / (1 + i) ** 0.5 for i in range(3)),
        log_uniform(rng, 1.0, 30.0),
    )
    features, pitch = integer(rng, 24, 40), uniform(rng, 1.0, 3.0)
    width, depth = log_int(rng, 80, 112), integer(rng, 2, 3)
    n, length, make_rng = log_int(rng, 64, 128), log_int(rng, 400, 700), spawn(rng)

    def draw(generator: torch.Generator, n: int) -> tuple[Tensor]:
        return (torch.rand(n, 2, generator=generator) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0]),)

    def batches(batch_rng: torch.Generator) -> Iterator[tuple[Tensor]]:
        while True:
            yield draw(batch_rng, n)

    return ModuleTask(
        lambda: FourierPerceptron(features, pitch, width, depth),
        batches,
        lambda module, batch: physics_loss(module, batch, equation),
        length=length,
        eval_batch=lambda: draw(make_rng(), 512),
    )


class SessionModel(nn.Module):
    """What comes next in a session: the last item asks the others (as in STAMP, Liu et al. 2018); one table."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.bias = nn.Embedding(items, 1)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.merge = nn.Linear(2 * width, width)
        nn.init.normal_(self.items.weight, std=0.2)
        nn.init.zeros_(self.bias.weight)

    def forward(self, session: Tensor) -> Tensor:
        """Items ``[batch, time]`` to the wanted item's vector ``[batch, width]``."""
        seen = self.items(session)
        asked = self.query(seen[:, -1:]) @ self.key(seen).transpose(1, 2) * seen.shape[-1] ** -0.5
        return self.merge(torch.cat([(asked.softmax(-1) @ seen)[:, 0], seen[:, -1]], 1)).tanh() * 3


def sampled_ranking(module: Any, batch: tuple[Tensor, ...], bpr: bool) -> Tensor:
    """Sampled softmax with the correction for popularity, or BPR (Rendle et al. 2009), against shared negatives.

    Batch: sessions ``[batch, time + 1]``, negatives ``[n]``, and the log of the chance with which each item is drawn
    as a negative, of the wanted items ``[batch]`` and of the negatives ``[n]``.
    """
    session, negatives, log_chance, log_chances = batch
    wanted = session[:, -1]
    vector = module(session[:, :-1])
    positive = (vector * module.items(wanted)).sum(1) + module.bias(wanted)[:, 0]
    scores = vector @ module.items(negatives).T + module.bias(negatives)[:, 0]
    hit = wanted[:, None] == negatives
    if bpr:
        return F.softplus(scores - positive[:, None]).masked_fill(hit, 0.0).mean()
    scores = (scores - log_chances).masked_fill(hit, -math.inf)
    positive = (positive - log_chance)[:, None]
    return (torch.cat([positive, scores], 1).logsumexp(1) - positive[:, 0]).mean()


def browsing(rng: torch.Generator, n: int, items: int, topics: int, length: int) -> Tensor:
    """Sessions ``[n, length]`` that wander through a tree of topics with 8 branches each.

    A visitor stays in the branch, goes to another of the topic, or leaves for another topic; inside a branch few
    items are popular, and each has a companion that is often taken next.
    """
    leaves = 8 * topics
    ranks, skew = items // leaves, uniform(rng, 2.0, 4.0)
    names = torch.randperm(items, generator=rng)
    topic = (topics * torch.rand(n, generator=rng) ** 1.5).long()
    branch = torch.randint(8, (n,), generator=rng)
    rank, session = torch.zeros(n, dtype=torch.int64), []
    for _ in range(length):
        move, follow = torch.rand(2, n, generator=rng)
        left = move < 0.08
        topic = torch.where(left, (topics * torch.rand(n, generator=rng) ** 1.5).long(), topic)
        branch = torch.where(move < 0.3, torch.randint(8, (n,), generator=rng), branch)
        drawn = (ranks * torch.rand(n, generator=rng) ** skew).long()
        rank = torch.where((move > 0.3) & (follow < 0.4), (7 * rank + 3) % ranks, drawn)
        session.append(names[(8 * topic + branch) * ranks + rank])
    return torch.stack(session, 1)


def val_recommender(rng: torch.Generator) -> Task:
    """The next item of a session, out of twenty thousand and more; nearly all parameters are in one large table.

    A batch touches a few hundred rows of it, the popular ones again and again and most of them never: what is known
    of shops and media, where the catalogue is large and negatives are sampled.
    """
    items, width, topics = log_int(rng, 20_000, 32_000), choice(rng, (16, 24, 32)), integer(rng, 12, 40)
    time, bpr, negatives = integer(rng, 4, 8), chance(rng, 0.4), log_int(rng, 64, 256)
    batch_size, length, make_rng = log_int(rng, 64, 192), log_int(rng, 400, 700), spawn(rng)

    @functools.cache
    def load() -> tuple[Tensor, Tensor, Tensor]:
        data_rng = make_rng()
        (sessions,), (held_out,) = split((browsing(data_rng, 100_000, items, topics, time + 1),), data_rng)
        popularity = (1 + torch.bincount(sessions.flatten(), minlength=items)) ** 0.75
        return sessions, held_out, popularity / popularity.sum()

    def with_negatives(sessions: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        chances = load()[2]
        drawn = torch.multinomial(chances, negatives, replacement=True, generator=generator)
        return sessions, drawn, chances[sessions[:, -1]].log(), chances[drawn].log()

    def batches(batch_rng: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        for (sessions,) in dataset_batches((load()[0],), batch_size, batch_rng):
            yield with_negatives(sessions, batch_rng)

    return ModuleTask(
        lambda: SessionModel(items, width),
        batches,
        lambda module, batch: sampled_ranking(module, batch, bpr),
        length=length,
        eval_batch=lambda: with_negatives(load()[1], make_rng()),
    )


def oscillators(rng: torch.Generator, steps: int, series: int) -> Tensor:
    """Phases that pull on each other (Kuramoto 1975), pushed about by noise: their sines."""
    pace, pull = 0.15 + 0.3 * torch.rand(series, generator=rng), 0.12 * torch.randn(series, series, generator=rng)
    phase, rows = 2 * math.pi * torch.rand(series, generator=rng), []
    for noise in 0.03 * torch.randn(steps, series, generator=rng):
        phase = phase + pace + (pull * (phase - phase[:, None]).sin()).mean(1) + noise
        rows.append(phase.sin())
    return torch.stack(rows)


def epidemics(rng: torch.Generator, steps: int, series: int) -> Tensor:
    """Infections that come and go with the seasons in towns that visit each other: logarithms of reported cases."""
    travel = torch.rand(series, series, generator=rng) ** 4
    travel = 0.9 * torch.eye(series) + 0.1 * travel / travel.sum(1, keepdim=True)
    spread, year = 0.35 + 0.15 * torch.rand(series, generator=rng), uniform(rng, 80, 160)
    well, ill, rows = torch.full((series,), 0.6), torch.full((series,), 0.01), []
    for step, noise in enumerate(torch.randn(steps, series, generator=rng)):
        season = 1 + 0.3 * math.sin(2 * math.pi * step / year)
        caught = (season * spread * well * (travel @ ill) * (0.06 * noise).exp()).clamp(max=0.5) + 1e-5
        well = (well - caught + 0.02 * (1 - well - ill)).clamp(0, 1)
        ill = (0.8 * ill + caught).clamp(0, 1)
        rows.append((caught + 1e-4).log())
    return torch.stack(rows)


def queues(rng: torch.Generator, steps: int, series: int) -> Tensor:
    """Jobs that wait at servers in a row, the output of one being the input of the next: roots of the lengths."""
    day, swing = uniform(rng, 30, 60), uniform(rng, 0.3, 0.7)
    capacity, waiting, rows = 90 + 40 * torch.rand(series, generator=rng), torch.zeros(series), []
    for step in range(steps):
        rate = torch.full((series,), 10.0)
        rate[0] = 80 * (1 + swing * math.sin(2 * math.pi * step / day))
        served = torch.minimum(waiting, torch.poisson(capacity, generator=rng))
        arrived = torch.poisson(rate, generator=rng)
        waiting = waiting - served + arrived + 0.9 * F.pad(served[:-1], (1, 0))
        rows.append(waiting.sqrt())
    return torch.stack(rows)


MECHANISMS: dict[str, Callable[[torch.Generator, int, int], Tensor]] = {
    "oscillators": oscillators,
    "epidemics": epidemics,
    "queues": queues,
}


class GatedConvolutions(nn.Module):
    """Patches of time under gated, dilated convolutions (van den Oord et al. 2016) to quantiles of the future.

    ``[batch, series, context]`` to ``[batch, series, horizon, 3]``, relative to the last value seen.
    """

    def __init__(self, series: int, patch: int, width: int, depth: int, horizon: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(series, width, patch, stride=patch)
        self.layers = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(depth))
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth))
        self.head = nn.Linear(width, series * horizon * 3)

    def forward(self, past: Tensor) -> Tensor:
        last = past[:, :, -1:]
        x = self.embed(past - last)
        for layer, skip in zip(self.layers, self.skips, strict=True):
            value, gate = layer(F.pad(x, (layer.dilation[0], 0))).chunk(2, 1)  # pyright: ignore
            x = x + skip(value.tanh() * gate.sigmoid())
        return self.head(x[:, :, -1]).view(len(past), past.shape[1], -1, 3) + last[..., None]


def quantile_loss(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Pinball loss of the quantiles 0.1, 0.5 and 0.9 of ``(past, future)``, both ``[batch, series, time]``."""
    past, future = batch
    error = future[..., None] - module(past)
    quantiles = torch.tensor([0.1, 0.5, 0.9], device=error.device)
    return torch.maximum(quantiles * error, (quantiles - 1) * error).mean()


def val_forecasting(rng: torch.Generator) -> Task:
    """Quantiles of the next values of several series at once: oscillators, epidemics, or queues, all simulated.

    The last sixth of the time is held out, as forecasters do.
    """
    mechanism, series, make_rng = MECHANISMS[choice(rng, list(MECHANISMS))], integer(rng, 6, 12), spawn(rng)
    patch, patches, horizon = choice(rng, (3, 4)), integer(rng, 12, 20), integer(rng, 12, 32)
    width, depth = choice(rng, (48, 64, 80)), integer(rng, 3, 4)
    batch_size, length, context = log_int(rng, 24, 64), log_int(rng, 400, 700), patch * patches

    @functools.cache
    def load() -> tuple[Tensor, Tensor]:
        values = mechanism(make_rng(), 4800, series)
        training, held_out = values.split([4000, 800])
        mean, deviation = training.mean(0), training.std(0) + 1e-6
        return (training - mean) / deviation, (held_out - mean) / deviation

    def windows(values: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        rows = values[start[:, None] + torch.arange(context + horizon)].transpose(1, 2)
        return rows[..., :context], rows[..., context:]

    def batches(batch_rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            start = torch.randint(4000 - context - horizon, (batch_size,), generator=batch_rng)
            yield windows(load()[0], start)

    return ModuleTask(
        lambda: GatedConvolutions(series, patch, width, depth, horizon),
        batches,
        quantile_loss,
        length=length,
        eval_batch=lambda: windows(load()[1], torch.arange(0, 800 - context - horizon, 3)),
    )


FAMILIES = (
    TaskFamily(
        "val_physics_informed", "networks that solve differential equations", "validation", val_physics_informed
    ),
    TaskFamily("val_recommender", "next item of a session, one large table", "validation", val_recommender),
    TaskFamily("val_forecasting", "quantiles of simulated series to come", "validation", val_forecasting),
)
