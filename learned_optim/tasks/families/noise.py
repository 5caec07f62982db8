"""Training families with more noise than signal: those that begin at their solution, and those that begin near it.

What one batch says of the loss is mostly noise there as well. So these tasks have the gradient of the loss on noisy
labels, and for a value its expectation over the labels, given the inputs: the error to the noise-free targets plus
the noise's variance, or the cross-entropy to the true probabilities. Neither falls below the noise's own level.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ..base import ModuleTask, Task, TaskFamily, forked_global_rng
from ..nets import initialise, mlp, random_style
from ..objectives import with_value
from ..sampling import chance, choice, integer, log_int, log_uniform, run_length, spawn, uniform
from .vision import hidden_widths, mlp_work

Batch = dict[str, Tensor]


def _solution_task(rng: torch.Generator, distance: float, noise: float, pull: bool, lengths: tuple[int, int]) -> Task:
    """A run that begins near a solution: a network that gives its own noise-free targets when it begins.

    Args:
        rng: source of all else.
        distance: of the first weights from the solution's, each tensor's in units of its own rms.
        noise: deviation of the labels' noise over that of the targets; of classes, the inverse scale of the logits.
        pull: whether gradients lead back to the solution; otherwise they are those of random errors at the output.
        lengths: fewest and most steps.
    """
    classes, linear, make_rng = pull and chance(rng, 0.4), chance(rng, 0.3), spawn(rng)
    inputs, outputs = log_int(rng, 50, 250), integer(rng, 3, 20) if classes else log_int(rng, 1, 8)
    style, spread = random_style(rng, norms=("none", "none", "layer", "rms")), uniform(rng, 0.0, 1.2)
    hidden = hidden_widths(rng, 32, 256, (1, 3))
    widths = [inputs, *([] if linear else hidden), outputs]
    batch_size = log_int(rng, 4, 64)
    length = run_length(rng, *lengths, 2 * batch_size * mlp_work(widths), seconds=4.0)
    # Unequal inputs, mixed: a problem of one curvature along all directions would be solved at once.
    make_held_out_rng, data_rng = spawn(rng), spawn(rng)()
    columns = (spread * torch.randn(inputs, generator=data_rng)).exp()
    mixing = columns[:, None] * torch.linalg.qr(torch.randn(inputs, inputs, generator=data_rng)).Q
    mixing = mixing / columns.square().mean().sqrt()

    @functools.cache
    def solution() -> nn.Module:
        with forked_global_rng(make_rng().initial_seed()):
            network: Any = initialise(mlp(widths, style), style)
            with torch.no_grad():
                last = network[-1]
                if style.init == "zero_output":
                    nn.init.xavier_uniform_(last.weight)
                y = network(torch.randn(1024, inputs) @ mixing)
                scale = (1 / noise if classes else 1.0) / y.std()
                last.weight.mul_(scale)
                last.bias.mul_(scale)
        return network

    def network() -> nn.Module:
        module = mlp(widths, style)
        module.load_state_dict(solution().state_dict())
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p) * distance * p.square().mean().sqrt())
        return module

    @torch.no_grad()
    def draw(batch_rng: torch.Generator, n: int) -> Batch:
        x = torch.randn(n, inputs, generator=batch_rng) @ mixing
        clean = solution()(x)
        if classes:
            clean = clean.softmax(1)
            return {"inputs": x, "clean": clean, "labels": clean.multinomial(1, generator=batch_rng).squeeze(1)}
        return {"inputs": x, "clean": clean, "errors": noise * torch.randn(clean.shape, generator=batch_rng)}

    def batches(batch_rng: torch.Generator) -> Iterator[Batch]:
        while True:
            yield draw(batch_rng, batch_size)

    def loss(module: Any, batch: Batch) -> Tensor:
        y, clean = module(batch["inputs"]), batch["clean"]
        if classes:
            return with_value(cross_entropy(y, batch["labels"]), cross_entropy(y, clean))
        noisy = mse_loss(y, clean + batch["errors"]) if pull else 2 * (y * batch["errors"]).mean()
        return with_value(noisy, mse_loss(y, clean) + noise**2)

    return ModuleTask(network, batches, loss, length=length, eval_batch=lambda: draw(make_held_out_rng(), 512))


def pure_noise(rng: torch.Generator) -> Task:
    """The first weights are the solution: all that a step does is harm.

    Labels are noisy, and gradients lead back when the weights have left; or they are those of random errors at the
    network's output, and never do. So it is at the end of fine-tuning, with rewards that depend on nothing, or with
    labels that do not follow from the inputs. What counts is how little the weights are moved by noise.
    """
    return _solution_task(rng, 0.0, log_uniform(rng, 0.3, 2.0), chance(rng, 0.6), (200, 600))


def noise_after_convergence(rng: torch.Generator) -> Task:
    """A linear model or a small network near the end of its training, on small batches with noisy labels.

    The first weights are the solution's with a little noise on them. What is left to gain is small beside the noise
    of a batch, except where the noise is low: steps have to be small, and long averages pay.
    """
    noise = log_uniform(rng, 0.1, 1.5)
    return _solution_task(rng, choice(rng, (0.2, 0.4, 0.7)), noise, True, (300, 800))


FAMILIES = (
    TaskFamily("pure_noise", "networks that begin at their solution, under noise", "train", pure_noise),
    TaskFamily(
        "noise_after_convergence", "networks near their solution, small noisy batches", "train", noise_after_convergence
    ),
)
