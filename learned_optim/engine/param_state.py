"""A tensor with its gradient and state as backends see them: real, of this process, kept from step to step.

It is a parameter, or one of several tensors that a parameter holds (:mod:`learned_optim.engine.kinds`).
Looking at every tensor anew in each step takes longer than the arithmetic of a small one. A :class:`ParamState` is
therefore kept as long as parameter and state are the same tensors at the same addresses; only gradient and step change.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import is_
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from learned_optim.engine.hyperparameters import StepContext
from learned_optim.engine.kinds import Part
from learned_optim.engine.sharding import gradient_as, is_dtensor, local, offset_of
from learned_optim.rule.layouts import Role
from learned_optim.rule.types import TensorState

#: Keys of the per-tensor state, with a safeguard and without.
GUARDED_TENSOR_KEYS = TensorState._fields
TENSOR_KEYS = tuple(key for key in GUARDED_TENSOR_KEYS if key != "trust")
#: Key of the count of steps that were left out because of a gradient that was not finite, where that is done.
SKIPPED = "skipped"
#: Group, position in it, and number of the tensor in the parameter: 0 where it is the parameter.
ParamIndex = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Format:
    """Device and dtypes of a parameter, its gradient and its state tensors; equal ones are the same object."""

    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    state: tuple[torch.dtype, ...]


format_of = cache(Format)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything of lower precision."""
    return torch.promote_types(dtype, torch.float32)


class CachedViews(Protocol):
    """Views of a parameter's tensors that a backend keeps from step to step."""

    def release_grad(self) -> None:
        """Drop the reference to the gradient."""
        ...


class ParamState:
    """One tensor of the rule with its state, real, with any strides; state tensors are shaped like the parameter.

    Args:
        of: the parameter, which may be complex or spread over processes.
        state: its state.
        keys: of the state tensors in it.
        tensor_keys: of the per-tensor state in it, in the order of :class:`TensorState`.
        param_index: of the tensor.
        part: which tensor of the parameter it is.
    """

    def __init__(
        self,
        of: Tensor,
        state: Mapping[str, Tensor],
        keys: Sequence[str],
        tensor_keys: Sequence[str],
        param_index: ParamIndex,
        part: Part,
    ) -> None:
        self.param_index, self.part, self.transposed = param_index, part, part.transposed
        self.role: Role | None = part.role
        self.shape = part.shape  #: of the whole tensor, of which a shard may be here; outputs first
        single = ("step", *tensor_keys, *([SKIPPED] if SKIPPED in state else []))
        self._single = [state[key] for key in single]
        numbers = self._single if part.row is None else [t[part.row] for t in self._single]
        self.count, *rest = numbers
        self.tensor_state = rest[: len(tensor_keys)]  #: 0-d each
        self.is_guarded = len(self.tensor_state) == len(GUARDED_TENSOR_KEYS)
        self.skipped = rest[-1] if len(rest) > len(tensor_keys) else None  #: 0-d
        self._state = tuple(state.values())
        self._names = ("param", *keys), single
        self._form = (of.dtype, of.shape, of.stride())
        self._of = (of, *(state[key] for key in keys))
        self._sharded = is_dtensor(of)
        self._here = [local(t) for t in self._of]
        self._addresses = [t.data_ptr() for t in self._here]
        self._of_numbers = [] if part.row is None else [t.data_ptr() for t in self._single]
        self.complex = of.is_complex()
        self._offset = offset_of(of)
        real = [_real(t) for t in self._here] if self.complex else self._here
        self.origin = part.of(real[0], self._offset)[1]  #: row and column, as it is stored, at which a shard begins
        self.param, *state_tensors = map(self._piece, real)
        self.state_tensors = tuple(state_tensors)  #: exp_avg, exp_avg_sq, hidden_0, ...
        self.numel = self.param.numel()
        self.arithmetic = arithmetic_dtype(self.param.dtype)
        self.grad = self.param  # until there is one
        self.context: StepContext
        self.is_second = False  #: whether this step is its second; steps that a GPU counts are not known here
        dtypes = tuple(t.dtype for t in state_tensors)
        self.format = format_of(self.param.device, self.param.dtype, self.param.dtype, dtypes)
        self.cached_views: CachedViews | None = None
        self.rows: tuple[ParamState, Tensor] | None = None  #: see :meth:`of_rows`

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Parameter, gradient and state tensors."""
        return (self.param, self.grad, *self.state_tensors)

    def is_of(self, of: Tensor, state: Mapping[str, Tensor], grad: Tensor) -> bool:
        """Whether it was made of these very tensors, they have not moved, and the gradient is of that shape."""
        if (
            grad.shape != self._form[1]
            or of is not self._of[0]
            or self.complex
            or (of.dtype, of.shape, of.stride()) != self._form
        ):
            return False
        if len(state) != len(self._state) or not all(map(is_, state.values(), self._state)):
            return False
        if self._sharded and not all(map(is_, map(local, self._of), self._here)):
            return False
        if self._of_numbers and [t.data_ptr() for t in self._single] != self._of_numbers:
            return False
        return [t.data_ptr() for t in self._here] == self._addresses

    def is_for(self, other: ParamState) -> bool:
        """Whether it is of the same parameter: one that is given twice is updated twice."""
        return self._of[0] is other._of[0]

    def identities(self) -> Iterator[tuple[tuple[bool, int], str]]:
        """What no other parameter may have, and its name: memory, by address, and state without dimensions, by id."""
        with_entries, single = self._names
        for name, address, tensor in zip(with_entries, self._addresses, self._here, strict=True):
            if address and tensor.numel():
                yield (True, address), name
        for name, tensor in zip(single, self._single, strict=True):
            yield (False, id(tensor)), name

    def own_grad(self, grad: Tensor, maximize: bool) -> Tensor:
        """A gradient of the parameter as :meth:`set_grad` takes it: real, what is here of it."""
        if self._sharded or self.complex or type(grad) is not Tensor:
            grad = local(gradient_as(self._of[0], grad))
            grad = _real(grad) if self.complex else grad
        return -grad if maximize else grad

    def set_grad(self, grad: Tensor) -> None:
        """The gradient of a step, of the parameter."""
        self.grad = grad = self._piece(grad)
        if grad.dtype is not self.format.grad:
            self.format = format_of(self.format.device, self.format.param, grad.dtype, self.format.state)

    def of_rows(self, grad: Tensor, maximize: bool) -> ParamState:
        """The rows that have a gradient, as a tensor for one step: copies, until :meth:`release_grad` writes them back.

        Sums and means are those of these rows. An embedding is what has sparse gradients: it is not orthogonalised.

        Args:
            grad: sparse, with one sparse dimension.
            maximize: ascend.
        """
        grad = grad.coalesce()
        index, values = grad.indices()[0], grad.values()
        some = copy.copy(self)
        some.role = "embedding"
        some.param = self.param.detach().index_select(0, index)
        # State may lie on the host.
        state = [t.index_select(0, index.to(t.device)).to(index.device) for t in self.state_tensors]
        some.state_tensors, some.numel, some.rows = tuple(state), some.param.numel(), (self, index)
        some.grad = -values if maximize else values
        some.format = format_of(self.format.device, self.format.param, values.dtype, self.format.state)
        some.cached_views = None
        return some

    @property
    def state_on_host(self) -> list[Tensor]:
        """The state tensors of the parameter that are here, where they lie between steps."""
        return self._here[1:]

    def with_state(self, tensors: Sequence[Tensor]) -> ParamState:
        """The same for the time of a step with its state elsewhere, in tensors like :attr:`state_on_host`."""
        some = copy.copy(self)
        some.state_tensors = tuple(self._piece(_real(t) if self.complex else t) for t in tensors)
        some.cached_views = None
        return some

    @property
    def counted(self) -> int:
        """Coordinates that its sums run over, in all processes together."""
        return math.prod(self.shape) if self.rows is None else self.numel

    @property
    def is_cut_late(self) -> bool:
        """Whether it is a shard that was cut along a later dimension than the first two."""
        return self.param.numel() > 0 and self.param.shape[2:] != self.part.lengths[self.part.stacked + 2 :]

    def _piece(self, tensor: Tensor) -> Tensor:
        """What it has of a tensor like the parameter."""
        return tensor if self.part.row is None else self.part.of(tensor, self._offset)[0]

    def stored(self, of_matrices: Tensor) -> Tensor:
        """[N, rows, columns] of tensors of this shape in the order in which they are stored, [N, ...]."""
        if not self.transposed:
            return of_matrices
        return of_matrices.reshape(len(of_matrices), *self.shape).transpose(1, 2)

    def matrices(self, stored: Tensor) -> Tensor:
        """The inverse of :meth:`stored`: a view where that is possible."""
        if self.transposed:
            stored = stored.view(len(stored), self.shape[1], self.shape[0], *self.shape[2:]).transpose(1, 2)
        return stored.reshape(len(stored), self.shape[0], -1)

    def release_grad(self) -> None:
        """Drop every reference to the gradient; rows are written back."""
        if self.rows is not None:
            whole, index = self.rows
            for target, rows in zip(
                (whole.param, *whole.state_tensors), (self.param, *self.state_tensors), strict=True
            ):
                target.detach().index_copy_(0, index.to(target.device), rows.to(target.device))
        self.grad = self.param
        if self.cached_views is not None:
            self.cached_views.release_grad()


def contexts_of(params: Sequence[ParamState]) -> tuple[list[StepContext], array]:
    """The different contexts of a step, and for each parameter which of them is its own."""
    contexts = list({id(p.context): p.context for p in params}.values())
    if len(contexts) == 1:
        return contexts, array("q", bytes(8 * len(params)))
    number = {id(context): i for i, context in enumerate(contexts)}
    return contexts, array("q", [number[id(p.context)] for p in params])


def have_changed(params: Sequence[ParamState]) -> None:
    """Tell autograd, which must not use what it has saved of them."""
    for p in params:
        if not p.param.is_inference():  # those have no version
            increment_version(p.param)


def uncount(counts: list[Tensor]) -> None:
    """Take back a step that was counted."""
    if counts:
        torch._foreach_sub_(counts, 1.0)  # pyright: ignore[reportPrivateImportUsage]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj())


class FlatViews:
    """A parameter's tensors as vectors, all in one order of coordinates.

    With ``in_order`` that is the order of their indices. Tensors that are contiguous, or else dense and of the same
    strides (channels_last, transposed), are seen through views of their memory. Others are copied, and
    :meth:`write_back` copies what has changed back.
    """

    def __init__(self, param: ParamState, in_order: bool = False) -> None:
        # Views of a leaf begin to require gradients once it has been changed.
        self.originals = originals = (param.param.detach(), param.grad, *param.state_tensors)
        contiguous = all(t.is_contiguous() for t in originals)
        in_place = contiguous or (not in_order and _share_order(originals))
        self.copied = not in_place or param.grad.is_neg()  # autograd's imaginary part of a conjugate
        self.tensors = tuple(t.resolve_neg().contiguous() for t in originals) if self.copied else originals

    @property
    def vectors(self) -> list[Tensor]:
        """[n] each."""
        return [t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in self.tensors]

    def write_back(self) -> None:
        """Must follow the last change of the vectors."""
        if self.copied:
            for i, (copy, original) in enumerate(zip(self.tensors, self.originals, strict=True)):
                if i != 1 and copy is not original:  # all but the gradient
                    original.copy_(copy)


def _share_order(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensors' memory holds the same coordinates in the same order, without gaps."""
    return _is_dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor covers its memory without gaps or overlaps, in some order of its dimensions."""
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1:
            if stride != size:
                return False
            size *= length
    return size == math.prod(tensor.shape)
