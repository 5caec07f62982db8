"""Which parameters a step updates, with gradient and state: everything that can be refused is refused here.

Nothing is changed before all parameters have been looked at. What has been looked at is kept as long as it is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from learned_optim.engine.device_scalars import contexts_on_gpu
from learned_optim.engine.hyperparameters import StepContext, of_groups, on_host
from learned_optim.engine.kinds import Part, TensorKind, kinds_of
from learned_optim.engine.offload import Host
from learned_optim.engine.param_state import (
    GUARDED_TENSOR_KEYS,
    SKIPPED,
    TENSOR_KEYS,
    ParamIndex,
    ParamState,
    arithmetic_dtype,
    uncount,
)
from learned_optim.engine.sharding import is_dtensor
from learned_optim.engine.state_checks import Named, StateMismatch, check_apart, check_fits, check_param, check_sparse
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.layouts import indices_by
from learned_optim.rule.types import Hyperparameters

_ONE = torch.tensor(1.0, device="cpu")  # a float would be made a tensor anew for each that it is added to

Groups = Sequence[Mapping[str, Any]]
State = dict[str, Tensor]


class StateKeys(NamedTuple):
    """What is kept for each parameter, and how."""

    coordinate: tuple[str, ...]  #: shaped like the parameter
    tensor: tuple[str, ...]  #: without dimensions; with one where the parameter holds several tensors
    state_dtype: torch.dtype | None  #: see :class:`learned_optim.LearnedOptimizer`
    counts_skipped: bool
    on_gpu: bool = False  #: step counts too: see ``capturable``
    host: Host | None = None  #: keeps state tensors: see ``offload``

    @classmethod
    def of(
        cls,
        config: PolicyConfig,
        state_dtype: torch.dtype | None,
        safeguard: bool,
        counts_skipped: bool,
        capturable: bool = False,
        host: Host | None = None,
    ) -> StateKeys:
        coordinate = ("exp_avg", "exp_avg_sq", *(f"hidden_{j}" for j in range(config.hidden_size)))
        tensor = GUARDED_TENSOR_KEYS if safeguard else TENSOR_KEYS
        return cls(coordinate, tensor, state_dtype, counts_skipped, capturable, host)

    def dtype_of(self, p: Tensor, key: str) -> torch.dtype:
        """Of a state tensor of a parameter."""
        real = arithmetic_dtype(p.dtype.to_real())
        if self.state_dtype is not None:
            # In two bytes the second moment's increments, 0.1% of its value, would be rounded away.
            real = torch.promote_types(self.state_dtype, torch.float32) if key == "exp_avg_sq" else self.state_dtype
        if p.is_complex():
            return torch.promote_types(real, torch.float32).to_complex()
        return real

    def is_offloaded(self, p: Tensor) -> bool:
        return self.host is not None and self.host.serves(p.device)

    def where_it_lies(self, p: Tensor, tensor: Tensor) -> Tensor:
        """A state tensor of a parameter, moved to the host where it is kept there."""
        if self.host is None or not self.host.serves(p.device) or is_dtensor(p):
            return tensor
        return self.host.keep(tensor)

    def device_of_step(self, p: Tensor) -> torch.device:
        return p.device if self.on_gpu else torch.device("cpu")

    def missing(self, p: Tensor, state: Mapping[str, Tensor], numbers: Sequence[int] = ()) -> State:
        """Of a parameter without state all of it; else what state that was saved with other options does not have.

        Args:
            p: the parameter.
            state: what there is.
            numbers: shape of the per-tensor state.
        """
        new: State = {}
        if not state:
            new["step"] = torch.zeros(numbers, dtype=torch.float32, device=self.device_of_step(p))
            for key in self.coordinate:
                new[key] = self.where_it_lies(p, torch.zeros_like(p, dtype=self.dtype_of(p, key)))
        for key in self.tensor if not state else {"trust"}.intersection(self.tensor).difference(state):
            new[key] = torch.zeros(numbers, dtype=arithmetic_dtype(p.dtype.to_real()), device=p.device)
        if self.counts_skipped and SKIPPED not in state:
            new[SKIPPED] = torch.zeros(numbers, dtype=torch.float32, device=p.device)
        return new


#: Group and position in it, of a parameter.
_Place = tuple[int, int]


class _Known(NamedTuple):
    """A parameter as the tensors that it holds."""

    kind: TensorKind  #: that its group had
    tensors: list[ParamState]  #: one or more

    def is_of(self, kind: TensorKind, p: Tensor, state: State, grad: Tensor) -> bool:
        return (kind is self.kind or kind == self.kind) and self.tensors[0].is_of(p, state, grad)


class _New(NamedTuple):
    """A parameter that is not as it was in the last step."""

    place: _Place
    p: Tensor
    kind: TensorKind
    known: list[_Known]  #: to be put in there ...
    position: int  #: ... here


class Collector:
    """Parameters with a gradient as a step sees them, kept from step to step.

    Args:
        keys: of their state.
        orthogonal: whether matrices are orthogonalised.
    """

    def __init__(self, keys: StateKeys, orthogonal: bool) -> None:
        self.keys, self.orthogonal = keys, orthogonal
        self.names: Mapping[ParamIndex, str] = {}  #: of what was updated so far; replaced, never changed
        self._kept: dict[_Place, _Known] = {}

    def collect(self, groups: Groups, states: MutableMapping[Tensor, State]) -> list[ParamState]:
        """All tensors that have a gradient, with gradient and step, which has been counted.

        Args:
            groups: the optimizer's.
            states: of all parameters; what is missing is added.

        Raises:
            RuntimeError: a sparse gradient; state or gradient that does not fit; two parameters that share memory or
                state. Nothing has been changed then.
            TypeError, ValueError: a hyperparameter that is no number, or out of range; nothing has been changed.
        """
        hypers, kinds = of_groups(groups, read=not self.keys.on_gpu), kinds_of(groups)
        if len(self._kept) > sum(len(group["params"]) for group in groups):
            self._kept.clear()  # of parameters that are no longer here, among them
        with_grads: list[tuple[list[_Known], list[Tensor]]] = []  # in each group, and their gradients
        new: list[_New] = []
        kept = self._kept
        for g, (group, kind) in enumerate(zip(groups, kinds, strict=True)):
            params: list[_Known] = []
            grads: list[Tensor] = []
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                place = (g, i)
                if grad.layout is not torch.strided:
                    check_sparse(name_of(groups, place), p, grad, kind.is_packed)
                state, known = states.get(p), kept.get(place)
                if known is None or state is None or not known.is_of(kind, p, state, grad):
                    check_param(name_of(groups, place), p, grad)
                    new.append(_New(place, p, kind, params, len(params)))
                params.append(known)  # pyright: ignore[reportArgumentType] -- a new one is put in its place
                grads.append(grad)
            with_grads.append((params, grads))
        if new:
            self._look_at(new, groups, states)
        by_group: list[list[ParamState]] = []
        for group, (params, grads) in zip(groups, with_grads, strict=True):
            maximize, of_group = group["maximize"], []
            for (_, tensors), grad in zip(params, grads, strict=True):
                if grad.layout is not torch.strided:
                    of_group.append(tensors[0].of_rows(grad, maximize))
                    continue
                own = tensors[0].own_grad(grad, maximize)
                for tensor in tensors:
                    tensor.set_grad(own)
                of_group += tensors
            by_group.append(of_group)
        self._count(by_group, hypers)
        return list(itertools.chain.from_iterable(by_group))

    def _count(self, by_group: Sequence[Sequence[ParamState]], hypers: Sequence[Hyperparameters]) -> None:
        """Count the step of each parameter, and tell it its context."""
        counts = [p.count for params in by_group for p in params]
        if self.keys.on_gpu:
            for p in itertools.chain.from_iterable(by_group):
                if (counted := on_host(p.count)) is not None:
                    self._check_counted(p, counted)
                p.is_second = counted == 1.0
            for hyper, params in zip(hypers, by_group, strict=True):
                for indices in indices_by(p.count.device for p in params).values():
                    alike = [params[i] for i in indices]
                    of_group = [p.count for p in alike]
                    torch._foreach_add_(of_group, 1.0)  # pyright: ignore[reportPrivateImportUsage]
                    for p, context in zip(alike, contexts_on_gpu(of_group, hyper), strict=True):
                        p.context = context
            return
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
                    self._check_counted(p, step - 1.0)
                    context = by_step[step] = StepContext(step, hyper)
                p.context, p.is_second = context, step == 2.0

    def _check_counted(self, param: ParamState, steps: float) -> None:
        if not steps >= 0.0:
            raise StateMismatch(
                f"the state of parameter {self.names[param.param_index]!r} has counted {steps} steps, expected 0 or "
                "more. Nothing was changed"
            )

    def _look_at(self, new: Sequence[_New], groups: Groups, states: MutableMapping[Tensor, State]) -> None:
        """Check parameters that are not as they were in the last step, complete their state and keep them."""
        complete: dict[Tensor, State] = {}
        made: dict[_Place, list[Named]] = {}
        for place, p, kind, _, _ in new:
            name, parts = name_of(groups, place), parts_of(groups, place, kind, p)
            numbers = kind.numbers(p)
            offloaded = self.keys.is_offloaded(p)
            if offloaded and is_dtensor(p):
                raise RuntimeError(
                    f"parameter {name!r} is a DTensor, whose state offload=True cannot keep on the host. Nothing was "
                    "changed. FSDP2 keeps parameters and state there with CPUOffloadPolicy; or leave offload=True out"
                )
            if p not in complete:  # one that is given twice
                state = states.get(p) or {}
                complete[p] = {**state, **self.keys.missing(p, state, numbers)}
            if states.get(p):
                check_fits(name, p, complete[p], self.keys.coordinate, self.keys.tensor, numbers, offloaded)
            made[place] = [
                Named(
                    f"{name}[{k}]" if kind.is_packed else name,
                    ParamState(p, complete[p], self.keys.coordinate, self.keys.tensor, (*place, k), part),
                )
                for k, part in enumerate(parts)
            ]
            if self.orthogonal and any(one.param.is_cut_late for one in made[place]):
                raise RuntimeError(
                    f"parameter {name!r} of shape {tuple(p.shape)} was cut along a later dimension than 0 and 1"
                )
        check_apart([*(one for tensors in made.values() for one in tensors), *self._others(made, groups, states)])
        for p, state in complete.items():
            states.setdefault(p, {}).update(state)
        for place, _, kind, group, position in new:
            group[position] = self._kept[place] = _Known(kind, [one.param for one in made[place]])
        names = {one.param.param_index: one.name for tensors in made.values() for one in tensors}
        self.names = {**self.names, **names}

    def _others(
        self, made: Mapping[_Place, list[Named]], groups: Groups, states: Mapping[Tensor, State]
    ) -> Iterator[Named]:
        """What was kept besides, of parameters that are still where they were, as they were."""
        for place, known in self._kept.items():
            group, position = place
            if place in made or group >= len(groups) or position >= len(groups[group]["params"]):
                continue
            p = groups[group]["params"][position]
            if known.tensors[0].is_of(p, states.get(p, {}), p):
                yield Named(name_of(groups, place), known.tensors[0])


def name_of(groups: Groups, place: tuple[int, int]) -> str:
    """The parameter's own name where it was given with one, else group and position in it."""
    group, position = place
    names = groups[group].get("param_names") or ()
    return names[position] if position < len(names) else f"{group}.{position}"


def parts_of(groups: Groups, place: tuple[int, int], kind: TensorKind, p: Tensor) -> tuple[Part, ...]:
    """The tensors that a parameter holds.

    Raises:
        ValueError: its shape does not allow for what its group says; nothing was changed.
    """
    try:
        return kind.parts(p)
    except ValueError as error:
        raise ValueError(f"{error} (parameter {name_of(groups, place)!r}; nothing was changed)") from error


def check_added(groups: list[dict[str, Any]]) -> None:
    """Take the last group out again if its tensors cannot be what it says; those without a shape say it in a step.

    Raises:
        TypeError, ValueError: those of :class:`TensorKind`.
    """
    group = groups.pop()
    kind = TensorKind.of(group)
    for i, p in enumerate(group["params"]):
        if not is_lazy(p):
            parts_of([*groups, group], (len(groups), i), kind, p)
    groups.append(group)
