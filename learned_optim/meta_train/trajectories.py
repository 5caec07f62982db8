"""Where trajectories come from: which task, which seed, which length, which learning rate. All from counters."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.problem import InnerState, Problem
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.types import CoordinateState, Hyperparameters, TensorState
from learned_optim.tasks import TaskFamily, augment
from learned_optim.tasks.base import Task
from learned_optim.tasks.recipe import TrainingRecipe, draw_recipe


def seed_of(*parts: Any) -> int:
    """A seed below 2^31 from any values; the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()[:4], "big") >> 1


class Plan(NamedTuple):
    """One trajectory to be run."""

    family: str
    task: Task
    seed: int  #: of its initial parameters and batches
    length: int
    hyper: Hyperparameters
    recipe: TrainingRecipe = TrainingRecipe()

    def hyper_at(self, step: int) -> Hyperparameters:
        """Those of the inner step number ``step``, from 0: with the learning rate that the schedule has there."""
        return self.hyper._replace(lr=self.hyper.lr * self.recipe.lr_factor(min(step, self.length), self.length))


def hyperparameters(policy: PolicyConfig, lr: float, weight_decay: float) -> Hyperparameters:
    """Those of inner steps, with the policy's own betas and eps."""
    beta1, beta2 = policy.betas
    return Hyperparameters(lr, beta1, beta2, policy.eps, weight_decay)


class TaskSource:
    """Draws trajectories: the one of given numbers is always the same.

    Args:
        families: families of tasks, or tasks; a task is its own family, of which only the seed varies.
        config: lengths, curriculum, learning rates, augmentation, seed.
        policy: betas and eps of the inner steps.
    """

    def __init__(self, families: Sequence[TaskFamily | Task], config: MetaTrainConfig, policy: PolicyConfig) -> None:
        self.families, self.config, self.policy = list(families), config, policy

    def draw(self, slot: int, outer_step: int) -> Plan:
        """The trajectory that a slot of the meta-batch begins at an outer step."""
        config = self.config
        rng = random.Random(seed_of(config.seed, slot, outer_step))
        # Consecutive draws walk through a shuffled list, so that no family waits long for its turn.
        position = slot + outer_step * config.meta_batch
        turn, index = divmod(position, len(self.families))
        order = random.Random(seed_of(config.seed, "order", turn)).sample(range(len(self.families)), len(self.families))
        family = self.families[order[index]]
        task = family.task(rng.randrange(10_000)) if isinstance(family, TaskFamily) else family
        if rng.random() < config.augment:
            task = augment(task, torch.Generator().manual_seed(rng.randrange(2**31)))
        spread = math.log(config.inner_lr_spread)
        lr = config.inner_lr * math.exp(rng.uniform(-spread, spread))
        length = self._length(task.length, outer_step)
        seed = rng.randrange(2**31)
        recipe = TrainingRecipe(weight_decay=config.inner_weight_decay)
        if rng.random() < config.recipes:
            recipe = draw_recipe(rng)
        return Plan(family.name, task, seed, length, hyperparameters(self.policy, lr, recipe.weight_decay), recipe)

    def _length(self, wanted: int, outer_step: int) -> int:
        if not self.config.max_length:
            return wanted
        grown = min(1.0, 0.25 + 0.75 * outer_step / self.config.curriculum) if self.config.curriculum else 1.0
        return min(wanted, max(2, round(self.config.max_length * grown)))


class Trajectory:
    """A trajectory under way in a slot of the meta-batch.

    Args:
        slot: number in the meta-batch.
        plan: what is run.
        begun_at: outer step at which it began.
        compiled: whether its updates are run by compiled kernels.
    """

    def __init__(self, slot: int, plan: Plan, begun_at: int, compiled: bool) -> None:
        self.slot, self.plan, self.begun_at = slot, plan, begun_at
        self.problem = Problem(plan.task, plan.seed, compiled, clip_norm=plan.recipe.clip_norm)
        self.states: list[InnerState] = []  #: one, or two antithetic ones
        self.reference = math.nan  #: the loss at the trajectory's beginning
        self.accumulated: dict[str, Tensor] = {}  #: sum of the perturbations so far (PES)
        self._batches: Any = None
        self._next: Any = None

    @property
    def step(self) -> int:
        return self.states[0].step

    @property
    def finished(self) -> bool:
        """Whether it has come to its end, or diverged."""
        return self.step >= self.plan.length or not all(bool(s.params.isfinite().all()) for s in self.states)

    def window(self, length: int) -> list[Any]:
        """The next ``length`` batches, or fewer at the end, and the one after, which the following window begins with.

        The first window also takes the reference loss.
        """
        if self._batches is None:
            self._batches = self.problem.batches(skip=self.step)
            self._next = next(self._batches)
        steps = min(length, self.plan.length - self.step)
        window = [self._next, *(next(self._batches) for _ in range(steps))]
        self._next = window[-1]
        if math.isnan(self.reference):
            begin = self.states[0].with_own_buffers()
            self.reference = float(self.problem.gradient(begin.params, begin.buffers, window[0])[0])
        return window

    def saved(self) -> dict[str, Any]:
        """Plain values and tensors, from which :meth:`restored` continues bit for bit."""
        states = [
            {**s._asdict(), "coordinate_state": s.coordinate_state._asdict(), "tensor_state": s.tensor_state._asdict()}
            for s in self.states
        ]
        return {"slot": self.slot, "begun_at": self.begun_at, "states": states, "reference": self.reference,
                "accumulated": dict(self.accumulated)}  # fmt: skip

    @classmethod
    def restored(cls, saved: dict[str, Any], source: TaskSource, compiled: bool) -> Trajectory:
        """The trajectory of which :meth:`saved` was kept."""
        trajectory = cls(saved["slot"], source.draw(saved["slot"], saved["begun_at"]), saved["begun_at"], compiled)
        for state in saved["states"]:
            coordinates, tensors = CoordinateState(**state["coordinate_state"]), TensorState(**state["tensor_state"])
            state = InnerState(**{**state, "coordinate_state": coordinates, "tensor_state": tensors})
            trajectory.states.append(state)
        trajectory.reference, trajectory.accumulated = saved["reference"], saved["accumulated"]
        return trajectory
