"""The update rule compiled for the unroll: its forward and its backward pass are a few loops over memory.

What is compiled is :func:`learned_optim.update_rule.update` itself, over rows of ``ROW`` coordinates each of which
belongs to one tensor. One compilation serves tasks of every shape; inductor keeps it on disk for later processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.cells import CoordinateState, Hyperparameters
from learned_optim.coordinates import Segments, Spread
from learned_optim.meta_train.problem import ROW
from learned_optim.policy import PolicyConfig
from learned_optim.update_rule import finish, update

#: See :class:`PaddedRows`.
TENSORS = 64


class _RowSegments:
    """A layout (see :mod:`learned_optim.coordinates`) of K tensors over rows [R, ROW], each of one tensor.

    Args:
        owner: [R], the tensor that a row belongs to.
        numel: [K].
        shape_context: [4, K].
    """

    shapes: Sequence[Sequence[int]] = ()
    sizes: list[int] = []  # noqa: RUF012  (not of use here: what depends on them is done outside)

    def __init__(self, owner: Tensor, numel: Tensor, shape_context: Tensor) -> None:
        self.owner, self.numel, self.shape_context = owner, numel, shape_context

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self.total(x * y)

    def total(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.numel.shape[0]).index_add(0, self.owner, x.sum(1))

    def spread(self, values: Tensor) -> Sequence[Spread]:
        return values.index_select(1, self.owner).unsqueeze(2).unbind()


def compiled_update(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    layout: Segments,
    param: Tensor,
    grad: Tensor,
    state: CoordinateState,
    memory: Tensor,
    step: Spread,
    hyper: Hyperparameters,
    *,
    fixed_scale: bool = False,
) -> tuple[Tensor, CoordinateState, Tensor]:
    """:func:`learned_optim.update_rule.update` with the same arguments and results, compiled.

    ``layout`` must pad its tensors to multiples of ``ROW``. The first call in a process compiles, for about a minute
    where inductor's cache knows nothing of it.
    """
    planes = [param, grad, state.exp_avg, state.exp_avg_sq, *state.hidden]
    if torch.is_grad_enabled():
        # Always the same ones require gradients, also in a trajectory's first step: every other set of them would be
        # compiled again.
        constants = () if grad.requires_grad else (1, 2, 3)
        planes = [t if i in constants else _tracked(t) for i, t in enumerate(planes)]
        memory = _tracked(memory)
    owner = layout.owner[::ROW].contiguous()
    for t in (*planes, owner, layout.numel):
        torch._dynamo.maybe_mark_dynamic(t, 0)
    for t in (memory, layout.shape_context):
        torch._dynamo.maybe_mark_dynamic(t, 1)
    # Numbers would be compiled in.
    numbers = [torch.tensor(float(x), dtype=torch.float64) for x in (step, *hyper)]
    run = _compiled(config, fixed_scale)
    names, values = tuple(weights), tuple(weights.values())
    shapes = layout.numel, layout.shape_context
    with warnings.catch_warnings():
        # Torch looks at the .grad of what it compiles for, and warns itself that this is no leaf.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        (found, m, v, *hidden), memory = run(names, values, planes, memory, owner, *shapes, numbers)
    return finish(config, layout, param, found, step, hyper), CoordinateState(m, v, tuple(hidden)), memory


class PaddedRows(NamedTuple):
    """A layout for :func:`compiled_side_by_side`: tensors without coordinates fill K up to a multiple of ``TENSORS``.

    Compiled code under ``vmap`` is made anew for every K.
    """

    segments: Segments
    owner: Tensor  #: [n / ROW], the tensor that a row belongs to
    numel: Tensor  #: [K]
    shape_context: Tensor  #: [4, K]

    @classmethod
    def of(cls, layout: Segments) -> PaddedRows:
        more = -len(layout.numel) % TENSORS
        numel = torch.nn.functional.pad(layout.numel, (0, more), value=1.0)
        context = torch.nn.functional.pad(layout.shape_context, (0, more))
        return cls(layout, layout.owner[::ROW].contiguous(), numel, context)


def compiled_side_by_side(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    layout: PaddedRows,
    param: Tensor,
    grad: Tensor,
    state: CoordinateState,
    memory: Tensor,
    step: Spread,
    hyper: Hyperparameters,
) -> tuple[Tensor, CoordinateState, Tensor]:
    """:func:`compiled_update` of R runs at once, without gradients, on any device.

    ``weights``, ``param``, ``grad``, ``state`` and ``memory`` have a leading dimension of R, the last one the layout's
    K; layout, step and hyperparameters are those of all runs.
    """
    planes = [param, grad, state.exp_avg, state.exp_avg_sq, *state.hidden]
    for t in planes:
        torch._dynamo.maybe_mark_dynamic(t, 1)
    torch._dynamo.maybe_mark_dynamic(layout.owner, 0)
    numbers = [x if isinstance(x, Tensor) else _number(float(x), param.device) for x in (step, *hyper)]
    run = _compiled_side_by_side(config)
    (found, m, v, *hidden), memory = run(dict(weights), planes, memory, *layout[1:], numbers)

    def finished(param: Tensor, found: Tensor) -> Tensor:
        return finish(config, layout.segments, param, found, step, hyper)

    found = torch.vmap(finished)(param, found)
    return found, CoordinateState(m, v, tuple(hidden)), memory


@lru_cache(maxsize=256)
def _number(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


@cache
def _compiled_side_by_side(config: PolicyConfig) -> Callable[..., Any]:
    def run(weights: dict, planes: list, memory: Tensor, owner: Tensor, numel: Tensor, context: Tensor,
            numbers: list) -> Any:  # fmt: skip
        def one(weights: dict, planes: list, memory: Tensor) -> Any:
            named = tuple(weights), tuple(weights.values())
            return _on_rows(config, False, *named, planes, memory, owner, numel, context, numbers)

        return torch.vmap(one)(weights, planes, memory)

    return torch.compile(run, fullgraph=True)


def _tracked(t: Tensor) -> Tensor:
    return t if t.requires_grad else t.detach().requires_grad_()


@cache
def _compiled(config: PolicyConfig, fixed_scale: bool) -> Callable[..., Any]:
    return torch.compile(partial(_on_rows, config, fixed_scale), fullgraph=True)


def _on_rows(
    config: PolicyConfig,
    fixed_scale: bool,
    names: tuple[str, ...],
    values: tuple[Tensor, ...],
    planes: list[Tensor],
    memory: Tensor,
    owner: Tensor,
    numel: Tensor,
    shape_context: Tensor,
    numbers: list[Tensor],
) -> tuple[list[Tensor], Tensor]:
    param, grad, m, v, *hidden = (t.view(-1, ROW) for t in planes)
    step, *hyper = numbers
    layout: Any = _RowSegments(owner, numel, shape_context)
    param, state, memory = update(
        dict(zip(names, values, strict=True)), config, layout, param, grad, CoordinateState(m, v, tuple(hidden)),
        memory, step, Hyperparameters(*hyper), fixed_scale=fixed_scale, unfinished=True,
    )  # fmt: skip
    # Views of what was made here would be compiled apart from tensors of their own; a loop writes the copy at once.
    return [t.view(-1).clone() for t in (param, state.exp_avg, state.exp_avg_sq, *state.hidden)], memory
