"""Many runs of one task at once, each with its own weights of the policy, as one batch of tensors.

Small networks leave most of a processor idle, and nearly all of a GPU. Evolution strategies train one task again and
again, with the same initial parameters and batches and perturbed meta-parameters: here R such runs are one, with a
leading dimension of R in parameters, state and meta-parameters (``torch.func.vmap``). The update is
:func:`learned_optim.rule.update.update`, the loss the task's own. On a GPU a step is captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from learned_optim.meta_train.compiled_update import PaddedRows, compiled_vectorized
from learned_optim.meta_train.problem import ROW, Problem
from learned_optim.meta_train.trajectories import Plan
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.types import CoordinateState, Hyperparameters, TensorState
from learned_optim.rule.update import initial_state, update
from learned_optim.tasks.base import Batch, Tensors, batch_tensors, map_batch, to_device


class UnequalBatches(ValueError):
    """The task's batches are not of one shape: they cannot be stacked."""


class _State(NamedTuple):
    """Of R runs; replaced as a whole on the CPU, written over in place on a GPU."""

    params: Tensor  #: [R, n]
    coordinate_state: CoordinateState  #: [R, n] each
    tensor_state: TensorState  #: [R, K] each
    buffers: Tensors  #: [R, ...] each

    def tensors(self) -> list[Tensor]:
        of_rule = *self.coordinate_state.tensors, *self.tensor_state.tensors
        return [self.params, *of_rule, *self.buffers.values()]


def run_vectorized(
    config: PolicyConfig,
    weights: Mapping[str, Tensor],
    plan: Plan,
    steps: int,
    *,
    compiled: bool = False,
    device: torch.device | str = "cpu",
    evaluate_at: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Train a planned task R times.

    Args:
        config: of the policy.
        weights: R sets of its weights, [R, ...] each.
        plan: task, seed, hyperparameters and recipe, the same for all runs.
        steps: inner steps.
        compiled: run the update rule compiled.
        device: where to compute.
        evaluate_at: after how many steps held-out losses are taken; in order, from 1 to ``steps``.

    Returns:
        Losses before each step, [R, steps], and held-out losses, [R, len(evaluate_at)], or [R, 0] where the task has no
        held-out data; on the CPU in float64. ``inf`` from the first non-finite loss on.

    Raises:
        UnequalBatches: the batches' shapes vary; nothing has been run then.
    """
    problem = Problem(plan.task, plan.seed, clip_norm=plan.recipe.clip_norm)
    batches = _stacked(list(islice(problem.batches(), steps)))
    with torch.no_grad():
        run = _Runs(config, problem, weights, plan, batches, compiled, torch.device(device))
        losses, held_out = (t.double().cpu() for t in run.train(steps, evaluate_at if problem.has_held_out else ()))
    broken = (~losses.isfinite()).cummax(1).values
    # A held-out loss after t steps stands behind the losses before steps 1 to t.
    broken_by = broken[:, [step - 1 for step in evaluate_at][: held_out.shape[1]]] | ~held_out.isfinite()
    return losses.masked_fill(broken, torch.inf), held_out.masked_fill(broken_by, torch.inf)


def _stacked(batches: list[Batch]) -> Batch:
    """A batch whose tensors have a leading dimension of time."""
    columns = [batch_tensors(batch) for batch in batches]
    if any([t.shape for t in column] != [t.shape for t in columns[0]] for column in columns):
        raise UnequalBatches("the batches of a task whose runs are vectorized must all have the same shapes")
    stacks = iter([torch.stack(tensors) for tensors in zip(*columns, strict=True)])
    return map_batch(lambda _: next(stacks), batches[0])


class _Runs:
    """R runs under way."""

    def __init__(
        self,
        config: PolicyConfig,
        problem: Problem,
        weights: Mapping[str, Tensor],
        plan: Plan,
        batches: Batch,
        compiled: bool,
        device: torch.device,
    ) -> None:
        self.config, self.problem, self.plan, self.device = config, problem, plan, device
        layout = problem.layout.to(device)
        # Code for a single row of coordinates would be compiled apart.
        self.layout = PaddedRows.of(layout) if compiled and sum(layout.sizes) > ROW else layout
        self.weights = {name: w.to(device) for name, w in weights.items()}
        self.batches = to_device(batches, device)
        self.count = len(next(iter(self.weights.values())))
        begin = problem.start(config)
        params = begin.params.to(device).expand(self.count, -1).clone()
        state, _ = initial_state(config, params)
        state = state._replace(exp_avg_sq=state.exp_avg_sq + begin.coordinate_state.exp_avg_sq.to(device))
        shape = self.count, len(self.layout.tensor_shapes.numel)
        tensor_state = TensorState(*(t.new_zeros(shape, device=device) for t in begin.tensor_state.tensors))
        tensor_state = tensor_state._replace(age=tensor_state.age + problem.steps_before)
        buffers = {k: b.to(device).expand(self.count, *b.shape).clone() for k, b in begin.buffers.items()}
        self.state = _State(params, state, tensor_state, buffers)
        one_run = torch.func.grad_and_value(self._loss, has_aux=True)
        self._gradient = torch.vmap(one_run, in_dims=(0, 0, None), randomness="error")
        self._evaluate = torch.vmap(self._held_out_loss, in_dims=(0, 0), randomness="error")

    def train(self, steps: int, evaluate_at: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses, [R, steps], and held-out losses, [R, len(evaluate_at)]."""
        losses = []
        held_out = [torch.empty(self.count, 0, device=self.device)]
        advance = self._replayed(steps) if self.device.type == "cuda" else self._advance
        if evaluate_at:
            self._make_held_out_data()
        for step in range(steps):
            losses.append(advance(step))
            if step + 1 in evaluate_at:
                held_out_loss = self._evaluate(self.state.params, self.state.buffers).unsqueeze(1)
                held_out += [held_out_loss] * list(evaluate_at).count(step + 1)
        return torch.stack(losses, 1), torch.cat(held_out, 1)

    def _advance(self, step: int) -> Tensor:
        batch = map_batch(lambda t: t[step], self.batches)
        number = float(step + 1 + self.problem.steps_before)
        loss, self.state = self._step(self.state, batch, number, self.plan.hyper_at(step))
        return loss

    def _replayed(self, steps: int) -> Callable[[int], Tensor]:
        """The same on a GPU: a step costs the launch of a graph instead of several hundred kernels'."""
        position = torch.zeros(1, dtype=torch.int64, device=self.device)
        losses = torch.empty(steps, self.count, device=self.device)
        rates = [float(self.plan.hyper_at(step).lr) for step in range(steps)]
        lr = torch.tensor(rates, dtype=torch.float64, device=self.device)
        state = self.state

        def step() -> None:
            batch = map_batch(lambda t: t.index_select(0, position).squeeze(0), self.batches)
            number = position[0].double() + (1.0 + self.problem.steps_before)
            hyper = self.plan.hyper._replace(lr=lr.index_select(0, position).squeeze(0))
            loss, new = self._step(state, batch, number, hyper)
            losses.index_copy_(0, position, loss.unsqueeze(0))
            for old, t in zip(state.tensors(), new.tensors(), strict=True):
                old.copy_(t)
            position.add_(1)

        before = [t.clone() for t in state.tensors()]
        # What is compiled, tuned or allocated at the first call must not be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for t, start in zip(state.tensors(), before, strict=True):
            t.copy_(start)
        position.zero_()

        def advance(step: int) -> Tensor:
            graph.replay()
            return losses[step]

        return advance

    def _step(
        self, state: _State, batch: Batch, number: float | Tensor, hyper: Hyperparameters
    ) -> tuple[Tensor, _State]:
        gradient, (loss, buffers) = self._gradient(state.params, dict(state.buffers), batch)
        gradient = self.problem.clipped(gradient)
        what = state.params, gradient, state.coordinate_state, state.tensor_state, number, hyper
        if isinstance(self.layout, PaddedRows):
            updated = compiled_vectorized(self.weights, self.config, self.layout, *what)
        else:
            updated = _vectorized_update(self.weights, self.config, self.layout, *what)
        return loss, _State(*updated, buffers)

    def _loss(self, params: Tensor, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        buffers = {name: b.clone() for name, b in buffers.items()}
        with _VmapFriendly():
            loss = self.problem.task.loss(self.problem.views(params), buffers, batch)
        return loss, buffers

    def _make_held_out_data(self) -> None:
        """It is made when it is used first, and nothing can be drawn at random inside ``vmap``."""
        eval_loss: Any = getattr(self.problem.task, "eval_loss", None)
        eval_loss(self.problem.views(self.state.params[0]), {name: b[0] for name, b in self.state.buffers.items()})

    def _held_out_loss(self, params: Tensor, buffers: Tensors) -> Tensor:
        eval_loss: Any = getattr(self.problem.task, "eval_loss", None)
        with _VmapFriendly():
            return eval_loss(self.problem.views(params), buffers)


_OF_TENSORS = TensorState(0, 0, 0, 0)  # pyright: ignore[reportArgumentType]  (dimensions, and no trust)

#: :func:`update` of R runs: weights, parameters, gradients and state have a leading dimension of R.
_vectorized_update = torch.vmap(
    update,
    in_dims=(0, None, None, 0, 0, 0, _OF_TENSORS, None, None),
    out_dims=(0, 0, _OF_TENSORS),  # pyright: ignore[reportArgumentType]
)


class _VmapFriendly(TorchFunctionMode):
    """Recurrent layers and embeddings by operations of which ``vmap`` makes one for all runs, instead of a loop."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        replacement = _REPLACEMENTS.get(func, func)
        result = replacement(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def _embedding(tokens: Tensor, weight: Tensor, norm_type: float, **options: Any) -> Tensor:
    if any(option is not None and option is not False for option in options.values()):
        return NotImplemented  # padding or norms, of which the following knows nothing
    return weight.index_select(0, tokens.reshape(-1)).view(*tokens.shape, -1)


def _recurrent(
    cell: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """What ``torch.gru`` and ``torch.lstm`` do, from ``states`` [layers, batch, hidden] each."""
    per_layer = len(weights) // num_layers
    if bidirectional or (dropout and train) or per_layer != (4 if has_biases else 2):
        return NotImplemented
    x = x if batch_first else x.transpose(0, 1)
    ends: list[tuple[Tensor, ...]] = []
    for layer, state in enumerate(zip(*states, strict=True)):
        inner, outer, *biases = weights[layer * per_layer : (layer + 1) * per_layer]
        inner_bias, outer_bias = biases or (None, None)
        given = functional.linear(x, inner, inner_bias)
        outputs = []
        for t in range(x.shape[1]):
            state = cell(given[:, t], functional.linear(state[0], outer, outer_bias), *state)
            outputs.append(state[0])
        x = torch.stack(outputs, 1)
        ends.append(state)
    return x if batch_first else x.transpose(0, 1), *(torch.stack(end) for end in zip(*ends, strict=True))


def _gru(x: Tensor, h: Tensor, weights: Any, *options: Any) -> Any:
    def cell(given: Tensor, recurrent: Tensor, h: Tensor) -> tuple[Tensor]:
        (a, b, c), (i, j, k) = given.chunk(3, 1), recurrent.chunk(3, 1)
        update_gate, candidate = (b + j).sigmoid(), (c + (a + i).sigmoid() * k).tanh()
        return (candidate + update_gate * (h - candidate),)

    return NotImplemented if isinstance(weights, Tensor) else _recurrent(cell, x, (h,), weights, *options)


def _lstm(x: Tensor, states: Any, weights: Any, *options: Any) -> Any:
    def cell(given: Tensor, recurrent: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (given + recurrent).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    return NotImplemented if isinstance(states, Tensor) else _recurrent(cell, x, states, weights, *options)


_REPLACEMENTS: dict[Callable, Callable] = {
    torch.gru: _gru,
    torch.lstm: _lstm,
    functional.embedding: _embedding,
    # On a GPU recurrent layers ask whether their weights lie apart, to copy them into one block; those of runs cannot.
    Tensor.data_ptr: lambda t: 0,
}
