"""Unrolled inner training: N inner steps as one differentiable function of the policy's weights.

The inner steps are those of :func:`learned_optim.rule.update.update`, the same function that the optimizer runs.
With gradient g_t at inner step t and meta-loss M(L_1, ..., L_T), L_t the loss after t steps, on the next batch:

    first order   g_t enters detached. Then dL_t/dp_t *is* the inner gradient g_{t+1} of the step that follows, which
                  is there anyway: no second forward pass, and only the chain of updates carries a graph.
    second order  g_t keeps its graph: exact, by back-propagation through the inner back-propagation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.compiled_update import compiled_update
from learned_optim.meta_train.problem import InnerState, Problem
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.types import Hyperparameters
from learned_optim.rule.update import update
from learned_optim.tasks.base import Tensors


class UnrollOptions(NamedTuple):
    """How a window is unrolled; see :class:`~learned_optim.meta_train.MetaTrainConfig`."""

    second_order: bool = False
    held_out_share: float = 0.0  #: of the losses that is held-out, where the task has such data
    fixed_scale: bool = False
    segment: int = 0
    last_only: bool = False  #: only the last loss (of each segment) is wanted


def unroll(
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    problem: Problem,
    state: InnerState,
    batches: Sequence[Any],
    hyper: Hyperparameters | Callable[[int], Hyperparameters],
    options: UnrollOptions = UnrollOptions(),  # noqa: B008  (a tuple: nobody can change it)
) -> tuple[InnerState, Tensor]:
    """T inner steps.

    Args:
        weights: the policy's; the meta-gradient flows to them, and to ``state.params`` where those require it.
        config: the policy's.
        problem: the task.
        state: where the window begins; its buffers are left as they are.
        batches: T + 1 of them: step t trains on number t - 1, the loss after T steps is taken on the last.
        hyper: of the inner steps, or a function of their number, from 0.
        options: order of differentiation, held-out losses, checkpointing.

    Returns:
        The state after T steps (with its graph) and the losses L_1 .. L_T, [T], differentiable. With
        ``options.last_only`` there may be fewer, and only the last of them is meant to be used.
    """
    hyper_at = hyper if callable(hyper) else lambda step: hyper
    return _Unroll(weights, config, problem, hyper_at, options).window(state, batches)


class _Unroll(NamedTuple):
    """What all steps of a window share."""

    weights: Mapping[str, Tensor]
    config: PolicyConfig
    problem: Problem
    hyper_at: Callable[[int], Hyperparameters]
    options: UnrollOptions

    def window(self, state: InnerState, batches: Sequence[Any]) -> tuple[InnerState, Tensor]:
        state = state.with_own_buffers()
        length = len(batches) - 1
        segment = self.options.segment or length
        run = self.recomputed if self.options.segment else self.steps
        losses: list[Tensor] = []
        for begin in range(0, length, segment):
            state, segment_losses = run(state, batches[begin : min(begin + segment, length) + 1])
            losses.append(segment_losses)
        return state, torch.cat(losses)

    def steps(self, state: InnerState, batches: Sequence[Any]) -> tuple[InnerState, Tensor]:
        """Gradient, update, gradient, update, ...; each gradient serves as the last loss's derivative."""
        problem, options = self.problem, self.options
        params, coordinate_state, tensor_state, step, buffers = state
        run_update = compiled_update if problem.compiled else update
        losses = []
        last = len(batches) - 1
        share = options.held_out_share if problem.has_held_out else 0.0
        for i, batch in enumerate(batches):
            wanted = i == last or (i > 0 and not options.last_only)
            of_held_out: Any = 0.0
            if wanted and share:
                of_held_out = self._meta_view(params, *problem.held_out(params, buffers, options.second_order))
            if i == last and share == 1.0:
                losses.append(of_held_out)
                break
            # The next window computes the last gradient again, on its own buffers; here it only gives the last loss.
            moving = buffers if i < last else {name: b.clone() for name, b in buffers.items()}
            loss, grad = problem.gradient(params, moving, batch, create_graph=options.second_order)
            if wanted:
                losses.append(share * of_held_out + (1.0 - share) * self._meta_view(params, loss, grad))
            if i == last:
                break
            step += 1
            params, coordinate_state, tensor_state = run_update(
                self.weights, self.config, problem.layout, params, problem.clipped(grad),
                coordinate_state, tensor_state, float(problem.steps_before + step), self.hyper_at(step - 1),
                fixed_scale=options.fixed_scale,
            )  # fmt: skip
        return InnerState(params, coordinate_state, tensor_state, step, buffers), torch.stack(losses)

    def _meta_view(self, params: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        """The loss as the meta-loss sees it: differentiable in the parameters."""
        return loss if self.options.second_order else _KnownGradient.apply(params, loss, grad)  # pyright: ignore

    def recomputed(self, state: InnerState, batches: Sequence[Any]) -> tuple[InnerState, Tensor]:
        """:meth:`steps`, of which only the inputs are kept; the backward pass runs it again.

        A segment of several steps is run again as segments of one step each, so that at any moment the graph of one
        single step exists: T steps in segments of s keep T/s + s states.
        """
        names = list(self.weights)
        after: list[tuple[int, Tensors]] = []  # with the tensors it would be a cycle that is never freed

        def run(tensors: Sequence[Tensor], recompute: bool) -> tuple[Tensor, ...]:
            again = self._replace(weights=dict(zip(names, tensors, strict=False)))
            begin = state.with_tensors(tensors[len(names) :]).with_own_buffers()
            if recompute and len(batches) > 2:
                again = again._replace(options=self.options._replace(segment=1))
                end, losses = again.window(begin, batches)
            else:
                end, losses = again.steps(begin, batches)
            if not after:
                after.append((end.step, end.buffers))
            return losses[-1:] if self.options.last_only else losses, *end.tensors

        losses, *tensors = _Recompute.apply(run, *self.weights.values(), *state.tensors)  # pyright: ignore
        step, buffers = after[0]
        return state.with_tensors(tensors)._replace(step=step, buffers=buffers), losses


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient with respect to the parameters has been computed already."""

    @staticmethod
    def forward(ctx: Any, params: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (grad,) = ctx.saved_tensors
        return output * grad, None, None


class _Recompute(torch.autograd.Function):
    """Gradient checkpointing for functions that call ``autograd.grad`` themselves.

    ``torch.utils.checkpoint`` cannot serve here: its saved-tensor hooks would see the inner back-propagation too and
    recompute the segment within itself.
    """

    @staticmethod
    def forward(ctx: Any, run: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return run([t.detach() for t in tensors], recompute=False)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        inputs = [t.detach().requires_grad_(need) for t, need in
                  zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)]  # fmt: skip
        with torch.enable_grad():
            results = ctx.run(inputs, recompute=True)
        pairs = [(r, o) for r, o in zip(results, outputs, strict=True) if r.requires_grad]
        wanted = [t for t in inputs if t.requires_grad]
        grads = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [o for _, o in pairs], allow_unused=True))
        return None, *(next(grads) if t.requires_grad else None for t in inputs)
