"""Training families whose loss holds derivatives of the network: differential equations solved by small networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..base import ModuleTask, Task, TaskFamily
from ..sampling import chance, choice, integer, log_int, log_uniform, run_length, spawn, uniform
from .vision import mlp_work

Batch = dict[str, Tensor]


class Jet(NamedTuple):
    """A function of ``[n, dims]`` points with its derivatives along each axis."""

    value: Tensor  #: [n, 1]
    first: Tensor  #: [dims, n, 1]
    second: Tensor  #: [dims, n, 1], pure second derivatives


class Field(nn.Module):
    """A perceptron with smooth activations on ``[n, dims]`` points, which gives a :class:`Jet`.

    Derivatives go through the layers beside the values (the forward mode of differentiation, to second order). That
    gives what differentiating twice backward does, and gradients of it can be vectorized over runs.

    Args:
        widths: of the layers, inputs and output included.
        omega: the activation is ``sin(omega z)``, or ``tanh`` where this is 0.
        gain: factor of the first layer's weights: how fine the details are that the network begins with.
    """

    def __init__(self, widths: Sequence[int], omega: float, gain: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
        self.omega = omega
        with torch.no_grad():
            cast(nn.Linear, self.layers[0]).weight.mul_(gain)

    def forward(self, x: Tensor) -> Jet:
        n, dims = x.shape
        value = x
        first = torch.eye(dims, dtype=x.dtype, device=x.device)[:, None].expand(dims, n, dims)
        second = torch.zeros_like(first)
        for i, layer in enumerate(cast(Iterable[nn.Linear], self.layers)):
            if i > 0:
                value, slope, bend = self._activation(value)
                first, second = slope * first, bend * first.square() + slope * second
            value = layer(value)
            first, second = nn.functional.linear(torch.cat([first, second]), layer.weight).split(dims)
        return Jet(value, first, second)

    def _activation(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The activation, its derivative and its second derivative."""
        if self.omega:
            sine = (self.omega * z).sin()
            return sine, self.omega * (self.omega * z).cos(), -(self.omega**2) * sine
        t = z.tanh()
        slope = 1 - t.square()
        return t, slope, -2 * t * slope


class Waves(NamedTuple):
    """A sum of plane waves: the true solution."""

    frequency: Tensor  #: [dims, waves]
    phase: Tensor  #: [waves]
    amplitude: Tensor  #: [waves, 1]

    def __call__(self, x: Tensor) -> Jet:
        angle = x @ self.frequency + self.phase
        along = self.frequency[:, None]  # [dims, 1, waves]
        sine, cosine = angle.sin(), angle.cos()
        second = -(along.square() * sine) @ self.amplitude
        return Jet(sine @ self.amplitude, (along * cosine) @ self.amplitude, second)


class Equation(NamedTuple):
    """A differential equation; where time plays a part it is the first axis."""

    dims: tuple[int, int]  #: fewest and most axes
    time_order: int  #: how many conditions hold at the start: 0 without time, 2 where the first derivative is given
    operator: Callable[[Jet, Sequence[float]], Tensor]  #: of the solution and three positive coefficients, to [n, 1]


EQUATIONS = {
    "poisson": Equation((1, 3), 0, lambda u, c: -u.second.sum(0)),
    "helmholtz": Equation((1, 2), 0, lambda u, c: u.second.sum(0) + 4 * c[0] * u.value),
    "reaction": Equation((1, 2), 0, lambda u, c: -0.1 * c[0] * u.second.sum(0) + c[1] * (u.value**3 - u.value)),
    "heat": Equation((2, 3), 1, lambda u, c: u.first[0] - 0.3 * c[0] * u.second[1:].sum(0)),
    "advection": Equation((2, 3), 1, lambda u, c: u.first[0] + c[0] * u.first[1:].sum(0) - 0.02 * u.second[1:].sum(0)),
    "burgers": Equation((2, 2), 1, lambda u, c: u.first[0] + u.value * u.first[1] - 0.05 * c[0] * u.second[1]),
    "wave": Equation((2, 3), 2, lambda u, c: u.second[0] - c[0] * u.second[1:].sum(0)),
    "oscillator": Equation((1, 1), 2, lambda u, c: u.second[0] + 0.3 * c[0] * u.first[0] + 9 * c[1] * u.value),
    "duffing": Equation(
        (1, 1), 2, lambda u, c: u.second[0] + 0.3 * c[0] * u.first[0] - u.value + 4 * c[1] * u.value**3
    ),
    "pendulum": Equation((1, 1), 2, lambda u, c: u.second[0] + 0.3 * c[0] * u.first[0] + 9 * c[1] * u.value.sin()),
}


def edge_points(rng: torch.Generator, n: int, dims: int, time: bool) -> Tensor:
    """Random points [n, dims] on the boundary of [-1, 1]^dims, without the end of time; half are at its beginning."""
    x = 2 * torch.rand(n, dims, generator=rng) - 1
    axis = torch.randint(int(time) if dims > 1 else 0, dims, (n,), generator=rng)
    side = (torch.rand(n, generator=rng) < 0.5).float() * 2 - 1
    if time:
        start = (torch.arange(n) < n // 2) | (dims == 1)
        axis, side = torch.where(start, 0, axis), torch.where(start, -1.0, side)
    return x.scatter(1, axis[:, None], side[:, None])


def physics_informed(rng: torch.Generator) -> Task:
    """A partial or ordinary differential equation with random coefficients, solved by a small network.

    Heat, waves, Burgers, Poisson, Helmholtz, oscillators and others, forced so that a random sum of waves is the
    solution. The loss is the equation's mean squared residual over that of the zero function, plus the weighted error
    at the boundary and at the beginning. Its points are drawn afresh, or come in eight batches that are always the
    same. The held-out loss is the error of the solution itself at other points, in units of its mean square.
    """
    name = choice(rng, sorted(EQUATIONS))
    equation, coefficients = EQUATIONS[name], [log_uniform(rng, 0.3, 3.0) for _ in range(3)]
    dims, waves, data_rng = integer(rng, *equation.dims), integer(rng, 4, 12), spawn(rng)()
    # Higher frequencies along fewer axes: on a cube they would not be learned within a run.
    pitch, weight = uniform(rng, *((5.0, 8.0), (3.0, 5.0), (2.0, 3.0))[dims - 1]), log_uniform(rng, 1.0, 30.0)
    widths = [dims, *[log_int(rng, 32, 128)] * integer(rng, 2, 4), 1]
    omega, gain = uniform(rng, 1.0, 2.0) if chance(rng, 0.4) else 0.0, pitch * uniform(rng, 0.3, 1.0)
    inner, edge = log_int(rng, 48, 192), log_int(rng, 16, 48)
    fixed, time = chance(rng, 0.4), equation.time_order > 0
    length = run_length(rng, 350, 800, (1 + 2 * dims) * (inner + edge) * mlp_work(widths), seconds=3.0)

    make_points_rng, make_held_out_rng = spawn(rng), spawn(rng)

    amplitude = torch.randn(waves, 1, generator=data_rng)
    solution = Waves(
        pitch * torch.randn(dims, waves, generator=data_rng),
        2 * math.pi * torch.rand(waves, generator=data_rng),
        amplitude * math.sqrt(2) / amplitude.norm(),
    )
    probe = 2 * torch.rand(1024, dims, generator=data_rng) - 1
    scale = 1 / float(equation.operator(solution(probe), coefficients).square().mean())

    def draw(batch_rng: torch.Generator) -> Batch:
        points = 2 * torch.rand(inner, dims, generator=batch_rng) - 1
        border = edge_points(batch_rng, edge, dims, time)
        true = solution(border)
        return {
            "points": torch.cat([points, border]),
            "force": equation.operator(solution(points), coefficients),
            "value": true.value,
            # Of the derivative along time, which is given at the beginning alone.
            "speed": true.first[0],
            "known": (border[:, :1] == -1).float() * (equation.time_order == 2),
        }

    def batches(batch_rng: torch.Generator) -> Iterator[Batch]:
        points_rng = make_points_rng()
        always = [draw(points_rng) for _ in range(8)] if fixed else []
        while True:
            yield choice(batch_rng, always) if fixed else draw(batch_rng)

    def loss(module: Any, batch: Batch) -> Tensor:
        u = module(batch["points"])
        if "force" not in batch:
            return (u.value - batch["value"]).square().mean() / batch["value"].square().mean()
        n = len(batch["force"])
        residual = equation.operator(Jet(u.value[:n], u.first[:, :n], u.second[:, :n]), coefficients) - batch["force"]
        border = (u.value[n:] - batch["value"]).square()
        pace = batch["known"] * (u.first[0, n:] - batch["speed"]).square()
        return scale * residual.square().mean() + weight * (border + pace / pitch**2).mean()

    def held_out() -> Batch:
        points = 2 * torch.rand(512, dims, generator=make_held_out_rng()) - 1
        return {"points": points, "value": solution(points).value}

    return ModuleTask(lambda: Field(widths, omega, gain), batches, loss, length=length, eval_batch=held_out)


FAMILIES = (
    TaskFamily("physics_informed", "differential equations solved by small networks", "train", physics_informed),
)
