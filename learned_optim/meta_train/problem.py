"""A task seen as the unroll sees it: parameters in one vector, batches that can be drawn again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.layouts import Segments
from learned_optim.rule.types import CoordinateState, TensorState
from learned_optim.rule.update import initial_state
from learned_optim.tasks.base import Task, Tensors, batches_of
from learned_optim.tasks.warm import WarmStart

OTHER_PARAMETERS = (
    "task {!r} has other parameters than those whose initial values are learned: learn them on tasks whose "
    "parameters have the same names and shapes"
)

#: Tensors lie in the vector padded to multiples of this many coordinates; the padding is and stays zero.
ROW = 64


class InnerState(NamedTuple):
    """All that an inner run carries from one step to the next."""

    params: Tensor  #: [n]
    coordinate_state: CoordinateState  #: [n] each
    tensor_state: TensorState  #: [K] each
    step: int  #: inner steps made
    buffers: Tensors

    @property
    def tensors(self) -> list[Tensor]:
        """All that the meta-gradient flows through."""
        return [self.params, *self.tensor_state.tensors, *self.coordinate_state.tensors]

    def with_tensors(self, tensors: Sequence[Tensor]) -> InnerState:
        """The same with others in place of :attr:`tensors`."""
        params, *rest = tensors
        count = len(self.tensor_state.tensors)
        return self._replace(
            params=params,
            tensor_state=TensorState(*rest[:count]),
            coordinate_state=CoordinateState.of(rest[count:]),
        )

    def with_own_buffers(self) -> InnerState:
        """The same with copies of the buffers, which losses update in place."""
        return self._replace(buffers={name: b.clone() for name, b in self.buffers.items()})

    def detached(self) -> InnerState:
        """The same values, cut off from their graph: what is carried over a truncation."""
        buffers = {name: b.detach().clone() for name, b in self.buffers.items()}
        return self.with_tensors([t.detach() for t in self.tensors])._replace(buffers=buffers)


class Problem:
    """One task, and where its parameters lie in a vector of n coordinates, padding included.

    Args:
        task: what is trained.
        seed: of its initial parameters and its batches.
        compiled: whether the unroll's updates are run by compiled kernels.
        clip_norm: inner gradients of a larger norm are shortened to this one.
    """

    def __init__(self, task: Task, seed: int, compiled: bool = False, clip_norm: float = math.inf) -> None:
        self.task, self.seed, self.compiled, self.clip_norm = task, seed, compiled, clip_norm
        params, buffers = task.init(torch.Generator().manual_seed(seed))
        self.names = list(params)
        self.shapes = [p.shape for p in params.values()]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.layout = Segments(self.shapes, align=ROW)
        self._params, self._buffers = params, buffers
        self.warm: WarmStart | None = getattr(task, "warm_start", None)
        #: steps that the state of the first inner step counts as made already
        self.steps_before = 0 if self.warm is None else self.warm.steps

    def start(self, config: PolicyConfig, params: Tensor | None = None) -> InnerState:
        """The state before the first step.

        Args:
            params: [n], in place of the task's own initial parameters.
        """
        vector = self.flatten(self._params) if params is None else params
        if vector.numel() != sum(self.layout.sizes):
            raise ValueError(OTHER_PARAMETERS.format(self.task.name))
        state, tensor_state = initial_state(config, vector.detach(), len(self.shapes))
        if self.warm is not None:
            state = state._replace(exp_avg_sq=self.flatten(self.warm.second_moments).to(state.exp_avg_sq))
            tensor_state = tensor_state._replace(age=tensor_state.age + self.steps_before)
        return InnerState(vector, state, tensor_state, 0, self._buffers).with_own_buffers()

    def flatten(self, params: Tensors) -> Tensor:
        """Named tensors -> [n]."""
        return self._vector([params[name] for name in self.names])

    def views(self, vector: Tensor) -> Tensors:
        """[n] -> named tensors that share its memory and its graph."""
        pieces = zip(self.names, vector.split(self.layout.sizes), self.sizes, self.shapes, strict=True)
        return {name: piece[:size].view(shape) for name, piece, size, shape in pieces}

    def _vector(self, tensors: list[Tensor]) -> Tensor:
        pieces = []
        for t, size, padded in zip(tensors, self.sizes, self.layout.sizes, strict=True):
            pieces.append(t.reshape(-1))
            if padded > size:
                pieces.append(t.new_zeros(padded - size))
        return torch.cat(pieces)

    def batches(self, skip: int = 0) -> Iterator[Any]:
        """The task's batches, from number ``skip`` on."""
        return batches_of(self.task, torch.Generator().manual_seed(self.seed + 1), skip)

    def gradient(
        self, params: Tensor, buffers: Tensors, batch: Any, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Loss and its gradient [n] at ``params``; buffers move. Without ``create_graph`` both are free of graphs."""
        return self._gradient(lambda tensors: self.task.loss(tensors, buffers, batch), params, create_graph)

    def clipped(self, grad: Tensor) -> Tensor:
        """What a step makes of a gradient [..., n]: the same, shortened to ``clip_norm`` where it is longer."""
        if not math.isfinite(self.clip_norm):
            return grad
        norm = grad.norm(dim=-1, keepdim=True)
        return grad * (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_

    @property
    def has_held_out(self) -> bool:
        """Whether the task has held-out data."""
        return getattr(self.task, "eval_loss", None) is not None

    def held_out(self, params: Tensor, buffers: Tensors, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Like :meth:`gradient`, on the task's held-out data, which it must have."""
        eval_loss: Any = getattr(self.task, "eval_loss", None)
        return self._gradient(lambda tensors: eval_loss(tensors, buffers), params, create_graph)

    def _gradient(
        self, loss_of: Callable[[Tensors], Tensor], params: Tensor, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            tensors = self.views(params if params.requires_grad else params.detach().requires_grad_())
            if not create_graph:
                tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
            loss = loss_of(tensors)
            grads = torch.autograd.grad(loss, list(tensors.values()), create_graph=create_graph, allow_unused=True)
        pairs = zip(grads, tensors.values(), strict=True)
        vector = self._vector([torch.zeros_like(t) if g is None else g for g, t in pairs])
        return (loss, vector) if create_graph else (loss.detach(), vector)


class FromInit:
    """A task that begins with given parameters.

    Args:
        task: what is trained.
        init: initial parameters, by the names that the task gives them.
    """

    def __init__(self, task: Task, init: Tensors) -> None:
        self.name, self.length = task.name, task.length
        self.batches, self.loss, self.eval_loss = task.batches, task.loss, getattr(task, "eval_loss", None)
        self.warm_start: WarmStart | None = getattr(task, "warm_start", None)
        self._task, self._init = task, init

    def init(self, rng: torch.Generator) -> tuple[Tensors, Tensors]:
        params, buffers = self._task.init(rng)
        if {name: p.shape for name, p in params.items()} != {name: p.shape for name, p in self._init.items()}:
            raise ValueError(OTHER_PARAMETERS.format(self.name))
        return {name: p.detach().clone() for name, p in self._init.items()}, buffers
