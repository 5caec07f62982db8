"""Which parameters a step updates, with gradient and state: everything that can be refused is refused here.

Nothing is changed before all parameters have been looked at. What has been looked at is kept as long as it is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.engine.hyperparameters import StepContext, of_groups
from learned_optim.engine.param_state import (
    GUARDED_TENSOR_KEYS,
    SKIPPED,
    TENSOR_KEYS,
    ParamIndex,
    ParamState,
    arithmetic_dtype,
    uncount,
)
from learned_optim.engine.sharding import origin
from learned_optim.engine.state_checks import Named, StateMismatch, check_apart, check_fits, check_param
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.types import Hyperparameters

_ONE = torch.tensor(1.0, device="cpu")  # a float would be made a tensor anew for each that it is added to

Groups = Sequence[Mapping[str, Any]]
State = dict[str, Tensor]


class StateKeys(NamedTuple):
    """What is kept for each parameter, and how."""

    coordinate: tuple[str, ...]  #: shaped like the parameter
    tensor: tuple[str, ...]  #: without dimensions
    state_dtype: torch.dtype | None  #: see :class:`learned_optim.LearnedOptimizer`
    counts_skipped: bool

    @classmethod
    def of(
        cls, config: PolicyConfig, state_dtype: torch.dtype | None, safeguard: bool, counts_skipped: bool
    ) -> StateKeys:
        coordinate = ("exp_avg", "exp_avg_sq", *(f"hidden_{j}" for j in range(config.hidden_size)))
        return cls(coordinate, GUARDED_TENSOR_KEYS if safeguard else TENSOR_KEYS, state_dtype, counts_skipped)

    def dtype_of(self, p: Tensor, key: str) -> torch.dtype:
        """Of a state tensor of a parameter."""
        real = arithmetic_dtype(p.dtype.to_real())
        if self.state_dtype is not None:
            # In two bytes the second moment's increments, 0.1% of its value, would be rounded away.
            real = torch.promote_types(self.state_dtype, torch.float32) if key == "exp_avg_sq" else self.state_dtype
        if p.is_complex():
            return torch.promote_types(real, torch.float32).to_complex()
        return real

    def missing(self, p: Tensor, state: Mapping[str, Tensor]) -> State:
        """Of a parameter without state all of it; else what state that was saved with other options does not have."""
        new: State = {}
        if not state:
            new["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            for key in self.coordinate:
                new[key] = torch.zeros_like(p, dtype=self.dtype_of(p, key))
        for key in self.tensor if not state else {"trust"}.intersection(self.tensor).difference(state):
            new[key] = torch.zeros((), dtype=arithmetic_dtype(p.dtype.to_real()), device=p.device)
        if self.counts_skipped and SKIPPED not in state:
            new[SKIPPED] = torch.zeros((), dtype=torch.float32, device=p.device)
        return new


class _New(NamedTuple):
    """A parameter that is not as it was in the last step."""

    index: ParamIndex
    p: Tensor
    params: list[ParamState]  #: to be put in there ...
    position: int  #: ... here


class Collector:
    """Parameters with a gradient as a step sees them, kept from step to step.

    Args:
        keys: of their state.
        with_origin: whether it matters where a shard begins.
    """

    def __init__(self, keys: StateKeys, with_origin: bool) -> None:
        self.keys, self.with_origin = keys, with_origin
        self.names: Mapping[ParamIndex, str] = {}  #: of what was updated so far; replaced, never changed
        self._kept: dict[ParamIndex, ParamState] = {}

    def collect(self, groups: Groups, states: MutableMapping[Tensor, State]) -> list[ParamState]:
        """All parameters that have a gradient, with gradient and step, which has been counted.

        Args:
            groups: the optimizer's.
            states: of all parameters; what is missing is added.

        Raises:
            RuntimeError: a sparse gradient; state or gradient that does not fit; two parameters that share memory or
                state. Nothing has been changed then.
            TypeError, ValueError: a hyperparameter that is no number, or out of range; nothing has been changed.
        """
        hypers = of_groups(groups)
        if len(self._kept) > sum(len(group["params"]) for group in groups):
            self._kept.clear()  # of parameters that are no longer here, among them
        with_grads: list[tuple[list[ParamState], list[Tensor]]] = []  # in each group, and their gradients
        new: list[_New] = []
        kept = self._kept
        for g, group in enumerate(groups):
            params: list[ParamState] = []
            grads: list[Tensor] = []
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"LearnedOptimizer does not support sparse gradients (parameter of shape {tuple(p.shape)}, "
                        f"gradient layout {grad.layout}); use sparse=False in the embedding"
                    )
                index = (g, i)
                state, known = states.get(p), kept.get(index)
                if known is None or state is None or not known.is_of(p, state, grad):
                    check_param(name_of(groups, index), p, grad)
                    new.append(_New(index, p, params, len(params)))
                params.append(known)  # pyright: ignore[reportArgumentType] -- a new one is put in its place
                grads.append(grad)
            with_grads.append((params, grads))
        if new:
            self._look_at(new, groups, states)
        for group, (params, grads) in zip(groups, with_grads, strict=True):
            maximize = group["maximize"]
            for param, grad in zip(params, grads, strict=True):
                param.set_grad(grad, maximize)
        by_group = [params for params, _ in with_grads]
        self._count(by_group, hypers)
        return list(itertools.chain.from_iterable(by_group))

    def _count(self, by_group: Sequence[Sequence[ParamState]], hypers: Sequence[Hyperparameters]) -> None:
        """Count the step of each parameter, and tell it its context."""
        counts = [p.count for params in by_group for p in params]
        if counts:
            torch._foreach_add_(counts, _ONE, alpha=1.0)  # pyright: ignore[reportPrivateImportUsage]
        contexts: dict[Hyperparameters, dict[float, StepContext]] = {}
        for hyper, params in zip(hypers, by_group, strict=True):
            by_step = contexts.setdefault(hyper, {})
            for p in params:
                step = float(p.count)
                context = by_step.get(step)
                if context is None:
                    if not step >= 1.0:
                        uncount(counts)
                        raise StateMismatch(
                            f"the state of parameter {self.names[p.param_index]!r} has counted {step - 1.0} steps, "
                            "expected 0 or more. Nothing was changed"
                        )
                    context = by_step[step] = StepContext(step, hyper)
                p.context = context

    def _look_at(self, new: Sequence[_New], groups: Groups, states: MutableMapping[Tensor, State]) -> None:
        """Check parameters that are not as they were in the last step, complete their state and keep them."""
        complete: dict[Tensor, State] = {}
        made: dict[ParamIndex, Named] = {}
        for index, p, _, _ in new:
            if p not in complete:  # one that is given twice
                state = states.get(p) or {}
                complete[p] = {**state, **self.keys.missing(p, state)}
            name = name_of(groups, index)
            if states.get(p):
                check_fits(name, p, complete[p], self.keys.coordinate, self.keys.tensor)
            begins = origin(p) if self.with_origin else (0, 0)
            made[index] = Named(name, ParamState(p, complete[p], self.keys.coordinate, self.keys.tensor, index, begins))
        check_apart([*made.values(), *self._others(made, groups, states)])
        for p, state in complete.items():
            states.setdefault(p, {}).update(state)
        self._kept.update((index, one.param) for index, one in made.items())
        for index, _, group, position in new:
            group[position] = made[index].param
        self.names = {**self.names, **{index: one.name for index, one in made.items()}}

    def _others(
        self, made: Mapping[ParamIndex, Named], groups: Groups, states: Mapping[Tensor, State]
    ) -> Iterator[Named]:
        """What was kept besides, of parameters that are still where they were, as they were."""
        for index, param in self._kept.items():
            group, position = index
            if index in made or group >= len(groups) or position >= len(groups[group]["params"]):
                continue
            p = groups[group]["params"][position]
            if param.is_of(p, states.get(p, {}), p):
                yield Named(self.names[index], param)


def name_of(groups: Groups, index: ParamIndex) -> str:
    """The parameter's own name where it was given with one, else group and position in it."""
    group, position = index
    names = groups[group].get("param_names") or ()
    return names[position] if position < len(names) else f"{group}.{position}"
