"""A parameter's tensors as the backends see them: real, of this process, and the same object from step to step.

Looking at every tensor anew in each step takes longer than the arithmetic of a small one. A job is therefore kept as
long as parameter and state are the same tensors in the same place; only gradient and step are renewed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor

from learned_optim import update_rule
from learned_optim.arguments import number
from learned_optim.cells import Hyperparameters
from learned_optim.sharding import gradient_as, is_dtensor, local, real_shape

#: What is kept per tensor, in the state's names and the memory's order (see ``update_rule.coefficients``).
MEMORY = ("cosine_fast", "cosine_slow", "log_pace")


@dataclass(frozen=True, eq=False)
class Format:
    """Device and dtypes of a job's tensors; equal ones are the same object."""

    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    planes: tuple[torch.dtype, ...]


format_of = cache(Format)


def hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    """Those of a parameter group, as numbers."""
    beta1, beta2 = group["betas"]
    return Hyperparameters(*map(number, (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])))


class Moment:
    """A step t >= 1 under some hyperparameters; equal ones are the same object within a step."""

    def __init__(self, step: float, hyper: Hyperparameters) -> None:
        self.step, self.hyper, self.numbers = step, hyper, update_rule.step_numbers(step, hyper)
        self.for_directions = self.numbers.for_directions()


class Kept(Protocol):
    """What a backend keeps with a job."""

    def let_go(self) -> None:
        """Forget the gradient."""
        ...


class Job:
    """One parameter's tensors, real, with any strides; state planes are shaped like the parameter.

    Args:
        of: the parameter, which may be complex or spread over processes.
        state: its state.
        plane_keys: of the planes in it.
        place: number of the parameter's group, and of the parameter in it.
        guarded: whether there is a safeguard.
        origin: row and column of the whole parameter at which a shard begins.
    """

    def __init__(
        self,
        of: Tensor,
        state: Mapping[str, Tensor],
        plane_keys: Sequence[str],
        place: tuple[int, int],
        guarded: bool,
        origin: tuple[int, int],
    ) -> None:
        self.place, self.origin = place, origin
        self.shape = real_shape(of)  #: of the whole parameter, of which the tensors may be a shard
        self.count = state["step"]
        self.memory = [state[key] for key in MEMORY]  #: 0-d: fast and slow cosine, logarithm of the pace
        self.trust = state["trust"] if guarded else None  #: 0-d
        self._state = tuple(state.values())
        self._form = (of.dtype, of.shape, of.stride())
        self._of = (of, *(state[key] for key in plane_keys))
        self._sharded = is_dtensor(of)
        self._here = [local(t) for t in self._of]
        self._addresses = [t.data_ptr() for t in self._here]
        self.complex = of.is_complex()
        self.param, *planes = [_real(t) for t in self._here] if self.complex else self._here
        self.planes = tuple(planes)  #: exp_avg, exp_avg_sq, hidden_0, ...
        self.numel = self.param.numel()
        self.grad = self.param  # until there is one
        self.moment: Moment
        dtypes = tuple(t.dtype for t in planes)
        self.format = format_of(self.param.device, self.param.dtype, self.param.dtype, dtypes)
        self.kept: Kept | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Parameter, gradient and planes."""
        return (self.param, self.grad, *self.planes)

    def holds(self, of: Tensor, state: Mapping[str, Tensor]) -> bool:
        """Whether the job is made of these very tensors, and they lie where they lay."""
        if of is not self._of[0] or self.complex or (of.dtype, of.shape, of.stride()) != self._form:
            return False
        if len(state) != len(self._state) or not all(map(is_, state.values(), self._state)):
            return False
        if self._sharded and not all(map(is_, map(local, self._of), self._here)):
            return False
        return [t.data_ptr() for t in self._here] == self._addresses

    def take(self, grad: Tensor, maximize: bool) -> None:
        """A step's gradient."""
        if self._sharded or self.complex or type(grad) is not Tensor:
            grad = local(gradient_as(self._of[0], grad))
            grad = _real(grad) if self.complex else grad
        self.grad = -grad if maximize else grad
        if grad.dtype is not self.format.grad:
            self.format = format_of(self.format.device, self.format.param, grad.dtype, self.format.planes)

    def let_go(self) -> None:
        """Forget the gradient."""
        self.grad = self.param
        if self.kept is not None:
            self.kept.let_go()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj())


class Flat:
    """A job's tensors as vectors, all in one order of coordinates.

    With ``in_order`` that is the order of their indices. Tensors that are contiguous, or else dense and of the same
    strides (channels_last, transposed), are seen through views of their memory. Others are copied, and
    :meth:`write_back` copies what has changed back.
    """

    def __init__(self, job: Job, in_order: bool = False) -> None:
        self.originals = originals = job.tensors
        contiguous = all(t.is_contiguous() for t in originals)
        self.copied = not (contiguous or (not in_order and _share_order(originals)))
        # Views of a leaf begin to require gradients once it has been changed, and kernels would be compiled again.
        in_place = (job.param.detach(), *originals[1:])
        self.tensors = tuple(t.contiguous() for t in originals) if self.copied else in_place

    @property
    def vectors(self) -> list[Tensor]:
        """[n] each."""
        return self.piece(0, self.originals[0].numel())

    def piece(self, start: int, *shape: int) -> list[Tensor]:
        """The coordinates from ``start`` on, in one or two dimensions."""
        return [piece_of(t, start, *shape) for t in self.tensors]

    def write_back(self) -> None:
        """Must follow the last change of the vectors."""
        if self.copied:
            for i, (copy, original) in enumerate(zip(self.tensors, self.originals, strict=True)):
                if i != 1 and copy is not original:  # all but the gradient
                    original.copy_(copy)


def piece_of(tensor: Tensor, start: int, *shape: int) -> Tensor:
    """Coordinates of a dense tensor in the order of its memory, from ``start`` on, in one or two dimensions."""
    stride = (shape[1], 1) if len(shape) == 2 else (1,)
    return tensor.as_strided(shape, stride, tensor.storage_offset() + start)


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
