"""The update rule compiled for the unroll: its forward and its backward pass are a few loops over memory.

What is compiled is :func:`learned_optim.rule.update.direction` (and :func:`~learned_optim.rule.update.move`, unless
whole matrices are orthogonalised in between), over rows of ``ROW`` coordinates each of which belongs to one tensor. One
compilation serves tasks of every shape; inductor keeps it on disk for later processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.problem import ROW
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.layouts import Segments, TensorShapes
from learned_optim.rule.types import CoordinateState, Hyperparameters, Spread, StepScalars, TensorState
from learned_optim.rule.update import direction, move, orthogonalize_and_move

#: See :class:`PaddedRows`.
TENSORS = 64


class _Rows(NamedTuple):
    """A layout (see :mod:`learned_optim.rule.layouts`) of K tensors over rows [R, ROW], each of one tensor."""

    owner: Tensor  #: [R], the tensor that a row belongs to
    tensor_shapes: TensorShapes

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self.total(x * y)

    def total(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.tensor_shapes.numel.shape[0]).index_add(0, self.owner, x.sum(1))

    def spread(self, values: Tensor) -> Sequence[Spread]:
        return values.index_select(1, self.owner).unsqueeze(2).unbind()


def compiled_update(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    layout: Segments,
    param: Tensor,
    grad: Tensor,
    state: CoordinateState,
    tensor_state: TensorState,
    step: Spread,
    hyper: Hyperparameters,
    *,
    fixed_scale: bool = False,
) -> tuple[Tensor, CoordinateState, TensorState]:
    """:func:`learned_optim.rule.update.update` with the same arguments and results, compiled.

    ``layout`` must pad its tensors to multiples of ``ROW``. The first call in a process compiles, for about a minute
    where inductor's cache knows nothing of it.
    """
    if torch.is_grad_enabled():
        # Always the same ones require gradients, also in a trajectory's first step: every other set of them would be
        # compiled again.
        param, tensor_state = _tracked(param), TensorState(*map(_tracked, tensor_state.tensors))
        state = state._replace(hidden=tuple(map(_tracked, state.hidden)))
        if grad.requires_grad:
            state = CoordinateState.of([_tracked(t) for t in state.tensors])
    vectors, of_tensors = [param, grad, *state.tensors], list(tensor_state.tensors)
    rows = _Rows(layout.owner[::ROW].contiguous(), layout.tensor_shapes)
    for t in (*vectors, *of_tensors, rows.owner, layout.tensor_shapes.numel):
        torch._dynamo.maybe_mark_dynamic(t, 0)
    torch._dynamo.maybe_mark_dynamic(layout.tensor_shapes.context, 1)
    # Numbers would be compiled in.
    scalars = [torch.tensor(float(x), dtype=torch.float64) for x in (step, *hyper)]
    run = _compiled(config, fixed_scale)
    with warnings.catch_warnings():
        # Torch looks at the .grad of what it compiles for, and warns itself that this is no leaf.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        result = run(tuple(weights), tuple(weights.values()), vectors, of_tensors, rows, scalars)
    (moved, *vectors), of_tensors, decay = result
    if config.orthogonal:
        moved = orthogonalize_and_move(config, layout, param, moved, step, hyper, config.orthogonal, decay)
    return moved, CoordinateState.of(vectors), TensorState(*of_tensors)


class PaddedRows(NamedTuple):
    """A layout for :func:`compiled_vectorized`: tensors without coordinates fill K up to a multiple of ``TENSORS``.

    Compiled code under ``vmap`` is made anew for every K.
    """

    segments: Segments
    rows: _Rows

    @classmethod
    def of(cls, layout: Segments) -> PaddedRows:
        numel, context = layout.tensor_shapes
        more = -len(numel) % TENSORS
        numel = torch.nn.functional.pad(numel, (0, more), value=1.0)
        context = torch.nn.functional.pad(context, (0, more))
        return cls(layout, _Rows(layout.owner[::ROW].contiguous(), TensorShapes(numel, context)))

    @property
    def tensor_shapes(self) -> TensorShapes:
        return self.rows.tensor_shapes


def compiled_vectorized(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    layout: PaddedRows,
    param: Tensor,
    grad: Tensor,
    state: CoordinateState,
    tensor_state: TensorState,
    step: Spread,
    hyper: Hyperparameters,
) -> tuple[Tensor, CoordinateState, TensorState]:
    """:func:`compiled_update` of R runs at once, without gradients, on any device.

    ``weights``, ``param``, ``grad``, ``state`` and ``tensor_state`` have a leading dimension of R, the last one the
    layout's K; layout, step and hyperparameters are those of all runs.
    """
    vectors = [param, grad, *state.tensors]
    for t in vectors:
        torch._dynamo.maybe_mark_dynamic(t, 1)
    torch._dynamo.maybe_mark_dynamic(layout.rows.owner, 0)
    scalars = [x if isinstance(x, Tensor) else _scalar(float(x), param.device) for x in (step, *hyper)]
    run = _compiled_vectorized(config)
    result = run(dict(weights), vectors, list(tensor_state.tensors), layout.rows, scalars)
    (moved, *vectors), of_tensors, decay = result
    if config.orthogonal:
        rest = partial(orthogonalize_and_move, config, layout.segments, step=step, hyper=hyper, share=config.orthogonal)
        decay = decay[:, : len(layout.segments.sizes)]  # without the tensors that fill K up
        moved = torch.vmap(lambda param, d, decay: rest(param, d, decay=decay))(param, moved, decay)
    return moved, CoordinateState.of(vectors), TensorState(*of_tensors)


@lru_cache(maxsize=256)
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


@cache
def _compiled_vectorized(config: PolicyConfig) -> Callable[..., Any]:
    def run(weights: dict, vectors: list, of_tensors: list, rows: _Rows, scalars: list) -> Any:
        def one(weights: dict, vectors: list, of_tensors: list) -> Any:
            return _on_rows(config, False, tuple(weights), tuple(weights.values()), vectors, of_tensors, rows, scalars)

        return torch.vmap(one)(weights, vectors, of_tensors)

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
    vectors: list[Tensor],
    of_tensors: list[Tensor],
    rows: _Rows,
    scalars: list[Tensor],
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """New parameters, or directions where whole matrices are still to be orthogonalised, new state, and decays."""
    param, grad, *state = (t.view(-1, ROW) for t in vectors)
    step, *hyper = scalars
    hyper = Hyperparameters(*hyper)
    d, coeff, state, tensor_state = direction(
        dict(zip(names, values, strict=True)), config, rows, param, grad, CoordinateState.of(state),
        TensorState(*of_tensors), step, hyper, fixed_scale=fixed_scale,
    )  # fmt: skip
    decay = torch.as_tensor(coeff.decay)
    moved = d
    if not config.orthogonal:
        moved = move(param, d, StepScalars.at(step, hyper), *rows.spread(decay.to(param.dtype).unsqueeze(0)))
    # Views of what was made here would be compiled apart from tensors of their own; a loop writes the copy at once.
    return [t.view(-1).clone() for t in (moved, *state.tensors)], list(tensor_state.tensors), decay
