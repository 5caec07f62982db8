"""Many runs of one task at once, each with its own weights of the policy, as one batch of tensors.

Small networks leave most of a processor idle, and nearly all of a GPU. Evolution strategies train one task again and
again, with the same initial parameters and batches and perturbed meta-parameters: here R such runs are one, with a
leading dimension of R in parameters, state and meta-parameters (``torch.func.vmap``). The update is
:func:`learned_optim.update_rule.update`, the loss the task's own. On a GPU a step is captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from learned_optim.cells import CoordinateState, Hyperparameters
from learned_optim.meta_train.compiled_update import PaddedRows, compiled_side_by_side
from learned_optim.meta_train.problem import ROW, Problem
from learned_optim.meta_train.trajectories import Plan
from learned_optim.policy import PolicyConfig
from learned_optim.tasks.base import Batch, Tensors, batch_tensors, map_batch, to_device
from learned_optim.update_rule import initial_state, update


class UnequalBatches(ValueError):
    """The task's batches are not of one shape: they cannot be stacked."""


class _State(NamedTuple):
    """Of R runs; replaced as a whole on the CPU, written over in place on a GPU."""

    params: Tensor  #: [R, n]
    planes: CoordinateState  #: [R, n] each
    memory: Tensor  #: [R, 3, K]
    buffers: Tensors  #: [R, ...] each

    def tensors(self) -> list[Tensor]:
        m, v, hidden = self.planes
        return [self.params, m, v, *hidden, self.memory, *self.buffers.values()]


def run_side_by_side(
    config: PolicyConfig,
    weights: Mapping[str, Tensor],
    plan: Plan,
    steps: int,
    *,
    compiled: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Train a planned task R times.

    Args:
        config: of the policy.
        weights: R sets of its weights, [R, ...] each.
        plan: task, seed and hyperparameters, the same for all runs.
        steps: inner steps.
        compiled: run the update rule compiled.
        device: where to compute.

    Returns:
        Losses before each step, [R, steps] on the CPU in float64; ``inf`` from the first non-finite one on.

    Raises:
        UnequalBatches: the batches' shapes vary; nothing has been run then.
    """
    problem = Problem(plan.task, plan.seed)
    batches = _stacked(list(islice(problem.batches(), steps)))
    with torch.no_grad(), _layers_that_vmap_knows():
        run = _Runs(config, problem, weights, plan.hyper, batches, compiled, torch.device(device))
        losses = run.train(steps).double().cpu()
    broken = (~losses.isfinite()).cummax(1).values
    return losses.masked_fill(broken, torch.inf)


def _stacked(batches: list[Batch]) -> Batch:
    """A batch whose tensors have a leading dimension of time."""
    columns = [batch_tensors(batch) for batch in batches]
    if any([t.shape for t in column] != [t.shape for t in columns[0]] for column in columns):
        raise UnequalBatches("the batches of a task that is run side by side must all have the same shapes")
    stacks = iter([torch.stack(tensors) for tensors in zip(*columns, strict=True)])
    return map_batch(lambda _: next(stacks), batches[0])


class _Runs:
    """R runs under way."""

    def __init__(
        self,
        config: PolicyConfig,
        problem: Problem,
        weights: Mapping[str, Tensor],
        hyper: Hyperparameters,
        batches: Batch,
        compiled: bool,
        device: torch.device,
    ) -> None:
        self.config, self.problem, self.hyper, self.device = config, problem, hyper, device
        layout = problem.layout.to(device)
        # Code for a single row of coordinates would be compiled apart.
        self.layout = PaddedRows.of(layout) if compiled and sum(layout.sizes) > ROW else layout
        self.weights = {name: w.to(device) for name, w in weights.items()}
        self.batches = to_device(batches, device)
        self.count = len(next(iter(self.weights.values())))
        begin = problem.start(config)
        params = begin.params.to(device).expand(self.count, -1).clone()
        planes, _ = initial_state(config, params)
        planes = planes._replace(exp_avg_sq=planes.exp_avg_sq + begin.planes.exp_avg_sq.to(device))
        memory = begin.memory.new_zeros(self.count, len(begin.memory), len(self.layout.numel), device=device)
        buffers = {k: b.to(device).expand(self.count, *b.shape).clone() for k, b in begin.buffers.items()}
        self.state = _State(params, planes, memory, buffers)
        one_run = torch.func.grad_and_value(self._loss, has_aux=True)
        self._gradient = torch.vmap(one_run, in_dims=(0, 0, None), randomness="error")

    def train(self, steps: int) -> Tensor:
        if self.device.type == "cuda":
            return self._replayed(steps)
        losses = []
        for step in range(steps):
            batch = map_batch(lambda t, step=step: t[step], self.batches)
            loss, self.state = self._step(self.state, batch, float(step + 1 + self.problem.steps_before))
            losses.append(loss)
        return torch.stack(losses, 1)

    def _replayed(self, steps: int) -> Tensor:
        """The same on a GPU: a step costs the launch of a graph instead of several hundred kernels'."""
        position = torch.zeros(1, dtype=torch.int64, device=self.device)
        losses = torch.empty(steps, self.count, device=self.device)
        state = self.state

        def step() -> None:
            batch = map_batch(lambda t: t.index_select(0, position).squeeze(0), self.batches)
            number = position[0].double() + (1.0 + self.problem.steps_before)
            loss, new = self._step(state, batch, number)
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
        for _ in range(steps):
            graph.replay()
        torch.cuda.synchronize()
        return losses.T

    def _step(self, state: _State, batch: Batch, number: float | Tensor) -> tuple[Tensor, _State]:
        gradient, (loss, buffers) = self._gradient(state.params, dict(state.buffers), batch)
        what = state.params, gradient, state.planes, state.memory, number, self.hyper
        if isinstance(self.layout, PaddedRows):
            params, planes, memory = compiled_side_by_side(self.weights, self.config, self.layout, *what)
        else:
            params, planes, memory = _plain_side_by_side(self.weights, self.config, self.layout, *what)
        return loss, _State(params, planes, memory, buffers)

    def _loss(self, params: Tensor, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        buffers = {name: b.clone() for name, b in buffers.items()}
        loss = self.problem.task.loss(self.problem.views(params), buffers, batch)
        return loss, buffers


#: :func:`update` of R runs: weights, parameters, gradients, state and memory have a leading dimension of R.
_plain_side_by_side = torch.vmap(update, in_dims=(0, None, None, 0, 0, 0, 0, None, None))


@contextmanager
def _layers_that_vmap_knows() -> Iterator[None]:
    """Recurrent layers and embeddings by operations of which ``vmap`` makes one for all runs, instead of a loop."""
    with ExitStack() as stack:
        for layer, forward in ((nn.GRU, _gru), (nn.LSTM, _lstm), (nn.Embedding, _embedding)):
            stack.enter_context(mock.patch.object(layer, "forward", forward))
        yield


def _embedding(layer: nn.Embedding, tokens: Tensor) -> Tensor:
    return layer.weight.index_select(0, tokens.reshape(-1)).view(*tokens.shape, -1)


def _recurrent(layer: nn.RNNBase, x: Tensor, cell: Callable[..., tuple[Tensor, ...]], states: int) -> tuple:
    """What an ``nn.RNNBase`` of one direction does with [batch, time, inputs], from a state of zeros."""
    ends: list[tuple[Tensor, ...]] = []
    for number in range(layer.num_layers):
        inner, outer = (getattr(layer, f"weight_{kind}_l{number}") for kind in ("ih", "hh"))
        inner_bias, outer_bias = (getattr(layer, f"bias_{kind}_l{number}") for kind in ("ih", "hh"))
        given = nn.functional.linear(x, inner, inner_bias)
        state: tuple[Tensor, ...] = (x.new_zeros(len(x), layer.hidden_size),) * states
        outputs = []
        for t in range(x.shape[1]):
            state = cell(given[:, t], nn.functional.linear(state[0], outer, outer_bias), *state)
            outputs.append(state[0])
        x = torch.stack(outputs, 1)
        ends.append(state)
    return x, tuple(torch.stack(end) for end in zip(*ends, strict=True))


def _gru(layer: nn.GRU, x: Tensor) -> tuple[Tensor, Tensor]:
    def cell(given: Tensor, recurrent: Tensor, h: Tensor) -> tuple[Tensor]:
        (a, b, c), (i, j, k) = given.chunk(3, 1), recurrent.chunk(3, 1)
        update_gate, candidate = (b + j).sigmoid(), (c + (a + i).sigmoid() * k).tanh()
        return (candidate + update_gate * (h - candidate),)

    x, (h,) = _recurrent(layer, x, cell, 1)
    return x, h


def _lstm(layer: nn.LSTM, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    def cell(given: Tensor, recurrent: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (given + recurrent).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    x, (h, c) = _recurrent(layer, x, cell, 2)
    return x, (h, c)
