"""Random changes of a task that an optimizer should cope with; each is a task made of a task.

Augmentations widen a zoo without new data: the same network with other parameter scales, noisier gradients, frozen
layers or drifting inputs is another training problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .base import Batch, Task, Tensors, batch_tensors, batches_of, draw_seed, map_batch
from .sampling import chance, choice, integer, log_uniform, uniform


class Augmented:
    """Passes everything on to ``task``; the augmentations override what they change.

    ``eval_loss`` is there if the task has one; otherwise it is ``None``.
    """

    label = "augmented"

    def __init__(self, task: Task) -> None:
        self.task = task
        self.name = f"{task.name}+{self.label}"
        self.length = task.length
        has_eval = getattr(task, "eval_loss", None) is not None
        self.eval_loss: Callable[[Tensors, Tensors], Tensor] | None = self._eval_loss if has_eval else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.task!r})"

    def init(self, rng: torch.Generator) -> tuple[Tensors, Tensors]:
        return self.task.init(rng)

    def batches(self, rng: torch.Generator) -> Iterator[Batch]:
        return self.task.batches(rng)

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        return self.task.loss(params, buffers, batch)

    def _eval_loss(self, params: Tensors, buffers: Tensors) -> Tensor:
        return self.task.eval_loss(params, buffers)  # type: ignore[attr-defined]


class RescaledParameters(Augmented):
    """Trains ``w' = w / c`` in place of ``w``, with a factor ``c`` for each tensor: same function, other step sizes.

    Args:
        task: the task to change.
        rng: source of the factors, log-uniform between ``1 / spread`` and ``spread``.
        spread: at least 1; default 10.
    """

    label = "rescaled"

    def __init__(self, task: Task, rng: torch.Generator, spread: float = 10.0) -> None:
        super().__init__(task)
        self.seed = draw_seed(rng)
        self.spread = spread
        self.factors: dict[str, float] = {}

    def init(self, rng: torch.Generator) -> tuple[Tensors, Tensors]:
        params, buffers = self.task.init(rng)
        return {k: p / c for (k, p), c in zip(params.items(), self._factors(params), strict=True)}, buffers

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        return self.task.loss(self._original(params), buffers, batch)

    def _eval_loss(self, params: Tensors, buffers: Tensors) -> Tensor:
        return super()._eval_loss(self._original(params), buffers)

    def _original(self, params: Tensors) -> Tensors:
        return {k: p * c for (k, p), c in zip(params.items(), self._factors(params), strict=True)}

    def _factors(self, params: Tensors) -> list[float]:
        if not self.factors:
            factor_rng = torch.Generator().manual_seed(self.seed)
            self.factors = {k: log_uniform(factor_rng, 1 / self.spread, self.spread) for k in sorted(params)}
        return [self.factors[k] for k in params]


class ScaledLoss(Augmented):
    """The training loss times a constant; ``eval_loss`` keeps its unit."""

    label = "scaled"

    def __init__(self, task: Task, factor: float) -> None:
        super().__init__(task)
        self.factor = factor

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        return self.factor * self.task.loss(params, buffers, batch)


class NoisyGradients(Augmented):
    """Adds white noise to the gradients; the value of the loss stays as it is.

    Args:
        task: the task to change.
        level: deviation of the noise in units of each tensor's rms gradient at a fixed initial point.
    """

    label = "noisy"

    def __init__(self, task: Task, level: float) -> None:
        super().__init__(task)
        self.level = level
        self._scales: dict[str, tuple[float, torch.Size]] = {}

    def batches(self, rng: torch.Generator) -> Iterator[Batch]:
        noise_rng = torch.Generator().manual_seed(draw_seed(rng))
        for batch in self.task.batches(rng):
            scales = self._reference().items()
            yield batch, {k: scale * torch.randn(shape, generator=noise_rng) for k, (scale, shape) in scales}

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        inner, noise = batch
        # <noise, p> without its value: what is reported stays the task's own loss.
        push = sum((noise[k] * (p - p.detach())).sum() for k, p in params.items())
        return self.task.loss(params, buffers, inner) + push

    def _reference(self) -> dict[str, tuple[float, torch.Size]]:
        if not self._scales:
            params, buffers = self.task.init(torch.Generator().manual_seed(0))
            leaves = {k: p.requires_grad_() for k, p in params.items()}
            with torch.enable_grad():
                loss = self.task.loss(leaves, buffers, next(batches_of(self.task, torch.Generator().manual_seed(0))))
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for (key, p), g in zip(leaves.items(), grads, strict=True):
                rms = 0.0 if g is None or not g.numel() else float(g.square().mean().sqrt())
                self._scales[key] = (self.level * rms, p.shape)
        return self._scales


def repeated_rows(batch: Batch, share: float) -> Batch:
    """The first ``share`` of a batch's rows (at least 4), repeated up to its size.

    A mean over its rows is that over the smaller batch, up to the last, incomplete repetition; its shape is that of
    every other batch, so that runs can be vectorized.
    """
    return map_batch(lambda t: t[torch.arange(len(t)) % min(len(t), max(4, round(share * len(t))))], batch)


class BatchSizeJumps(Augmented):
    """Every ``period`` steps draws another share of the batch, from all of it down to ``1 / 8``."""

    label = "jumps"

    def __init__(self, task: Task, period: int) -> None:
        super().__init__(task)
        self.period = period

    def batches(self, rng: torch.Generator) -> Iterator[Batch]:
        jump_rng = torch.Generator().manual_seed(draw_seed(rng))
        share = 1.0
        for step, batch in enumerate(self.task.batches(rng)):
            if step % self.period == 0:
                share = log_uniform(jump_rng, 1 / 8, 1.0)
            yield repeated_rows(batch, share)


class GrowingBatches(Augmented):
    """Batches of an eighth of the rows at first, doubled after each quarter of the run."""

    label = "growing"

    def batches(self, rng: torch.Generator) -> Iterator[Batch]:
        for step, batch in enumerate(self.task.batches(rng)):
            yield repeated_rows(batch, 2.0 ** min(0, 4 * step // self.length - 3))


class AccumulatedGradients(Augmented):
    """Steps on the mean loss of ``count`` batches in turn."""

    label = "accumulated"

    def __init__(self, task: Task, count: int) -> None:
        super().__init__(task)
        self.count = count

    def batches(self, rng: torch.Generator) -> Iterator[Batch]:
        batches = batches_of(self.task, rng)
        while True:
            yield [next(batches) for _ in range(self.count)]

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        return torch.stack([self.task.loss(params, buffers, one) for one in batch]).mean()


class NoisyLabels(Augmented):
    """Exchanges the labels of a random part of each batch ``(inputs, labels)`` among themselves."""

    label = "mislabelled"

    def __init__(self, task: Task, fraction: float) -> None:
        super().__init__(task)
        self.fraction = fraction

    def batches(self, rng: torch.Generator) -> Iterator[Batch]:
        noise_rng = torch.Generator().manual_seed(draw_seed(rng))
        for inputs, labels in self.task.batches(rng):
            wrong = (torch.rand(len(labels), generator=noise_rng) < self.fraction).nonzero().squeeze(1)
            labels = labels.clone()
            labels[wrong] = labels[wrong[torch.randperm(len(wrong), generator=noise_rng)]]
            yield inputs, labels


class DriftingInputs(Augmented):
    """Multiplies the inputs of batches ``(inputs, ...)`` by a gain that wanders slowly: non-stationary data.

    Args:
        task: the task to change.
        depth: largest deviation of the log gain.
        period: inner steps after which the gain comes back.
    """

    label = "drifting"

    def __init__(self, task: Task, depth: float, period: float) -> None:
        super().__init__(task)
        self.depth = depth
        self.period = period

    def batches(self, rng: torch.Generator) -> Iterator[Batch]:
        for step, (inputs, *rest) in enumerate(self.task.batches(rng)):
            gain = math.exp(self.depth * math.sin(2 * math.pi * step / self.period))
            yield (inputs * gain, *rest)


class FrozenTensors(Augmented):
    """Keeps a random part of the parameters at their initial values, as in fine-tuning; they move to the buffers."""

    label = "frozen"
    prefix = "frozen:"

    def __init__(self, task: Task, rng: torch.Generator, probability: float = 0.3) -> None:
        super().__init__(task)
        self.seed = draw_seed(rng)
        self.probability = probability

    def init(self, rng: torch.Generator) -> tuple[Tensors, Tensors]:
        params, buffers = self.task.init(rng)
        pick_rng = torch.Generator().manual_seed(self.seed)
        frozen = {k for k in sorted(params) if chance(pick_rng, self.probability)}
        # At least the largest tensor stays trainable.
        frozen.discard(max(params, key=lambda k: params[k].numel()))
        return (
            {k: p for k, p in params.items() if k not in frozen},
            buffers | {self.prefix + k: params[k] for k in params if k in frozen},
        )

    def loss(self, params: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        inner, frozen = self._parted(buffers)
        loss = self.task.loss(params | frozen, inner, batch)
        buffers.update(inner)  # buffers that the task replaced rather than updated in place
        return loss

    def _eval_loss(self, params: Tensors, buffers: Tensors) -> Tensor:
        inner, frozen = self._parted(buffers)
        return super()._eval_loss(params | frozen, inner)

    def _parted(self, buffers: Tensors) -> tuple[Tensors, Tensors]:
        cut = len(self.prefix)
        inner = {k: b for k, b in buffers.items() if not k.startswith(self.prefix)}
        return inner, {k[cut:]: b for k, b in buffers.items() if k.startswith(self.prefix)}


def augment(task: Task, rng: torch.Generator) -> Task:
    """Applies a random selection of the augmentations that fit ``task``, on average about two.

    Draws one batch of ``task`` to see what fits: label noise needs ``(inputs, integer labels)``, drift needs
    floating-point inputs, batches of varying size need tensors of at least 32 rows. The outcome depends on ``rng``
    and on the task alone.

    Returns:
        A task whose name says what was applied, e.g. ``"mlp_images/3+rescaled+noisy"``; perhaps ``task`` itself.
    """
    batch = next(batches_of(task, torch.Generator().manual_seed(0)))
    pair = isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)
    rows = {len(t) if t.dim() else 0 for t in batch_tensors(batch)}

    # Every number is drawn whether it is used or not, so that the choices for one task do not shift the next one's.
    jump, mislabel, drift, rescale, freeze, noise, scale = (chance(rng, 0.3) for _ in range(7))
    period, fraction = integer(rng, 10, 100), choice(rng, (0.05, 0.1, 0.2, 0.4))
    depth, cycle = uniform(rng, 0.2, 1.0), task.length * uniform(rng, 0.2, 2.0)
    level, factor, spread = log_uniform(rng, 0.1, 3.0), log_uniform(rng, 1e-3, 1e3), choice(rng, (3.0, 10.0, 100.0))
    seeds = torch.Generator().manual_seed(draw_seed(rng))
    grow, accumulate = chance(rng, 0.1), chance(rng, 0.1)

    if mislabel and pair and batch[1].dtype == torch.int64 and batch[1].dim() == 1 and len(batch[0]) == len(batch[1]):
        task = NoisyLabels(task, fraction)
    if drift and isinstance(batch, tuple) and isinstance(batch[0], Tensor) and batch[0].is_floating_point():
        task = DriftingInputs(task, depth, cycle)
    if len(rows) == 1 and min(rows) >= 32:
        if jump:
            task = BatchSizeJumps(task, period)
        elif grow:
            task = GrowingBatches(task)
    if accumulate:
        task = AccumulatedGradients(task, 2)
    if freeze:
        task = FrozenTensors(task, seeds)
    if rescale:
        task = RescaledParameters(task, seeds, spread)
    if noise:
        task = NoisyGradients(task, level)
    if scale:
        task = ScaledLoss(task, factor)
    return task
