"""Estimators of the meta-gradient, interchangeable behind one protocol.

===================  =======================================  ====================================================
estimator            bias                                     variance
===================  =======================================  ====================================================
BackpropTruncated    of truncation: what a window of T steps  lowest per inner step for smooth meta-losses; grows
                     cannot see (step sizes chosen too        exponentially with T where the inner training is
                     small); of first order, unless           chaotic (Metz et al. 2019)
                     ``second_order``
ES                   none for the smoothed meta-loss          grows with the number of meta-parameters over
                     E M(theta + sigma e), whole              2 sigma^2 pairs, not with the length; a whole
                     trajectories                             trajectory per estimate
PES                  none for the smoothed meta-loss, over    grows with the number of windows per trajectory; an
                     truncated trajectories                   estimate per window (Vicol et al. 2021)
Mixed                between those of BackpropTruncated and   below either's: means of both, weighted by inverse
                     PES                                      variance (Metz et al. 2019)
===================  =======================================  ====================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.meta_train.backend import chosen_backend
from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.meta_loss import MetaLossFn, final
from learned_optim.meta_train.side_by_side import UnequalBatches, run_side_by_side
from learned_optim.meta_train.slowness import log_slowness, marks
from learned_optim.meta_train.trajectories import Plan, Running, TaskSource, seed_of
from learned_optim.meta_train.unroll import UnrollOptions, unroll
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.policy import Policy
from learned_optim.tasks.rollout import Curve, train

Weights = dict[str, Tensor]


class Estimate(NamedTuple):
    """What one slot of the meta-batch says in one outer step."""

    slot: int
    family: str
    gradient: Weights  #: by meta-parameter, of those that are learned
    meta_loss: float
    inner_steps: int
    kind: str = ""  #: of estimator, where several are mixed


class GradientEstimator(Protocol):
    """Makes an :class:`Estimate` per slot; may keep a trajectory per slot between outer steps."""

    running: dict[int, Running]
    backend: str  #: how the update rule is run: ``eager`` or ``compiled``

    def estimate(self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int) -> Estimate:
        """
        Args:
            policy: the meta-parameters as they stand.
            learned: names of those that are learned.
            slot: number in the meta-batch; decides task and seeds together with the outer step.
            outer_step: counts from 0.
        """
        ...


class _Truncated:
    """Trajectories that are continued, a window at a time, from one outer step to the next."""

    def __init__(self, source: TaskSource, config: MetaTrainConfig, meta_loss: MetaLossFn) -> None:
        self.source, self.config, self.meta_loss = source, config, meta_loss
        self.running: dict[int, Running] = {}
        self.backend: str = chosen_backend(config, source.policy)

    def _window(
        self, policy: Policy, slot: int, outer_step: int, copies: int, init: Tensor | None = None
    ) -> tuple[Running, list]:
        running = self.running.get(slot)
        if running is None or running.step >= running.plan.length or not self._finite(running):
            self.running.pop(slot, None)
            running = Running(slot, self.source.draw(slot, outer_step), outer_step, self.backend == "compiled")
            running.states = [running.problem.start(policy.config, init) for _ in range(copies)]
            self.running[slot] = running
        batches = running.window(min(self.config.unroll_length, running.plan.length - running.step))
        if math.isnan(running.reference):
            begin = running.states[0]
            loss, _ = running.problem.gradient(begin.params, dict(begin.buffers), batches[0])
            running.reference = float(loss)
        return running, batches

    @staticmethod
    def _finite(running: Running) -> bool:
        return all(bool(s.params.isfinite().all()) for s in running.states)


class BackpropTruncated(_Truncated):
    """Back-propagation through a window of the unrolled inner training (Andrychowicz et al. 2016).

    Learns initial parameters too: the name ``init`` among the learned ones, in ``self.init``, [n].
    """

    def __init__(self, source: TaskSource, config: MetaTrainConfig, meta_loss: MetaLossFn) -> None:
        super().__init__(source, config, meta_loss)
        self.init: Tensor | None = None
        self.options = UnrollOptions(
            config.second_order, config.held_out, config.fixed_scale, config.checkpoint_segment, meta_loss is final
        )

    def estimate(self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int) -> Estimate:
        running, batches = self._window(policy, slot, outer_step, 1, self.init)
        weights = {name: w.detach().requires_grad_(name in learned) for name, w in policy.weights().items()}
        wanted = {name: w for name, w in weights.items() if name in learned}
        state = running.states[0]
        if "init" in learned and state.step == 0:
            wanted["init"] = state.params.detach().requires_grad_()
            state = state._replace(params=wanted["init"])
        plan = running.plan
        state, losses = unroll(weights, policy.config, running.problem, state, batches, plan.hyper, self.options)
        meta_loss = self.meta_loss(losses, running.reference)
        grads = torch.autograd.grad(meta_loss, list(wanted.values()), allow_unused=True)
        gradient = {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(wanted.items(), grads, strict=True)}
        running.states = [state.detached()]
        return Estimate(slot, plan.family, gradient, float(meta_loss.detach()), len(batches) - 1)


def perturbation(policy: Policy, learned: Sequence[str], config: MetaTrainConfig, *counters: int) -> Weights:
    """Gaussian noise of deviation ``config.sigma`` for the learned weights, from the run's seed and counters."""
    rng = torch.Generator().manual_seed(seed_of("noise", config.seed, *counters))
    noise = {n: torch.randn(w.shape, generator=rng) * config.sigma for n, w in policy.weights().items() if n in learned}
    return within_parts(noise, config)


def within_parts(weights: Weights, config: MetaTrainConfig) -> Weights:
    """The part of ``weights`` that lies in the directions of the tensor head that are learned."""
    if "head" in weights and config.head_directions:
        head = weights["head"]
        kept = torch.zeros_like(head)
        for direction in config.head_directions:  # at right angles to each other
            unit = torch.nn.functional.normalize(head.new_tensor(direction), dim=0)
            unit = torch.nn.functional.pad(unit, (0, len(head) - len(unit))).unsqueeze(1)
            kept += unit * (unit * head).sum(0)
        weights = {**weights, "head": kept}
    return weights


def shifted(weights: Mapping[str, Tensor], noise: Weights, sign: float) -> Weights:
    """Weights plus ``sign`` times noise, free of graphs."""
    return {n: w.detach() + sign * noise[n].to(w) if n in noise else w.detach() for n, w in weights.items()}


class PES(_Truncated):
    """Persistent evolution strategies: each of an antithetic pair keeps the sum of its perturbations so far."""

    def estimate(self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int) -> Estimate:
        running, batches = self._window(policy, slot, outer_step, 2)
        sigma, plan = self.config.sigma, running.plan
        noise = perturbation(policy, learned, self.config, slot, outer_step)
        for name, value in noise.items():
            running.accumulated[name] = running.accumulated.get(name, torch.zeros_like(value)) + value
        values = []
        with torch.no_grad():
            for i, sign in enumerate((1.0, -1.0)):
                weights = shifted(policy.weights(), noise, sign)
                state, losses = unroll(weights, policy.config, running.problem, running.states[i], batches, plan.hyper)
                running.states[i] = state.detached()
                values.append(float(self.meta_loss(losses, running.reference)))
        factor = (values[0] - values[1]) / (2.0 * sigma**2)
        gradient = {name: factor * total for name, total in running.accumulated.items()}
        return Estimate(slot, plan.family, gradient, sum(values) / 2, len(batches) - 1)


class ES:
    """Antithetic evolution strategies over whole trajectories, with common random numbers.

    Both runs of a pair see the same task, initial parameters and batches. What is compared is their time: see
    :mod:`~learned_optim.meta_train.slowness`.

    With ``meta_loss`` other than ``None``, that function of the losses L_1 .. L_T is compared instead.

    An estimate is the mean over ``config.pairs`` pairs, on one task and run side by side where they are several
    (:mod:`~learned_optim.meta_train.side_by_side`). A task whose batches vary in shape is run on its own, for one pair.
    """

    def __init__(self, source: TaskSource, config: MetaTrainConfig, meta_loss: MetaLossFn | None = None) -> None:
        self.source, self.config, self.meta_loss = source, config, meta_loss
        self.running: dict[int, Running] = {}
        self.backend: str = chosen_backend(config, source.policy)

    def estimate(self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int) -> Estimate:
        plan, config = self.source.draw(slot, outer_step), self.config
        noises = [
            perturbation(policy, learned, config, slot, outer_step, *([i] * (i > 0))) for i in range(config.pairs)
        ]
        steps = plan.length + (self.meta_loss is not None)
        if config.pairs == 1 and config.device == "cpu":
            curves = self._one_by_one(policy, plan, steps, noises[:1])
        else:
            try:
                curves = self._side_by_side(policy, plan, steps, noises)
            except UnequalBatches:
                noises = noises[:1]
                curves = self._one_by_one(policy, plan, steps, noises)
        gradient = {name: torch.zeros_like(value) for name, value in noises[0].items()}
        meta_loss = 0.0
        for noise, (plus, minus) in zip(noises, curves, strict=True):
            difference, mean = self._compare(plus, minus)
            meta_loss += mean / len(noises)
            for name, value in noise.items():
                gradient[name] += value * (difference / (2.0 * config.sigma**2 * len(noises)))
        return Estimate(slot, plan.family, gradient, meta_loss, 2 * len(noises) * plan.length)

    def _one_by_one(self, policy: Policy, plan: Plan, steps: int, noises: list[Weights]) -> list[list[Sequence[float]]]:
        moved = [[with_weights(policy, shifted(policy.weights(), n, sign)) for sign in (1.0, -1.0)] for n in noises]
        return [[run_plan(policy, plan, steps, self.backend).losses for policy in pair] for pair in moved]

    def _side_by_side(
        self, policy: Policy, plan: Plan, steps: int, noises: list[Weights]
    ) -> list[tuple[Sequence[float], Sequence[float]]]:
        sets = [shifted(policy.weights(), noise, sign) for sign in (1.0, -1.0) for noise in noises]
        weights = {name: torch.stack([one[name] for one in sets]) for name in sets[0]}
        losses = run_side_by_side(
            policy.config, weights, plan, steps, compiled=self.backend == "compiled", device=self.config.device
        ).tolist()
        return list(zip(losses[: len(noises)], losses[len(noises) :], strict=True))

    def _compare(self, plus: Sequence[float], minus: Sequence[float]) -> tuple[float, float]:
        """How much worse the first of two runs is, and the mean of what is compared."""
        if self.meta_loss is None:
            first, second = marks(plus), marks(minus)
            return log_slowness(first, second), (first[-1] + second[-1]) / 2
        first, second = (float(self.meta_loss(torch.tensor(losses[1:]), losses[0])) for losses in (plus, minus))
        return first - second, (first + second) / 2


def with_weights(policy: Policy, weights: Weights) -> Policy:
    """A policy of the same configuration with other weights."""
    other = Policy(policy.config, source=policy.source)
    other.load_state_dict({name: w.detach() for name, w in weights.items()})
    return other


def run_plan(policy: Policy, plan: Plan, steps: int, backend: str, held_out: bool = False) -> Curve:
    """Train a planned task with the optimizer itself."""
    hyper = plan.hyper
    return train(
        plan.task, plan.seed,
        lambda params: LearnedOptimizer(params, lr=float(hyper.lr), weight_decay=float(hyper.weight_decay),
                                        policy=policy, backend=backend),
        steps, held_out=held_out,
    )  # fmt: skip


class Mixed:
    """Back-propagation in the even slots of the meta-batch, PES in the odd ones, of the same windows' meta-loss.

    Where the inner training is smooth, back-propagation is the quieter estimate, where it is chaotic PES is; the outer
    loop mixes their means coordinate by coordinate, by inverse variance (Metz et al. 2019, "Understanding and
    correcting pathologies in the training of learned optimizers").
    """

    def __init__(self, source: TaskSource, config: MetaTrainConfig, meta_loss: MetaLossFn) -> None:
        self.parts = BackpropTruncated(source, config, meta_loss), PES(source, config, meta_loss)
        self.running: dict[int, Running] = {}
        for part in self.parts:
            part.running = self.running
        self.backend = self.parts[0].backend

    def estimate(self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int) -> Estimate:
        part = self.parts[slot % 2]
        part.backend = self.backend
        return part.estimate(policy, learned, slot, outer_step)._replace(kind=type(part).__name__)


def make_estimator(source: TaskSource, config: MetaTrainConfig, meta_loss: MetaLossFn) -> GradientEstimator:
    """The estimator that the configuration names."""
    if config.estimator == "backprop":
        return BackpropTruncated(source, config, meta_loss)
    if config.estimator == "pes":
        return PES(source, config, meta_loss)
    if config.estimator == "mixed":
        return Mixed(source, config, meta_loss)
    return ES(source, config)
