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
Imitation            towards the teacher, which is not        lowest: nothing is back-propagated through the
                     surpassed                                training (module ``imitation``)
GuidedES             a positive definite factor on the        of ES in as many dimensions as there are guides, for
                     meta-gradient of ES                      what lies in their span (module ``guided``)
===================  =======================================  ====================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.meta_loss import MetaLossFn, final
from learned_optim.meta_train.time_ratio import Outcome, compare, held_out_steps
from learned_optim.meta_train.trajectories import Plan, TaskSource, Trajectory, seed_of
from learned_optim.meta_train.unroll import UnrollOptions, unroll
from learned_optim.meta_train.vectorized import UnequalBatches, run_vectorized
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.policy.policy import Policy
from learned_optim.tasks.recipe import SCHEDULES
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
    guide: Weights | None = None  #: a back-propagated gradient beside it, see :mod:`~learned_optim.meta_train.guided`


class GradientEstimator(Protocol):
    """Makes an :class:`Estimate` per slot."""

    def estimate(
        self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int, init: Tensor | None = None
    ) -> Estimate:
        """
        Args:
            policy: the meta-parameters as they stand.
            learned: names of those that are learned; ``init`` is the name of initial parameters.
            slot: number in the meta-batch; decides task and seeds together with the outer step.
            outer_step: counts from 0.
            init: initial parameters for trajectories that begin, [n], in place of the task's own (back-propagation).
        """
        ...


class Truncated:
    """Trajectories that are continued, a window at a time, from one outer step to the next.

    Args:
        source: where they come from.
        config: of the run.
        meta_loss: of a window.
        backend: how the update rule is run: ``eager`` or ``compiled``.
        trajectories: those under way, by slot, which are kept up to date.
    """

    def __init__(
        self,
        source: TaskSource,
        config: MetaTrainConfig,
        meta_loss: MetaLossFn,
        backend: str,
        trajectories: dict[int, Trajectory] | None = None,
    ) -> None:
        self.source, self.config, self.meta_loss, self.backend = source, config, meta_loss, backend
        self.trajectories = {} if trajectories is None else trajectories

    def _window(
        self, policy: Policy, slot: int, outer_step: int, copies: int, init: Tensor | None
    ) -> tuple[Trajectory, list]:
        trajectory = self.trajectories.get(slot)
        if trajectory is None or trajectory.finished:
            self.trajectories.pop(slot, None)
            plan = self.source.draw(slot, outer_step)
            trajectory = Trajectory(slot, plan, outer_step, self.backend == "compiled")
            trajectory.states = [trajectory.problem.start(policy.config, init) for _ in range(copies)]
            self.trajectories[slot] = trajectory
        return trajectory, trajectory.window(self.config.unroll_length)


class BackpropTruncated(Truncated):
    """Back-propagation through a window of the unrolled inner training (Andrychowicz et al. 2016).

    Learns initial parameters too: the name ``init`` among the learned ones.
    """

    def estimate(
        self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int, init: Tensor | None = None
    ) -> Estimate:
        config = self.config
        options = UnrollOptions(
            config.second_order, config.held_out_share, config.fixed_scale, config.checkpoint_segment,
            self.meta_loss is final,
        )  # fmt: skip
        trajectory, batches = self._window(policy, slot, outer_step, 1, init)
        weights = {name: w.detach().requires_grad_(name in learned) for name, w in policy.weights().items()}
        wanted = {name: w for name, w in weights.items() if name in learned}
        (state,) = trajectory.states
        if "init" in learned and state.step == 0:
            wanted["init"] = state.params.detach().requires_grad_()
            state = state._replace(params=wanted["init"])
        plan = trajectory.plan
        state, losses = unroll(weights, policy.config, trajectory.problem, state, batches, plan.hyper_at, options)
        meta_loss = self.meta_loss(losses, trajectory.reference)
        grads = torch.autograd.grad(meta_loss, list(wanted.values()), allow_unused=True)
        gradient = {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(wanted.items(), grads, strict=True)}
        trajectory.states = [state.detached()]
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
        within = torch.zeros_like(head)
        for direction in config.head_directions:  # at right angles to each other
            unit = torch.nn.functional.normalize(head.new_tensor(direction), dim=0)
            unit = torch.nn.functional.pad(unit, (0, len(head) - len(unit))).unsqueeze(1)
            within += unit * (unit * head).sum(0)
        weights = {**weights, "head": within}
    return weights


def shifted(weights: Mapping[str, Tensor], noise: Weights, sign: float) -> Weights:
    """Weights plus ``sign`` times noise, free of graphs."""
    return {n: w.detach() + sign * noise[n].to(w) if n in noise else w.detach() for n, w in weights.items()}


class PES(Truncated):
    """Persistent evolution strategies: each of an antithetic pair keeps the sum of its perturbations so far."""

    def estimate(
        self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int, init: Tensor | None = None
    ) -> Estimate:
        trajectory, batches = self._window(policy, slot, outer_step, 2, init)
        sigma, plan = self.config.sigma, trajectory.plan
        options = UnrollOptions(held_out_share=self.config.held_out_share)
        noise = perturbation(policy, learned, self.config, slot, outer_step)
        for name, value in noise.items():
            trajectory.accumulated[name] = trajectory.accumulated.get(name, torch.zeros_like(value)) + value
        values = []
        with torch.no_grad():
            for i, sign in enumerate((1.0, -1.0)):
                weights, state = shifted(policy.weights(), noise, sign), trajectory.states[i]
                problem = trajectory.problem
                state, losses = unroll(weights, policy.config, problem, state, batches, plan.hyper_at, options)
                trajectory.states[i] = state.detached()
                values.append(float(self.meta_loss(losses, trajectory.reference)))
        factor = (values[0] - values[1]) / (2.0 * sigma**2)
        gradient = {name: factor * total for name, total in trajectory.accumulated.items()}
        return Estimate(slot, plan.family, gradient, sum(values) / 2, len(batches) - 1)


class ES:
    """Antithetic evolution strategies over whole trajectories, with common random numbers.

    Both runs of a pair see the same task, initial parameters and batches. An estimate is the mean over
    ``config.pairs`` pairs on one task. Several are run as one batch of networks
    (:mod:`~learned_optim.meta_train.vectorized`); a task whose batches vary in shape is run by itself, for one pair.

    Args:
        source: where trajectories come from.
        config: of the run.
        meta_loss: function of the losses L_1 .. L_T that is compared; ``None`` compares the time that the two runs
            take (:mod:`~learned_optim.meta_train.time_ratio`).
        backend: how the update rule is run: ``eager`` or ``compiled``.
    """

    def __init__(self, source: TaskSource, config: MetaTrainConfig, meta_loss: MetaLossFn | None, backend: str) -> None:
        self.source, self.config, self.meta_loss, self.backend = source, config, meta_loss, backend

    def estimate(
        self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int, init: Tensor | None = None
    ) -> Estimate:
        return self.compare_runs(policy, learned, self.source.draw(slot, outer_step), slot, outer_step)

    def compare_runs(self, policy: Policy, learned: Sequence[str], plan: Plan, slot: int, outer_step: int) -> Estimate:
        """The estimate on a trajectory that has been drawn."""
        config = self.config
        noises = [self.perturbation(policy, learned, slot, outer_step, *([i] * (i > 0))) for i in range(config.pairs)]
        steps = plan.length + (self.meta_loss is not None)
        if config.pairs == 1 and config.device == "cpu":
            curves = self._one_by_one(policy, plan, steps, noises[:1])
        else:
            try:
                curves = self._vectorized(policy, plan, steps, noises)
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

    def perturbation(self, policy: Policy, learned: Sequence[str], *counters: int) -> Weights:
        """What the first run of a pair adds to the learned weights, and the second subtracts."""
        return perturbation(policy, learned, self.config, *counters)

    @property
    def _held_out_times(self) -> bool:
        return self.meta_loss is None and self.config.held_out_share > 0.0

    def _one_by_one(self, policy: Policy, plan: Plan, steps: int, noises: list[Weights]) -> list[tuple[Curve, Curve]]:
        def run(noise: Weights, sign: float) -> Curve:
            moved = with_weights(policy, shifted(policy.weights(), noise, sign))
            return run_plan(moved, plan, steps, self.backend, self._held_out_times)

        return [(run(noise, 1.0), run(noise, -1.0)) for noise in noises]

    def _vectorized(self, policy: Policy, plan: Plan, steps: int, noises: list[Weights]) -> list[tuple[Curve, Curve]]:
        sets = [shifted(policy.weights(), noise, sign) for sign in (1.0, -1.0) for noise in noises]
        weights = {name: torch.stack([one[name] for one in sets]) for name in sets[0]}
        compiled = self.backend == "compiled"
        evaluate_at = held_out_steps(steps) if self._held_out_times else ()
        losses, held_out = run_vectorized(
            policy.config, weights, plan, steps, compiled=compiled, device=self.config.device, evaluate_at=evaluate_at
        )
        curves = [Curve(*run) for run in zip(losses.tolist(), [None] * len(losses), held_out.tolist(), strict=True)]
        return list(zip(curves[: len(noises)], curves[len(noises) :], strict=True))

    def _compare(self, plus: Curve, minus: Curve) -> tuple[float, float]:
        """How much worse the first of two runs is, and the mean of what is compared."""
        if self.meta_loss is None:
            first, second = (Outcome.of(curve.losses, curve.held_out_along) for curve in (plus, minus))
            mean = (first.training[-1] + second.training[-1]) / 2
            return compare(first, second, self.config.held_out_share), mean
        first, second = (float(self.meta_loss(torch.tensor(c.losses[1:]), c.losses[0])) for c in (plus, minus))
        return first - second, (first + second) / 2


def with_weights(policy: Policy, weights: Weights) -> Policy:
    """A policy of the same configuration with other weights."""
    other = Policy(policy.config, source=policy.source)
    other.load_state_dict({name: w.detach() for name, w in weights.items()})
    return other


def run_plan(policy: Policy, plan: Plan, steps: int, backend: str, held_out: bool = False) -> Curve:
    """Train a planned task with the optimizer itself; ``held_out`` takes the losses that comparisons need."""
    hyper, recipe = plan.hyper, plan.recipe
    return train(
        plan.task, plan.seed,
        lambda params: LearnedOptimizer(params, lr=float(hyper.lr), weight_decay=float(hyper.weight_decay),
                                        policy=policy, backend=backend),
        steps, schedule=SCHEDULES[recipe.schedule], clip_norm=recipe.clip_norm,
        evaluate_at=held_out_steps(steps) if held_out else (),
    )  # fmt: skip


class Mixed(Truncated):
    """Back-propagation in the even slots of the meta-batch, PES in the odd ones, of the same windows' meta-loss.

    Where the inner training is smooth, back-propagation is the quieter estimate, where it is chaotic PES is; the outer
    loop mixes their means coordinate by coordinate, by inverse variance (Metz et al. 2019, "Understanding and
    correcting pathologies in the training of learned optimizers").
    """

    def estimate(
        self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int, init: Tensor | None = None
    ) -> Estimate:
        cls = (BackpropTruncated, PES)[slot % 2]
        part = cls(self.source, self.config, self.meta_loss, self.backend, self.trajectories)
        return part.estimate(policy, learned, slot, outer_step, init)._replace(kind=cls.__name__)
