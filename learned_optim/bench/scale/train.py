"""One cell: the training run, which can be interrupted and goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.bench.runs import seconds_per_step
from learned_optim.bench.scale import images, text
from learned_optim.bench.scale.cells import EVALUATIONS, Cell, Result
from learned_optim.bench.scale.config import VOCABULARY, Model
from learned_optim.bench.scale.model import LanguageModel, next_token_loss
from learned_optim.bench.scale.rivals import build, set_rates
from learned_optim.policy.files import write_atomically
from learned_optim.policy.policy import Policy
from learned_optim.tasks.base import forked_global_rng, one_thread

#: Of the gradients' norm, for every optimizer.
CLIP_NORM = 1.0
#: Tokens or images of an evaluation; on a GPU, where they cost little, more.
HELD_OUT = {"text": {"cpu": 16_384, "cuda": 131_072}, "images": {"cpu": 512, "cuda": 4096}}
#: Seconds between two checkpoints of a run.
CHECKPOINT_EVERY = 120.0


@dataclasses.dataclass(eq=False)
class Problem:
    """What a model is trained on, with its data in memory.

    Args:
        device: ``cpu`` or ``cuda``.
        make: builds the network on the CPU, from torch's global random state.
        batch: a training batch on the device, determined by the generator alone.
        loss: mean loss of a network on a batch.
        held_out: batches on the device.
    """

    device: str
    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    held_out: list[Any]
    _compiled: tuple[nn.Module, Any] | None = None

    def network(self, seed: int) -> tuple[nn.Module, Any]:
        """A fresh network, and what is called in its stead; on GPUs one network for all runs, compiled once."""
        with forked_global_rng(seed):
            fresh = self.make()
        if self.device == "cpu":
            return fresh, fresh
        if self._compiled is None:
            network = self.make().to(self.device)
            self._compiled = network, torch.compile(network, dynamic=False)
        network, run = self._compiled
        network.load_state_dict(fresh.state_dict())
        network.zero_grad()
        return network, run


def problem(model: Model, device: str, corpus: text.Corpus | None) -> Problem:
    """The model's line, with its data in memory.

    Raises:
        ValueError: a language model without a corpus.
    """
    count = HELD_OUT[model.line][device]
    if model.line == "images":

        def moved(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return batch[0].to(device), batch[1].to(device)

        x, y = moved(images.held_out(count))
        chunks = list(zip(x.split(model.batch), y.split(model.batch), strict=True))
        return Problem(
            device, lambda: images.network(model), lambda rng: moved(images.batch(model, rng)), images.loss, chunks
        )
    if corpus is None:
        raise ValueError(f"{model.name} needs a corpus")
    tokens = text.as_tensor(corpus.train, device)
    rows = text.held_out_rows(corpus, model, count // model.context).to(device)
    return Problem(
        device, lambda: LanguageModel(VOCABULARY, model.context, model.depth, model.width, heads=model.depth),
        lambda rng: text.batch(tokens, model, rng), next_token_loss, list(rows.split(model.batch)),
    )  # fmt: skip


def evaluation_steps(steps: int) -> list[int]:
    """Steps after which held-out losses are taken: 0, and then at equal distances to the end."""
    return sorted({round(steps * i / EVALUATIONS) for i in range(EVALUATIONS + 1)})


class _Clock:
    """Times of each step's gradient and update: of the processor, or of the GPU, which is not waited for."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: list[Any] = []
        self.steps: list[tuple[float, float]] = []  #: seconds of the whole step and of its update

    def mark(self) -> None:
        """Before a step, between gradient and update, and after it."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.process_time())

    def collect(self) -> None:
        """Once the GPU is known to be through."""
        for i in range(0, len(self._marks), 3):
            a, b, c = self._marks[i : i + 3]
            whole, update = (1e-3 * a.elapsed_time(c), 1e-3 * b.elapsed_time(c)) if self._cuda else (c - a, c - b)
            self.steps.append((whole, update))
        self._marks = []


def train(
    cell: Cell, problem: Problem, policy: Policy | None, checkpoint: Path, deadline: float = math.inf
) -> Result | None:
    """Make a run. The initial parameters and the batches of a seed are the same for every setting.

    Args:
        cell: which one.
        problem: of its model.
        policy: of a learned setting.
        checkpoint: file that the unfinished run is kept in; a run goes on from it, with the same losses, and removes
            it at its end.
        deadline: of ``time.monotonic()``; a run that comes to an evaluation after it is kept and left.

    Returns:
        The result, or ``None`` if the deadline came first.
    """
    seed, steps, device = zlib.crc32(f"scale/{cell.model.name}/{cell.seed}".encode()), cell.steps, cell.device
    with one_thread() if device == "cpu" else contextlib.nullcontext():
        network, run = problem.network(seed)
        optimizers = build(cell.setting, network, policy)
        rates = [[float(group["lr"]) for group in o.param_groups] for o in optimizers]
        clock, held_out, losses, first = _Clock(device), [], [], 0
        if checkpoint.is_file():
            state = torch.load(checkpoint, map_location=device, weights_only=True)
            network.load_state_dict(state["network"])
            for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(own)
            first, held_out, losses, clock.steps = (state[k] for k in ("step", "held_out", "losses", "clock"))
        at, total, saved = evaluation_steps(steps), torch.zeros((), device=device), time.monotonic()
        for step in range(first, steps + 1):
            if step in at[len(held_out) :]:
                held_out.append(_evaluate(run, problem, device))  # waits for the GPU
                clock.collect()
                if step:
                    losses.append(float(total) / (step - at[len(held_out) - 2]))
                    total.zero_()
                if not math.isfinite(held_out[-1]) or (losses and not math.isfinite(losses[-1])) or step == steps:
                    break
                now = time.monotonic()
                if now > min(deadline, saved + CHECKPOINT_EVERY):
                    _save(checkpoint, network, optimizers, step, held_out, losses, clock.steps)
                    saved = time.monotonic()
                    if now > deadline:
                        return None
            batch = problem.batch(torch.Generator().manual_seed(seed + 1 + step))
            set_rates(optimizers, rates, cell.setting.factor(step / steps))
            clock.mark()
            with _autocast(device):
                loss = problem.loss(run, batch)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
            clock.mark()
            for optimizer in optimizers:
                optimizer.step()
            clock.mark()
            total += loss.detach()
    whole, update = seconds_per_step(np.array(clock.steps))
    checkpoint.unlink(missing_ok=True)
    return Result(
        cell, np.array(at, dtype=float), _filled(held_out, len(at)), _filled(losses, len(at) - 1), float(whole),
        float(update), _facts(device),
    )  # fmt: skip


@torch.no_grad()
def _evaluate(run: Any, problem: Problem, device: str) -> float:
    with _autocast(device):
        losses = [problem.loss(run, batch) * len(batch[0]) for batch in problem.held_out]
    return float(torch.stack(losses).sum()) / sum(len(batch[0]) for batch in problem.held_out)


def _autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def _filled(values: list[float], length: int) -> np.ndarray:
    """With ``inf`` from the first value that is not finite to the end."""
    array = np.full(length, math.inf)
    array[: len(values)] = values
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        array[bad[0] :] = math.inf
    return array


def _facts(device: str) -> dict[str, str]:
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    return {**facts, "gpu": torch.cuda.get_device_name()} if device == "cuda" else facts


def _save(path: Path, network: nn.Module, optimizers: Any, step: int, *rest: Any) -> None:
    buffer = io.BytesIO()
    held_out, losses, clock = rest
    torch.save({
        "network": network.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
        "held_out": held_out, "losses": losses, "clock": clock,
    }, buffer)  # fmt: skip
    write_atomically(path, buffer.getvalue())
