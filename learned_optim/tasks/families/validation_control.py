"""Validation family of bootstrapped targets: fitted Q-iteration on two control problems whose true values are known."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import LossFn, ModuleTask, Task, TaskFamily
from ..objectives import with_value
from ..sampling import Data, chance, choice, dataset_batches, integer, log_int, log_uniform, spawn, uniform


class Decisions(NamedTuple):
    """Transitions of a control problem, one per row, and what the optimal policy gets from there."""

    states: Tensor  #: float ``[n, inputs]``
    actions: Tensor  #: int64 ``[n]``
    rewards: Tensor
    next_states: Tensor
    discounts: Tensor  #: of what follows; 0 where the episode ends
    true_values: Tensor  #: of taking the action and the best ones ever after


def normalised(decisions: Decisions) -> Decisions:
    """In units in which the true values have mean 0 and deviation 1; Bellman's equation holds as before."""
    mean, deviation = decisions.true_values.mean(), decisions.true_values.std() + 1e-6
    return decisions._replace(
        rewards=(decisions.rewards - mean * (1 - decisions.discounts)) / deviation,
        true_values=(decisions.true_values - mean) / deviation,
    )


class Hill(NamedTuple):
    """A weak engine in a rolling landscape, from which a swing leads out on the right; place and velocity in [-1, 1].

    Every step costs 1, an engine that runs 0.3 more. Actions: backwards, idle, forwards.
    """

    slope: float
    ripple: float
    phase: float
    force: float
    discount: float

    def step(self, place: Tensor, velocity: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(place, velocity, reward, ended)`` after an action 0, 1 or 2."""
        uphill = self.slope * (math.pi * place).sin() + self.ripple * (3 * math.pi * place + self.phase).sin()
        velocity = (velocity + 0.15 * (self.force * (action - 1) - uphill - 0.1 * velocity)).clamp(-1, 1)
        moved = place + 0.15 * velocity
        ended = moved >= 1
        velocity = torch.where(moved < -1, 0.0, velocity)
        return moved.clamp(-1, 1), velocity, -1 - 0.3 * (action - 1).abs().float(), ended

    def values(self, points: int = 61, sweeps: int = 150) -> Tensor:
        """Optimal values ``[points, points]`` on the grid of places and velocities, by value iteration."""
        line = torch.linspace(-1, 1, points)
        place, velocity = torch.cartesian_prod(line, line).repeat(3, 1).unbind(1)
        action = torch.arange(3).repeat_interleave(points**2)
        place, velocity, reward, ended = self.step(place, velocity, action)
        table = torch.zeros(points, points)
        for _ in range(sweeps):
            ahead = torch.where(ended, 0.0, interpolated(table, place, velocity))
            table = (reward + self.discount * ahead).view(3, points, points).amax(0)
        return table

    def sample(self, rng: torch.Generator, n: int) -> Decisions:
        start, velocity = 2 * torch.rand(2, n, generator=rng) - 1
        action = torch.randint(3, (n,), generator=rng)
        place, next_velocity, reward, ended = self.step(start, velocity, action)
        discount = self.discount * (~ended).float()
        true = reward + discount * interpolated(self.values(), place, next_velocity)
        before, after = torch.stack([start, velocity], 1), torch.stack([place, next_velocity], 1)
        return normalised(Decisions(before, action, reward, after, discount, true))


def interpolated(table: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A square table over [-1, 1]^2 at the points ``(x, y)``, bilinear."""
    points = torch.stack([y, x], -1)[None, None]  # grid_sample names the last axis first
    return F.grid_sample(table[None, None], points, align_corners=True)[0, 0, 0]


class Inventory(NamedTuple):
    """A shop that orders before it knows the demand, which follows the season; deliveries take one period.

    Sold goods bring 1 each, missed sales cost, and so do goods in stock, ordered goods and each delivery. Actions:
    order 0, 4, 8, 12 or 16.
    """

    demand: tuple[float, ...]  #: mean by season
    holding: float
    missed: float
    delivery: float
    discount: float

    capacity = 40
    orders = tuple(range(0, 20, 4))

    def step(self, stock: Tensor, coming: Tensor, order: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        """``(stock, reward)`` after a period; ``coming`` goods arrive before it is sold from."""
        goods = stock + coming
        left = (goods - demand).clamp(0, self.capacity)
        gain = torch.minimum(goods, demand) - self.missed * (demand - goods).clamp_min(0)
        return left, gain - self.holding * left - 0.4 * order - self.delivery * (order > 0).float()

    def action_values(self, sweeps: int = 120) -> Tensor:
        """Optimal values ``[seasons, stock, coming, order]``, orders as numbers of actions, by value iteration."""
        seasons, orders = len(self.demand), torch.tensor(self.orders)
        demand = torch.arange(31)
        chances = torch.stack([torch.distributions.Poisson(m).log_prob(demand).exp() for m in self.demand])
        chances = chances / chances.sum(1, keepdim=True)
        stock, coming = torch.arange(self.capacity + 1)[:, None, None, None], orders[:, None, None]
        left, reward = self.step(stock, coming, orders[:, None], demand)  # [stock, coming, (order), demand]
        reward = torch.einsum("scod,td->tsco", reward, chances)
        left = left[:, :, 0].long()  # does not depend on the order
        table = torch.zeros(seasons, self.capacity + 1, len(orders), len(orders))
        for _ in range(sweeps):
            value = table.amax(-1).roll(-1, 0)  # of the next season: [seasons, stock, coming = order]
            ahead = torch.einsum("tscdo,td->tsco", value[:, left], chances)
            table = reward + self.discount * ahead
        return table

    def sample(self, rng: torch.Generator, n: int) -> Decisions:
        season, stock, coming, action = (
            torch.randint(high, (n,), generator=rng)
            for high in (len(self.demand), self.capacity + 1, len(self.orders), len(self.orders))
        )
        orders = torch.tensor(self.orders)
        demand = torch.poisson(torch.tensor(self.demand)[season], generator=rng).clamp_max(30)
        left, reward = self.step(stock, orders[coming], orders[action], demand)
        true = self.action_values()[season, stock, coming, action]
        before = self.seen(season, stock, coming)
        after = self.seen((season + 1) % len(self.demand), left, action)
        return normalised(Decisions(before, action, reward, after, torch.full((n,), self.discount), true))

    def seen(self, season: Tensor, stock: Tensor, coming: Tensor) -> Tensor:
        """What the network sees: stock, goods on their way, and which season it is."""
        parts = [stock[:, None] / 20 - 1, coming[:, None] / 2 - 1, F.one_hot(season, len(self.demand))]
        return torch.cat([part.float() for part in parts], 1)


class Dueling(nn.Module):
    """Values of the actions as a value of the state plus advantages (Wang et al. 2016), with a target network."""

    def __init__(self, inputs: int, width: int, actions: int) -> None:
        super().__init__()
        self.online, self.target = (
            nn.Sequential(
                *(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU()),
                *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1 + actions)),
            )
            for _ in range(2)
        )
        self.target.load_state_dict(self.online.state_dict())
        self.target.requires_grad_(False)

    @staticmethod
    def values(network: nn.Module, states: Tensor) -> Tensor:
        value, advantages = network(states).split_with_sizes([1, network[-1].out_features - 1], 1)  # pyright: ignore
        return value + advantages - advantages.mean(1, keepdim=True)


def bootstrapped(module: Any, batch: tuple[Tensor, ...], double: bool) -> Tensor:
    """Error against the true values in units of their variance, with the gradient of the bootstrapped loss.

    The bootstrapped loss itself cannot be compared between runs: it is small wherever a network agrees with its own
    target. Batch: ``(*Decisions, share)``; the target network first moves by ``share`` of the way to the online one.
    """
    states, actions, rewards, next_states, discounts, true_values, share = batch
    values = module.values(module.online, states).gather(1, actions[:, None]).squeeze(1)
    error = F.mse_loss(values.detach(), true_values)
    if not module.training:
        return error
    with torch.no_grad():
        for ours, theirs in zip(module.target.parameters(), module.online.parameters(), strict=True):
            ours.lerp_(theirs, share)
        ahead = module.values(module.target, next_states)
        judge = module.values(module.online, next_states) if double else ahead
        targets = rewards + discounts * ahead.gather(1, judge.argmax(1, keepdim=True)).squeeze(1)
    return with_value(F.smooth_l1_loss(values, targets), error)


def val_fitted_q(rng: torch.Generator) -> Task:
    """Q-iteration with a target network on recorded decisions: a hill with a weak engine, or the orders of a shop.

    The loss that is reported is the error against the true values, which dynamic programming on a grid knows; it
    comes down only as fast as values spread through the target network, which is copied every few steps or follows
    slowly.
    """
    discount, double, width = uniform(rng, 0.88, 0.94), chance(rng, 0.5), choice(rng, (128, 192, 256))
    make_rng, length, batch_size = spawn(rng), log_int(rng, 400, 700), log_int(rng, 128, 384)
    period = integer(rng, 8, 20)
    share, every = (1.0, period) if chance(rng, 0.5) else (1 / period, 1)
    problem: Hill | Inventory
    if chance(rng, 0.5):
        slope, force = uniform(rng, 0.7, 1.1), uniform(rng, 0.5, 0.8)
        problem = Hill(slope, uniform(rng, 0.0, 0.3), uniform(rng, 0, 2 * math.pi), force, discount)
        inputs, actions = 2, 3
    else:
        demand = tuple(log_uniform(rng, 2, 14) for _ in range(integer(rng, 4, 8)))
        problem = Inventory(demand, uniform(rng, 0.02, 0.1), uniform(rng, 0, 1), uniform(rng, 0, 2), discount)
        inputs, actions = 2 + len(demand), len(Inventory.orders)

    @functools.cache
    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        data = problem.sample(data_rng, 20_000)
        # The shop has a few thousand states in all: a tenth of the states is held out, not of the decisions.
        different, state = torch.unique(data.states, dim=0, return_inverse=True)
        unseen = (torch.rand(len(different), generator=data_rng) < 0.1)[state]
        return tuple(t[~unseen] for t in data), (*(t[unseen][:512] for t in data), torch.zeros(()))

    def batches(batch_rng: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        for step, batch in enumerate(dataset_batches(load()[0], batch_size, batch_rng)):
            yield *batch, torch.tensor(share if step % every == 0 else 0.0)

    loss_fn: LossFn = lambda module, batch: bootstrapped(module, batch, double)  # noqa: E731
    return ModuleTask(
        lambda: Dueling(inputs, width, actions), batches, loss_fn, length=length, eval_batch=lambda: load()[1]
    )


FAMILIES = (
    TaskFamily(
        "val_fitted_q", "fitted Q-iteration with a target network: a hill, a shop's orders", "validation", val_fitted_q
    ),
)
