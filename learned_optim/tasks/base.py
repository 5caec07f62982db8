"""What a task is: the protocol, the adapter for ``nn.Module``, families of tasks, and a check.

A *task* is one small training problem. It says how to draw initial parameters, how to draw batches and what the
loss is; whoever trains on it (an optimizer under test, or a meta-training unroll) owns the parameters. Everything a
task does is a function of its arguments, so that a run can be repeated, recomputed or differentiated.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

Tensors = dict[str, Tensor]
"""Named tensors: the parameters or the buffers of a task."""

Batch = Any
"""A tensor, or a tuple, list or dict of tensors; what it means is between ``batches`` and ``loss``."""

BatchMaker = Callable[[torch.Generator], Iterator[Batch]]
LossFn = Callable[[Any, Batch], Tensor]


@runtime_checkable
class Task(Protocol):
    """One training problem. Any object with these members is a task; no base class is needed::

        class Line:
            name, length = "line", 50

            def init(self, rng):
                return {"w": torch.randn(3, generator=rng), "b": torch.zeros(())}, {}

            def batches(self, rng):
                while True:
                    x = torch.randn(16, 3, generator=rng)
                    yield x, x.sum(1) + 1

            def loss(self, params, buffers, batch):
                x, y = batch
                return (x @ params["w"] + params["b"] - y).square().mean()

    ``check_task(Line())`` finds the usual mistakes. ``ModuleTask`` makes a task of an ``nn.Module``.

    A task may also have ``eval_loss(params, buffers) -> Tensor``, the loss on held-out data as a scalar (BatchNorm
    in evaluation mode, buffers left alone). Ask with ``getattr(task, "eval_loss", None)``. And it may have
    ``warm_start``, the state that its runs begin with: see :class:`~learned_optim.tasks.warm.WarmStart`.

    Attributes:
        name: what tables and error messages call it.
        length: number of inner steps the task is meant to be trained for.
    """

    name: str
    length: int

    def init(self, rng: torch.Generator) -> tuple[Tensors, Tensors]:
        """Draws fresh initial ``(params, buffers)``, determined by ``rng`` alone."""
        ...

    def batches(self, rng: torch.Generator) -> Iterator[Batch]:
        """Yields training batches for ever, determined by ``rng`` alone."""
        ...

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        """Returns the scalar loss on one batch, a function of the arguments alone.

        May update ``buffers`` in place, as BatchNorm does. Noise (dropout masks, sampling) belongs in the batch: the
        global random state would make a recomputed step differ from the first one.
        """
        ...


class ModuleTask:
    """Makes a task of an ordinary ``nn.Module``.

    The modules that ``make_module`` returns only serve for their initial values and their forward pass; parameters
    and buffers are passed in at every call. Weights that are tied in the module are one entry of ``params`` and stay
    tied. Parameters with ``requires_grad=False`` are handed out among the buffers, so that nobody trains them.

    Args:
        make_module: builds the module. Called under a forked global random state seeded from ``rng``, so that
            ordinary ``nn.init`` is deterministic and the caller's random state is left as it was.
        make_batches: maps a generator to an endless iterator of training batches.
        loss_fn: ``loss_fn(module, batch) -> scalar``. ``module`` holds the parameters in question while
            ``loss_fn`` runs: call it, or any of its methods.
        name: what tables and error messages call the task.
        length: number of inner steps the task is meant to be trained for.
        eval_batch: a held-out batch, or a function without arguments that makes it at first use (so that no data
            is loaded before it is needed). Without it the task has no ``eval_loss`` (the attribute is ``None``).

    Not for use from several threads at once: they would swap tensors in and out of the same module.

    Example::

        task = ModuleTask(
            lambda: nn.Linear(8, 1),
            lambda rng: iter(lambda: torch.randn(32, 8, generator=rng), None),
            lambda module, x: (module(x) - x.sum(1, keepdim=True)).square().mean(),
        )
        params, buffers = task.init(torch.Generator().manual_seed(0))
    """

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        make_batches: BatchMaker,
        loss_fn: LossFn,
        *,
        name: str = "module",
        length: int = 200,
        eval_batch: Batch | Callable[[], Batch] | None = None,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1 inner step, got {length}")
        self.name = name
        self.length = length
        self._make_module = make_module
        self._make_batches = make_batches
        self._loss_fn = loss_fn
        self._eval_source = eval_batch
        self._eval_batches: dict[torch.device, Batch] = {}
        self._skeleton: _Skeleton | None = None
        self.eval_loss: Callable[[Tensors, Tensors], Tensor] | None = None if eval_batch is None else self._eval_loss

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, length={self.length})"

    def init(self, rng: torch.Generator) -> tuple[Tensors, Tensors]:
        """Returns new ``(params, buffers)`` as the module's own initialisation draws them, keyed as in state_dict."""
        module = self._build(draw_seed(rng))
        if any(isinstance(t, UninitializedParameter) for t in module.parameters()):
            raise TypeError(f"task {self.name!r}: make_module must return a module whose lazy layers are initialised")
        params = {k: p.detach().clone() for k, p in module.named_parameters() if p.requires_grad}
        buffers = {k: p.detach().clone() for k, p in module.named_parameters() if not p.requires_grad}
        buffers |= {k: b.detach().clone() for k, b in module.named_buffers()}
        return params, buffers

    def batches(self, rng: torch.Generator) -> Iterator[Batch]:
        """Yields training batches for ever."""
        return self._make_batches(rng)

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        """The scalar loss on ``batch``; updates ``buffers`` as the module does.

        Every layer is in the mode ``make_module`` left it in: training mode, unless ``.eval()`` was called on it.
        """
        return self._call(params, buffers, batch, training=True)

    def _eval_loss(self, params: Tensors, buffers: Tensors) -> Tensor:
        device = next(iter(params.values())).device
        if device not in self._eval_batches:
            if callable(self._eval_source):
                self._eval_source = self._eval_source()
            self._eval_batches[device] = to_device(self._eval_source, device)
        return self._call(params, dict(buffers), self._eval_batches[device], training=False)

    def _call(self, params: Tensors, buffers: Tensors, batch: Batch, *, training: bool) -> Tensor:
        skeleton = self._skeleton
        if skeleton is None:
            self._build(0)
            skeleton = cast(_Skeleton, self._skeleton)
        skeleton.set_mode(training)
        try:
            skeleton.put(params, buffers)
            loss = self._loss_fn(skeleton.module, batch)
            skeleton.collect(buffers)
        finally:
            skeleton.restore()
        return loss

    def _build(self, seed: int) -> nn.Module:
        with forked_global_rng(seed):
            module = self._make_module()
        if self._skeleton is None:
            self._skeleton = _Skeleton(module)
        return module


class _Skeleton:
    """A module whose tensors can be exchanged, tied ones wherever they stand.

    ``torch.func.functional_call`` does the same but looks every name up again at each call: 40 to 240 µs for small
    networks, a fair part of an inner step. Here they are looked up once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        names: dict[int, str] = {}
        # (name, the module's own dict, key in it, the tensor that was there)
        self.param_slots: list[tuple[str, dict, str, Tensor]] = []
        self.buffer_slots: list[tuple[str, dict, str, Tensor]] = []
        for path, child in module.named_modules():
            prefix = path + "." if path else ""
            for own in (child._parameters, child._buffers):
                for key, tensor in own.items():
                    if tensor is None:
                        continue
                    name = names.setdefault(id(tensor), prefix + key)
                    trained = own is child._parameters and tensor.requires_grad
                    (self.param_slots if trained else self.buffer_slots).append((name, own, key, tensor))
        # Recurrent layers keep a second list of their weights; left alone it would keep a whole unrolled graph alive.
        self.caches = [
            (vars(m), {k: vars(m)[k] for k in ("_flat_weights", "_flat_weight_refs") if k in vars(m)})
            for m in module.modules()
            if isinstance(m, nn.RNNBase)
        ]

        self.modes = [(m, m.training) for m in module.modules()]
        self.training = True

    def set_mode(self, training: bool) -> None:
        """Evaluation mode for all layers, or back to the mode each was made in."""
        if training is not self.training:
            for module, mode in self.modes:
                module.training = training and mode
            self.training = training

    def put(self, params: Tensors, buffers: Tensors) -> None:
        for name, own, key, _ in self.param_slots:
            own[key] = params[name]
        for name, own, key, _ in self.buffer_slots:
            own[key] = buffers[name]

    def collect(self, buffers: Tensors) -> None:
        """Buffers that the module replaced, rather than updated in place, go back to the caller too."""
        for name, own, key, _ in self.buffer_slots:
            buffers[name] = own[key]

    def restore(self) -> None:
        for _, own, key, tensor in self.param_slots:
            own[key] = tensor
        for _, own, key, tensor in self.buffer_slots:
            own[key] = tensor
        for own, cached in self.caches:
            own.update(cached)


@dataclass(frozen=True)
class TaskFamily:
    """A distribution over tasks, such as "multi-layer perceptrons on stroke images".

    Attributes:
        name: unique name in the zoo.
        description: one line.
        split: ``"train"`` for meta-training, ``"validation"`` for choosing between policies.
        sample: draws a task, determined by the generator alone.
    """

    name: str
    description: str
    split: Literal["train", "validation"]
    sample: Callable[[torch.Generator], Task]

    def task(self, seed: int) -> Task:
        """The task number ``seed`` of this family, named ``"<family>/<seed>"``.

        The same seed gives the same task whatever the global random state, which is left as it was.
        """
        # The name goes into the seed: otherwise the n-th tasks of all families would share their random choices.
        # Mixed by a 32-bit hash because torch's CPU generator looks at no more than the low 32 bits of a seed.
        rng = torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{seed}".encode()))
        task = self.sample(rng)
        task.name = f"{self.name}/{seed}"
        return task


def batches_of(task: Task, rng: torch.Generator, skip: int = 0) -> Iterator[Batch]:
    """The batches that ``task`` draws from ``rng``, from number ``skip`` on.

    Raises:
        ValueError: they came to an end.
    """
    count = 0
    for count, batch in enumerate(task.batches(rng), start=1):
        if count > skip:
            yield batch
    raise ValueError(f"batches() of task {task.name!r} ended after {count} batches; it must yield for ever")


def draw_seed(rng: torch.Generator) -> int:
    """Draws a seed for another generator from ``rng``, an int below 2^62."""
    return int(torch.randint(2**62, (), generator=rng, device=rng.device))


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs the body with torch on one thread: sums over several depend on their number, and times on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def forked_global_rng(seed: int) -> Iterator[None]:
    """Runs the body under torch's global random state seeded with ``seed``, and puts the old state back after it."""
    # Seeding CUDA where nobody uses it yet would be remembered and reseed it later.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(seed)
        yield


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Moves every tensor of a batch (a tensor, or a nest of tuples, lists and dicts) to ``device``."""
    return map_batch(lambda t: t.to(device), batch)


def batch_tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, in order, without its structure."""
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for part in parts for tensor in batch_tensors(part)]


def map_batch(fn: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Applies ``fn`` to every tensor of a batch and keeps its structure; other leaves stay as they are."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, dict):
        return {k: map_batch(fn, v) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_batch(fn, v) for v in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_batch(fn, v) for v in batch)
    return batch
