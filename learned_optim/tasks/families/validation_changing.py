"""Validation family whose targets switch several times along the run."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..base import ModuleTask, Task, TaskFamily
from ..data_images import preprocess
from ..data_optional import LETTERS, letters
from ..objectives import classification, regression
from ..sampling import Data, chance, choice, dataset_batches, integer, log_int, spawn, uniform


class Mixer(nn.Module):
    """Patches that are mixed by perceptrons, across places and across channels in turn (Tolstikhin et al. 2021).

    ``[batch, 1, 28, 28]`` to ``[batch, outputs]``, patches of 7 x 7.
    """

    def __init__(self, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.places = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(depth)
        )
        self.channels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.view(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49))
        for i, (places, channels) in enumerate(zip(self.places, self.channels, strict=True)):
            x = x + places(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x).mean(1))


class GatedPerceptron(nn.Module):
    """Residual layers in which one half gates the other: ``[batch, inputs]`` to ``[batch, outputs]``."""

    def __init__(self, inputs: int, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer, out in zip(self.layers, self.outs, strict=True):
            value, gate = layer(x).chunk(2, -1)
            x = x + out(value * gate.sigmoid())
        return self.head(x)


Phases = list[Data]
"""Training data of the phases of a run, in order."""


def relabelled_letters(rng: torch.Generator, phases: int, classes: int, share: float) -> tuple[Phases, Data]:
    """Letters that keep their looks while ``share`` of the alphabet is dealt to new classes from phase to phase."""
    images, signs = letters(rng, 6000, len(LETTERS), colour=False)
    images, unseen = preprocess(images, "standardised").split([5600, 400])
    # letters() draws which letter a label stands for; any naming of the letters will do here.
    dealt = [torch.randint(classes, (len(LETTERS),), generator=rng)]
    for _ in range(phases - 1):
        moved = torch.rand(len(LETTERS), generator=rng) < share
        dealt.append(torch.where(moved, torch.randint(classes, (len(LETTERS),), generator=rng), dealt[-1]))
    return [(images, deal[signs[:5600]]) for deal in dealt], (unseen, dealt[-1][signs[5600:]])


def changing_oscillators(rng: torch.Generator, phases: int, noise: float) -> tuple[Phases, Data]:
    """Two coupled, driven oscillators with cubic springs, whose springs and damping change from phase to phase.

    Inputs ``[n, 6]``: places, velocities, sine and cosine of the drive's phase; targets ``[n, 4]``: places and
    velocities after a while, with noise. Runge-Kutta steps.
    """
    data, n = [], 4400
    for _ in range(phases):
        stiff, cubic = 0.5 + 2.5 * torch.rand(2, generator=rng), 2 * torch.rand(2, generator=rng)
        damping, coupling = 0.4 * torch.rand(2, generator=rng), uniform(rng, -1.5, 1.5)
        drive, pace = uniform(rng, 0.5, 2.5), uniform(rng, 1.0, 2.0)
        state = torch.randn(n, 4, generator=rng)
        phase = 2 * math.pi * torch.rand(n, 1, generator=rng)
        start = torch.cat([state, phase.sin(), phase.cos()], 1)

        def flow(
            state: Tensor, phase: Tensor, stiff=stiff, cubic=cubic, damping=damping, coupling=coupling, drive=drive
        ):
            x, v = state.chunk(2, 1)
            pull = coupling * (x.flip(1) - x) + drive * phase.sin()
            return torch.cat([v, pull - stiff * x - cubic * x**3 - damping * v], 1)

        h = 0.075
        for _ in range(20):
            k1 = flow(state, phase)
            k2 = flow(state + h / 2 * k1, phase + pace * h / 2)
            k3 = flow(state + h / 2 * k2, phase + pace * h / 2)
            k4 = flow(state + h * k3, phase + pace * h)
            state, phase = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), phase + pace * h
        data.append((start, state + noise * torch.randn(state.shape, generator=rng)))
    return [(x[:4000], y[:4000]) for x, y in data], (data[-1][0][4000:], data[-1][1][4000:])


def val_switching(rng: torch.Generator) -> Task:
    """Three to five switches of what is asked: other names for the same letters, or a machine whose parts change.

    As in continual learning and in models that follow a plant which is rebuilt: a part of what was learned stays
    right after a switch, and how soon the loss comes down again is what differs between rules. The held-out loss is
    that of the last phase.
    """
    phases, length = integer(rng, 4, 6), log_int(rng, 500, 800)
    weights = [uniform(rng, 0.6, 1.4) for _ in range(phases)]
    ends = [round(length * sum(weights[: i + 1]) / sum(weights)) for i in range(phases - 1)]
    make_rng = spawn(rng)
    load: Callable[[], tuple[Phases, Data]]
    if chance(rng, 0.5):
        classes, share, width, depth = integer(rng, 3, 10), uniform(rng, 0.3, 0.9), choice(rng, (48, 64)), 2
        load = functools.cache(lambda: relabelled_letters(make_rng(), phases, classes, share))
        make_module, loss_fn = lambda: Mixer(width, depth, classes), classification
        batch_size = log_int(rng, 24, 48)
    else:
        noise, width, depth = uniform(rng, 0.02, 0.1), choice(rng, (64, 96)), integer(rng, 3, 4)
        load = functools.cache(lambda: changing_oscillators(make_rng(), phases, noise))
        make_module, loss_fn = lambda: GatedPerceptron(6, width, depth, 4), regression
        batch_size = log_int(rng, 96, 256)

    def batches(batch_rng: torch.Generator) -> Iterator[Data]:
        streams = [dataset_batches(data, batch_size, batch_rng) for data in load()[0]]
        step = 0
        while True:
            yield next(streams[bisect.bisect_right(ends, step)])
            step += 1

    return ModuleTask(make_module, batches, loss_fn, length=length, eval_batch=lambda: load()[1])


FAMILIES = (
    TaskFamily("val_switching", "letters renamed, oscillators rebuilt, 3 to 5 times", "validation", val_switching),
)
