"""Training families whose targets are made of the network's own predictions: Q-learning, temporal differences.

Decision processes here have a finite number of states, so that their true values can be computed, and networks see
a state as a vector of numbers. Of a bootstrapped loss the value says little: it is small for a network that predicts
zero, and rises as the targets grow. So these tasks have the gradient of the bootstrapped loss, which is all that an
optimizer ever sees, and for a value the mean squared error to the true values of the states in the batch, in units
of the true values' mean square: 1 for a network that says 0. That is what runs are compared by.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, smooth_l1_loss

from ..base import ModuleTask, Task, TaskFamily
from ..nets import initialise, mlp, random_style
from ..objectives import with_value
from ..sampling import chance, choice, integer, log_int, log_uniform, run_length, spawn, uniform
from .vision import hidden_widths, mlp_work

Batch = dict[str, Tensor]


class Decisions(NamedTuple):
    """A finite Markov decision process of S states, A actions and m possible successors of each pair."""

    observations: Tensor  #: [S, inputs], what networks see of a state
    successors: Tensor  #: [S, A, m], int64
    probabilities: Tensor  #: [S, A, m]
    rewards: Tensor  #: [S, A]
    continues: Tensor  #: [S, A], 0 where the episode ends with the action and 1 elsewhere

    def values(self, discount: float, policy: Tensor | None = None) -> Tensor:
        """True values [S, A] of actions under the best policy, or under ``policy`` [S, A]."""
        q = torch.zeros_like(self.rewards)
        for _ in range(math.ceil(math.log(1e-4) / math.log(discount))):
            v = q.amax(1) if policy is None else (policy * q).sum(1)
            q = self.rewards + discount * self.continues * (self.probabilities * v[self.successors]).sum(2)
        return q

    def scaled(self, discount: float, policy: Tensor | None = None) -> tuple[Decisions, Tensor]:
        """The same with rewards in the unit that gives the true values a deviation of 1, and those values."""
        q = self.values(discount, policy)
        scale = q.std()
        return self._replace(rewards=self.rewards / scale), q / scale

    def act(self, rng: torch.Generator, states: Tensor, actions: Tensor) -> Tensor:
        """Successors [n] drawn for states [n] and actions [n]."""
        pick = torch.multinomial(self.probabilities[states, actions], 1, generator=rng)
        return self.successors[states, actions].gather(1, pick).squeeze(1)


class Plant(NamedTuple):
    """A thing to be controlled, of which position and speed are the state."""

    bounds: tuple[float, float]  #: the largest position and speed, either way
    move: Callable[[Tensor, Tensor, Tensor, float], Tensor]  #: acceleration of (position, speed, action, a constant)
    reward: Callable[[Tensor, Tensor, Tensor], Tensor]  #: of the position and speed reached, and the action
    ends: Callable[[Tensor], Tensor] | None  #: whether an episode ends at a position
    seconds: float  #: that an action lasts


PLANTS = {
    "swing_up": Plant(
        (math.pi, 8.0),
        lambda x, v, a, c: 10 * x.sin() + 6 * c * a,
        lambda x, v, a: -x.square() - 0.1 * v.square() - 0.01 * a.square(),
        None,  # a whole turn leads back to where it began
        0.15,
    ),
    "balance": Plant(
        (0.6, 3.0),
        lambda x, v, a, c: 9 * x.sin() + 8 * c * a * x.cos(),
        lambda x, v, a: 1.0 - x.square(),
        lambda x: x.abs() > 0.5,
        0.08,
    ),
    "hill_car": Plant(
        (1.0, 1.5),
        lambda x, v, a, c: -1.5 * (3 * x).sin() + 0.8 * c * a,
        lambda x, v, a: -1.0 - 0.1 * a.square(),
        lambda x: x > 0.85,
        0.25,
    ),
    "braking": Plant(
        (2.0, 2.0),
        lambda x, v, a, c: 2 * c * a - 0.3 * v,
        lambda x, v, a: -x.square() - 0.05 * v.square() - 0.02 * a.square(),
        None,
        0.25,
    ),
}


def plant_decisions(rng: torch.Generator, kind: str) -> Decisions:
    """One of ``PLANTS`` on a grid of 21 to 35 positions and as many speeds.

    An action leads to the four points round where the motion ends, with the probabilities of bilinear interpolation.
    """
    plant, n, actions, strength = PLANTS[kind], integer(rng, 21, 35), integer(rng, 2, 5), uniform(rng, 0.7, 1.4)
    turns = kind == "swing_up"
    position, speed = plant.bounds
    x, v = torch.cartesian_prod(torch.linspace(-position, position, n), torch.linspace(-speed, speed, n)).unbind(1)
    observations = torch.stack([x.sin(), x.cos(), v / speed] if turns else [x / position, v / speed], 1)
    a = torch.linspace(-1.0, 1.0, actions).expand(len(x), actions)
    x, v = x[:, None].expand_as(a), v[:, None].expand_as(a)
    substeps = 5
    for _ in range(substeps):
        v = (v + plant.seconds / substeps * plant.move(x, v, a, strength)).clamp(-speed, speed)
        x = x + plant.seconds / substeps * v
    x = (x + position) % (2 * position) - position if turns else x.clamp(-position, position)
    grid = torch.stack([(x / position + 1) / 2, (v / speed + 1) / 2]) * (n - 1)
    low = grid.floor().clamp(max=n - 2)
    part, corner = grid - low, low.long()
    successors = [(corner[0] + i) * n + corner[1] + j for i in (0, 1) for j in (0, 1)]
    probabilities = [(part[0] if i else 1 - part[0]) * (part[1] if j else 1 - part[1]) for i in (0, 1) for j in (0, 1)]
    continues = torch.ones_like(x) if plant.ends is None else (~plant.ends(x)).float()
    return Decisions(
        observations, torch.stack(successors, 2), torch.stack(probabilities, 2), plant.reward(x, v, a), continues
    )


def random_decisions(rng: torch.Generator) -> Decisions:
    """Points in a cube: an action moves all of them by one vector, rewards are a sum of waves over the cube."""
    states, actions, dims = log_int(rng, 300, 1200), integer(rng, 2, 6), integer(rng, 2, 4)
    points = torch.rand(states, dims, generator=rng)
    moves = 0.3 * torch.randn(actions, dims, generator=rng)
    ends = (points[:, None] + moves).clamp(0, 1)
    distance, successors = torch.cdist(ends.view(-1, dims), points).view(states, actions, states).topk(4, 2, False)
    waves = torch.randn(dims, 8, generator=rng) * uniform(rng, 4.0, 12.0), 2 * math.pi * torch.rand(8, generator=rng)
    height = (points @ waves[0] + waves[1]).sin().mean(1)
    price = 0.1 * torch.rand(actions, generator=rng)
    probabilities = (-distance / distance.mean()).softmax(2)
    return Decisions(points * 2 - 1, successors, probabilities, height[:, None] - price, torch.ones(states, actions))


def sample_decisions(rng: torch.Generator) -> Callable[[], Decisions]:
    """Draws a process, made at first use; half of them are seen through random waves, 12 to 64 of them, with noise."""
    kind, make_rng = choice(rng, ("random", "random", *PLANTS)), spawn(rng)
    features = log_int(rng, 12, 64) if chance(rng, 0.5) else 0

    @functools.cache
    def make() -> Decisions:
        data_rng = make_rng()
        decisions = random_decisions(data_rng) if kind == "random" else plant_decisions(data_rng, kind)
        if not features:
            return decisions
        seen = decisions.observations
        phase = 2 * math.pi * torch.rand(features, generator=data_rng)
        seen = (seen @ torch.randn(seen.shape[1], features, generator=data_rng) * 1.5 + phase).sin()
        return decisions._replace(observations=seen + 0.05 * torch.randn(seen.shape, generator=data_rng))

    return make


class WithTarget(nn.Module):
    """Predictions of a network, and a copy of it that follows: the copy's weights are buffers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.target = copy.deepcopy(network).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    @torch.no_grad()
    def refresh(self, rate: Tensor) -> None:
        """Moves the copy's weights by ``rate`` of the way: 1 makes them the network's, 0 leaves them."""
        for slow, fast in zip(self.target.parameters(), self.network.parameters(), strict=True):
            slow.copy_(torch.lerp(slow, fast, rate))


def held_out_states(rng: torch.Generator, states: int) -> tuple[Tensor, Tensor]:
    """Four fifths of the states, to begin transitions with, and the others, at most 512."""
    order, cut = torch.randperm(states, generator=rng), round(0.8 * states)
    return order[:cut], order[cut:][:512]


def fitted_q(rng: torch.Generator) -> Task:
    """Q-learning on a fixed set of transitions with a target network, as in offline reinforcement learning.

    The process is a swing-up, a balanced pole, a car in a valley, a brake, or a random one. A batch says how far the
    target network moves to the network before the step: all the way every few steps, or a little each time. The
    loss's value, in training as held out, is the error to the best policy's values of all actions; held-out states
    may be reached in the data, but no transition begins at one.
    """
    make, make_rng = sample_decisions(rng), spawn(rng)
    discount, noise, n = uniform(rng, 0.7, 0.95), log_uniform(rng, 0.01, 0.3), log_int(rng, 2000, 20000)
    style, hidden = random_style(rng, norms=("none", "none", "layer", "rms")), hidden_widths(rng, 64, 320, (1, 4))
    batch_size, double, huber = log_int(rng, 32, 256), chance(rng, 0.5), chance(rng, 0.5)
    length = run_length(rng, 300, 800, 3 * batch_size * mlp_work([64, *hidden, 4]), seconds=4.0)
    averaged = chance(rng, 0.4)
    # An error shrinks by the discount with each refresh: there have to be enough of them.
    period, share = log_int(rng, 4, length // 25), log_uniform(rng, 0.03, 0.3)
    criterion = smooth_l1_loss if huber else mse_loss

    @functools.cache
    def load() -> tuple[Batch, Batch]:
        data_rng = make_rng()
        decisions, q = make().scaled(discount)
        starts, others = held_out_states(data_rng, len(q))
        state = starts[torch.randint(len(starts), (n,), generator=data_rng)]
        action = torch.randint(q.shape[1], (n,), generator=data_rng)
        reward = decisions.rewards[state, action]
        data = {
            "state": decisions.observations[state],
            "action": action,
            "reward": reward + noise * decisions.rewards.std() * torch.randn(n, generator=data_rng),
            "discount": discount * decisions.continues[state, action],
            "next_state": decisions.observations[decisions.act(data_rng, state, action)],
            "values": q[state],
        }
        return data, {"state": decisions.observations[others], "values": q[others]}

    def batches(batch_rng: torch.Generator) -> Iterator[Batch]:
        data = load()[0]
        for step in count():
            index = torch.randint(n, (batch_size,), generator=batch_rng)
            rate = share if averaged else float(step % period == 0)
            yield {key: t[index] for key, t in data.items()} | {"rate": torch.tensor(rate)}

    def loss(module: Any, batch: Batch) -> Tensor:
        q = module(batch["state"])
        error = mse_loss(q, batch["values"])
        if "rate" not in batch:
            return error
        module.refresh(batch["rate"])
        with torch.no_grad():
            following = module.target(batch["next_state"])
            best = (module(batch["next_state"]) if double else following).argmax(1, keepdim=True)
            goal = batch["reward"] + batch["discount"] * following.gather(1, best).squeeze(1)
        return with_value(criterion(q.gather(1, batch["action"][:, None]).squeeze(1), goal), error)

    def network() -> nn.Module:
        observations, rewards = make().observations, make().rewards
        return WithTarget(initialise(mlp([observations.shape[1], *hidden, rewards.shape[1]], style), style))

    return ModuleTask(network, batches, loss, length=length, eval_batch=lambda: load()[1])


def temporal_difference(rng: torch.Generator) -> Task:
    """Values of a fixed policy by TD(0) or n-step returns, the semi-gradient without a target network.

    Batches are drawn state by state, or are walkers that go on where the last batch left them, so that one batch
    resembles the next, as in reinforcement learning while acting. The loss's value is the error to the policy's true
    values; held-out states are passed through, but no return begins at one, unless a walker does.
    """
    make, make_rng = sample_decisions(rng), spawn(rng)
    discount, noise, steps = uniform(rng, 0.7, 0.95), log_uniform(rng, 0.01, 0.3), choice(rng, (1, 1, 2, 3, 5))
    style, hidden = random_style(rng, norms=("none", "none", "layer", "rms")), hidden_widths(rng, 64, 320, (1, 4))
    batch_size, walking, sharpness = log_int(rng, 16, 256), chance(rng, 0.5), uniform(rng, 0.5, 4.0)
    length = run_length(rng, 300, 800, 2 * batch_size * mlp_work([64, *hidden, 1]), seconds=4.0)

    @functools.cache
    def load() -> tuple[Decisions, Tensor, Tensor, Tensor, Tensor]:
        data_rng = make_rng()
        decisions = make()
        policy = (sharpness * torch.randn(decisions.rewards.shape, generator=data_rng)).softmax(1)
        decisions, q = decisions.scaled(discount, policy)
        values = (policy * q).sum(1, keepdim=True)
        return decisions, policy, values, *held_out_states(data_rng, len(values))

    def batches(batch_rng: torch.Generator) -> Iterator[Batch]:
        decisions, policy, values, starts, _ = load()
        spread = noise * decisions.rewards.std()

        def begin() -> Tensor:
            return starts[torch.randint(len(starts), (batch_size,), generator=batch_rng)]

        state = begin()
        while True:
            first, reward, remaining = state, torch.zeros(batch_size), torch.ones(batch_size)
            for _ in range(steps):
                action = torch.multinomial(policy[state], 1, generator=batch_rng).squeeze(1)
                chances = torch.randn(batch_size, generator=batch_rng)
                reward = reward + remaining * (decisions.rewards[state, action] + spread * chances)
                remaining = remaining * discount * decisions.continues[state, action]
                state = decisions.act(batch_rng, state, action)
            yield {
                "state": decisions.observations[first],
                "reward": reward[:, None],
                "discount": remaining[:, None],
                "next_state": decisions.observations[state],
                "values": values[first],
            }
            renewed = torch.rand(batch_size, generator=batch_rng) < (0.05 if walking else 1.0)
            state = torch.where(renewed | (remaining == 0), begin(), state)

    def held_out() -> Batch:
        decisions, _, values, _, others = load()
        return {"state": decisions.observations[others], "values": values[others]}

    def loss(module: Any, batch: Batch) -> Tensor:
        v = module(batch["state"])
        error = mse_loss(v, batch["values"])
        if "reward" not in batch:
            return error
        with torch.no_grad():
            goal = batch["reward"] + batch["discount"] * module(batch["next_state"])
        return with_value(mse_loss(v, goal), error)

    def network() -> nn.Module:
        return initialise(mlp([make().observations.shape[1], *hidden, 1], style), style)

    return ModuleTask(network, batches, loss, length=length, eval_batch=held_out)


FAMILIES = (
    TaskFamily("fitted_q", "Q-learning on fixed transitions with a target network", "train", fitted_q),
    TaskFamily("temporal_difference", "values of a policy by bootstrapped returns", "train", temporal_difference),
)
