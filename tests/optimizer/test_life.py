"""The optimizer's life, at random: whatever is done to it, in whatever order, a few simple things hold.

The model to compare with is no optimizer: it knows which parameters have gradients, counts their steps, and knows
that a copy, however it was made, must go on as the original does.
"""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.optimizer_checks import through_a_file
from helpers.rule_checks import step_bound
from helpers.support import POLICIES, assert_same_bits, assert_same_state, bits
from learned_optim import LearnedOptimizer, Policy

ALL = {**POLICIES, "default": Policy.from_pretrained("default")}
SHAPES = ((), (3,), (2, 5), (0,), (2, 1, 3, 3))
RATES = (0.0, 1e-5, 1e-3, 0.1)
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
seeds = st.integers(0, 2**31)


def parameters(optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Life(RuleBasedStateMachine):
    """``self.optimizer``, and perhaps ``self.twin``: a copy of it that is treated in the same way ever since."""

    def __init__(self) -> None:
        super().__init__()
        self.twin: LearnedOptimizer | None = None
        self.counts: list[int] = []
        self.retyped = False

    @initialize(
        policy=st.sampled_from(sorted(ALL)),
        state_dtype=st.sampled_from([None, torch.bfloat16]),
        safeguard=st.booleans(),
        seed=seeds,
    )
    def construct(self, policy, state_dtype, safeguard, seed) -> None:
        self.policy, self.generator = ALL[policy], torch.Generator().manual_seed(seed)
        self.options: dict[str, Any] = {"policy": self.policy, "state_dtype": state_dtype, "backend": "eager"}
        self.options["safeguard"] = safeguard and self.policy.config.cell == "gated"
        self.optimizer = LearnedOptimizer([self.leaf((4,)), self.leaf((3, 2))], **self.options)
        self.counts = [0, 0]

    def leaf(self, shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).requires_grad_()

    @property
    def both(self) -> list[LearnedOptimizer]:
        return [self.optimizer] if self.twin is None else [self.optimizer, self.twin]

    # --- what a user does ---------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.optimizer.param_groups) < 4)
    @rule(shape=st.sampled_from(SHAPES), lr=st.sampled_from(RATES), weight_decay=st.sampled_from([0.0, 0.3]))
    def add_a_group(self, shape, lr, weight_decay) -> None:
        like = parameters(self.optimizer)[0].dtype
        values = self.leaf(shape).detach().to(like)
        for optimizer in self.both:
            p = values.clone().requires_grad_()
            optimizer.add_param_group({"params": [p], "lr": lr, "weight_decay": weight_decay})
        self.counts.append(0)

    @rule(index=st.integers(0, 7))
    def freeze_or_thaw(self, index) -> None:
        for optimizer in self.both:
            params = parameters(optimizer)
            p = params[index % len(params)]
            p.requires_grad_(not p.requires_grad)
            p.grad = None

    @rule(group=st.integers(0, 3), lr=st.sampled_from(RATES), as_tensor=st.booleans())
    def set_the_learning_rate(self, group, lr, as_tensor) -> None:
        for optimizer in self.both:
            groups = optimizer.param_groups
            groups[group % len(groups)]["lr"] = torch.tensor(lr) if as_tensor else lr

    @rule(group=st.integers(0, 3), maximize=st.booleans())
    def set_maximize(self, group, maximize) -> None:
        for optimizer in self.both:
            groups = optimizer.param_groups
            groups[group % len(groups)]["maximize"] = maximize

    @rule(dtype=st.sampled_from(sorted(ROUNDING, key=str)))
    def change_the_models_dtype(self, dtype) -> None:
        for optimizer in self.both:
            for p in parameters(optimizer):
                p.data, p.grad = p.data.to(dtype), None
        self.retyped = True  # existing state keeps its dtype until it is saved and loaded again

    @rule(kind=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, kind) -> None:
        self.twin = copy.deepcopy(self.optimizer) if kind == "deepcopy" else pickle.loads(pickle.dumps(self.optimizer))

    @rule(in_place=st.booleans())
    def save_and_load(self, in_place) -> None:
        saved = through_a_file(self.optimizer.state_dict())
        if in_place or self.retyped:
            self.optimizer.load_state_dict(saved)
            self.twin, self.retyped = None, False
            return
        groups = [{"params": [p.detach().clone().requires_grad_(p.requires_grad) for p in group["params"]]}
                  for group in self.optimizer.param_groups]  # fmt: skip
        self.twin = LearnedOptimizer(groups, **self.options)
        self.twin.load_state_dict(saved)

    @rule(exponent=st.integers(-25, 15), seed=seeds, left_out=st.sets(st.integers(0, 7), max_size=2))
    def step(self, exponent, seed, left_out) -> None:
        for optimizer in self.both:
            generator = torch.Generator().manual_seed(seed)
            for i, p in enumerate(parameters(optimizer)):
                gradient = torch.randn(p.shape, generator=generator) * 10.0**exponent
                p.grad = gradient.to(p.dtype) if p.requires_grad and i not in left_out else None
        before = [p.detach().clone() for p in parameters(self.optimizer)]
        state = [{k: v.clone() for k, v in self.optimizer.state.get(p, {}).items()} for p in parameters(self.optimizer)]
        for optimizer in self.both:
            optimizer.step()
        rates = [float(g["lr"]) for g in self.optimizer.param_groups for _ in g["params"]]
        decays = [g["weight_decay"] for g in self.optimizer.param_groups for _ in g["params"]]
        bound = step_bound(self.policy)
        for i, (p, old) in enumerate(zip(parameters(self.optimizer), before, strict=True)):
            if p.grad is None or rates[i] == 0.0:
                assert torch.equal(bits(p), bits(old))
            if p.grad is None:
                now = self.optimizer.state.get(p, {})
                assert_same_bits([now[k] for k in state[i]], list(state[i].values()))
                continue
            self.counts[i] += 1
            if old.numel():
                size = float(old.double().abs().max())
                moved = float((p.detach().double() - old.double()).abs().max())
                reach = rates[i] * (bound + decays[i] * size)
                assert moved <= reach + ROUNDING[p.dtype] * (size + reach)
        if self.optimizer.param_groups:
            updated = sum(p.grad is not None for p in parameters(self.optimizer))
            assert len(self.optimizer.diagnostics()) <= updated

    # --- what holds ---------------------------------------------------------------------------------------------

    @invariant()
    def everything_is_finite(self) -> None:
        for p in parameters(self.optimizer):
            assert bool(p.isfinite().all())
            for key, value in self.optimizer.state.get(p, {}).items():
                assert bool(value.isfinite().all()), key

    @invariant()
    def steps_are_counted(self) -> None:
        for p, count in zip(parameters(self.optimizer), self.counts, strict=True):
            assert float(self.optimizer.state.get(p, {}).get("step", 0.0)) == count

    @invariant()
    def state_has_the_shape_of_its_parameter(self) -> None:
        for p in parameters(self.optimizer):
            for value in self.optimizer.state.get(p, {}).values():
                assert value.shape in (p.shape, torch.Size())

    @invariant()
    def a_copy_goes_on_as_the_original_does(self) -> None:
        if self.twin is not None:
            assert_same_bits(parameters(self.twin), parameters(self.optimizer))
            assert_same_state(self.twin, self.optimizer)


def live(examples: int, steps: int) -> None:
    hypothesis.stateful.run_state_machine_as_test(
        Life, settings=hypothesis.settings(max_examples=examples, stateful_step_count=steps, derandomize=examples < 100)
    )


def test_whatever_happens_to_an_optimizer_what_must_hold_holds():
    live(examples=25, steps=25)


@pytest.mark.slow
def test_whatever_happens_to_an_optimizer_for_long_what_must_hold_holds():
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    live(examples=max(100, int(50 * minutes)), steps=60)
