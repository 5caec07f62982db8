"""Guided evolution strategies (Maheswaranathan et al. 2019, "Guided evolutionary strategies", arXiv 1806.10230).

A gradient that is back-propagated through a window of the inner training is cheap, and blind to what comes after the
window. Evolution strategies see whole runs, and need many of them. Here the first choose the directions in which the
second look. The back-propagated gradients of the last k outer steps span a subspace U, [n, k] with orthonormal columns,
in which a share a (``guide_share``) of the perturbations' variance lies:

    eps_i ~ N(0, sigma^2 S),      S = (1 - a) I + a (n / k) U U^T          of trace n, as without guides
    g     = 1 / (2 sigma^2 P) sum_i eps_i (M(theta + eps_i) - M(theta - eps_i))

M compares whole runs, P is the number of antithetic pairs.

Bias: E g = S grad M, for the smoothed M. S is positive definite, so g points uphill on average however wrong the guides
are. Where they are right, their part of the meta-gradient is larger by 1 - a + a n / k. Variance: for the part of the
meta-gradient that lies in U it is that of evolution strategies in k dimensions; the rest of g is 1 - a times as large,
noise included, as without guides. With a = 0, or before the first guides, this is
:class:`~learned_optim.meta_train.estimators.ES`.

A guide is the gradient of the log-loss at the end of a window, on a batch that is new there, and on held-out data with
``held_out_share``. Windows begin at states that the present rule reaches by itself, anywhere in a run. Their lengths
are heavy-tailed: at least ``unroll_length`` steps, 2^j times as many with probability 2^-j, up to the whole run. Graphs
are recomputed in segments.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.estimators import ES, Estimate, Weights, perturbation, within_parts
from learned_optim.meta_train.meta_loss import FLOOR
from learned_optim.meta_train.problem import Problem
from learned_optim.meta_train.trajectories import Plan, TaskSource, seed_of
from learned_optim.meta_train.unroll import UnrollOptions, unroll
from learned_optim.policy.policy import Policy


class GuidedES(ES):
    """See the module's docstring.

    Args:
        source: where trajectories come from.
        config: of the run.
        backend: how the update rule is run.
        guides: the last ones, by meta-parameter, which the outer loop keeps up to date: see :func:`remember`.
    """

    def __init__(self, source: TaskSource, config: MetaTrainConfig, backend: str, guides: list[Weights]) -> None:
        super().__init__(source, config, None, backend)
        self.guides = guides

    def estimate(
        self, policy: Policy, learned: Sequence[str], slot: int, outer_step: int, init: Tensor | None = None
    ) -> Estimate:
        plan = self.source.draw(slot, outer_step)  # once for both: its task keeps the data that it has made
        estimate = self.compare_runs(policy, learned, plan, slot, outer_step)
        guide, steps = self.guide(policy, learned, plan, slot, outer_step)
        return estimate._replace(guide=guide, inner_steps=estimate.inner_steps + steps)

    def perturbation(self, policy: Policy, learned: Sequence[str], *counters: int) -> Weights:
        noise = perturbation(policy, learned, self.config, *counters)
        basis = orthonormal(self.guides, noise)
        share = self.config.guide_share
        if basis is None or share == 0.0:
            return noise
        rank, size = basis.shape[1], free_dimensions(noise, self.config)
        rng = torch.Generator().manual_seed(seed_of("guided", self.config.seed, *counters))
        inside = basis @ torch.randn(rank, generator=rng, dtype=basis.dtype)
        along = unflattened(inside * (self.config.sigma * math.sqrt(size / rank)), noise)
        return {name: math.sqrt(1.0 - share) * x + math.sqrt(share) * along[name] for name, x in noise.items()}

    def guide(
        self, policy: Policy, learned: Sequence[str], plan: Plan, slot: int, outer_step: int
    ) -> tuple[Weights, int]:
        """A back-propagated meta-gradient of length 1, zeros where it is not finite; and the inner steps it took."""
        config = self.config
        begin, length = window(random.Random(seed_of("window", config.seed, slot, outer_step)), plan.length, config)
        problem = Problem(plan.task, plan.seed, self.backend == "compiled", plan.recipe.clip_norm)
        weights = {name: w.detach() for name, w in policy.weights().items()}
        state = problem.start(policy.config)
        batches = list(islice(problem.batches(), begin + length + 1))
        options = UnrollOptions(held_out_share=config.held_out_share, last_only=True)
        if begin:
            with torch.no_grad():
                approach = options._replace(held_out_share=0.0)
                state, _ = unroll(weights, policy.config, problem, state, batches[: begin + 1], plan.hyper_at, approach)
        weights = {name: w.requires_grad_(name in learned) for name, w in weights.items()}
        options = options._replace(segment=math.isqrt(length))
        _, losses = unroll(weights, policy.config, problem, state.detached(), batches[begin:], plan.hyper_at, options)
        wanted = {name: w for name, w in weights.items() if name in learned}
        end = losses[-1].clamp(min=FLOOR).log()
        grads = torch.autograd.grad(end, list(wanted.values()), allow_unused=True, materialize_grads=True)
        gradient = within_parts(dict(zip(wanted, grads, strict=True)), config)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        usable = math.isfinite(norm) and norm > 0.0
        scale = 1.0 / norm if usable else 0.0
        guide = {name: g * scale if usable else torch.zeros_like(g) for name, g in gradient.items()}
        return guide, begin + length


def window(rng: random.Random, run: int, config: MetaTrainConfig) -> tuple[int, int]:
    """Where a guide's window begins in a run of so many steps, and its length."""
    length = config.unroll_length
    while rng.random() < 0.5 and length < run:
        length *= 2
    length = min(length, run)
    return rng.randint(0, run - length), length


def remember(guides: list[Weights], estimates: Sequence[Estimate], count: int) -> None:
    """Add the mean guide of an outer step, and keep the last ``count``."""
    new = [estimate.guide for estimate in estimates if estimate.guide]
    if new:
        guides.append({name: torch.stack([guide[name] for guide in new]).mean(0) for name in new[0]})
        del guides[:-count]


def orthonormal(guides: Sequence[Weights], like: Weights) -> Tensor | None:
    """U, [n, k] in float64, with k at most the number of guides; ``None`` where they span nothing."""
    if not guides:
        return None
    columns = torch.stack([torch.cat([guide[name].reshape(-1) for name in like]).double() for guide in guides], 1)
    u, values, _ = torch.linalg.svd(columns, full_matrices=False)
    kept = values > 1e-6 * values.max().clamp(min=1e-30)
    return u[:, kept] if bool(kept.any()) else None


def free_dimensions(weights: Weights, config: MetaTrainConfig) -> int:
    """n: the dimensions in which perturbations lie, fewer than numbers where only parts of the head are learned."""
    size = sum(w.numel() for w in weights.values())
    if "head" in weights and config.head_directions:
        head = weights["head"]
        size -= (len(head) - len(config.head_directions)) * head.shape[1]
    return size


def unflattened(vector: Tensor, like: Weights) -> Weights:
    """[n] -> tensors named and shaped as those of ``like``."""
    pieces = vector.split([x.numel() for x in like.values()])
    return {name: piece.view(x.shape).to(x) for (name, x), piece in zip(like.items(), pieces, strict=True)}
