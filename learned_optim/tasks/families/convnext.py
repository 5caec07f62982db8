"""Training family of depthwise convolutions with layer scale, on augmented images."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import ModuleTask, Task, TaskFamily
from ..data_images import preprocess, shapes, textures
from ..image_views import draw_augmentation
from ..nets import ACTIVATIONS, Residual
from ..objectives import classification
from ..sampling import (
    Data,
    chance,
    choice,
    dataset_batches,
    integer,
    log_int,
    log_uniform,
    run_length,
    spawn,
    split,
    uniform,
)


class Permuted(nn.Module):
    """Applies a layer of ``[..., channels]`` to ``[batch, channels, height, width]``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalMean(nn.Module):
    """``[batch, channels, height, width]`` to ``[batch, channels]``.

    ``nn.AdaptiveAvgPool2d`` does the same, but not under ``torch.func.vmap`` where permutations leave channels last.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class LayerScale(nn.Module):
    """One factor per channel, small at first, so that a block begins as nearly the identity (Touvron et al. 2021)."""

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def convnext(
    channels: int, widths: Sequence[int], depth: int, outputs: int, *, patch: int, kernel: int, expansion: int,
    activation: type[nn.Module], scale: float | None,
) -> nn.Sequential:  # fmt: skip
    """``[batch, channels, *size]`` to ``[batch, outputs]``, after ConvNeXt (Liu et al. 2022).

    Args:
        channels: of the images.
        widths: of the stages; between two of them a strided convolution halves the size.
        depth: blocks per stage: depthwise convolution, LayerNorm, two linear layers, layer scale.
        outputs: of the head.
        patch: side of the patches that the first layer reads.
        kernel: side of the depthwise filters, odd.
        expansion: width of a block's hidden layer in units of its own.
        activation: of the hidden layer.
        scale: initial layer scale; without it there is none.
    """

    def block(width: int) -> nn.Module:
        layers = [nn.LayerNorm(width), nn.Linear(width, expansion * width), activation()]
        layers.append(nn.Linear(expansion * width, width))
        if scale is not None:
            layers.append(LayerScale(width, scale))
        depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        return Residual(nn.Sequential(depthwise, Permuted(*layers)))

    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], patch, stride=patch), Permuted(nn.LayerNorm(widths[0]))]
    for i, width in enumerate(widths):
        if i:
            layers += [Permuted(nn.LayerNorm(widths[i - 1])), nn.Conv2d(widths[i - 1], width, 2, stride=2)]
        layers += [block(width) for _ in range(depth)]
    head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], outputs)
    return nn.Sequential(*layers, GlobalMean(), *head)


def convnext_images(rng: torch.Generator) -> Task:
    """Pictures in random crops, mirrored, noisy and blended with one another, with soft labels: a modern recipe.

    The loss is far above zero all along: blends (mixup, Zhang et al. 2018) and smoothed labels leave a part of it
    whatever is learned, and no picture comes twice alike. The held-out ones are as they are.
    """
    source, colours, classes = choice(rng, (textures, shapes, shapes)), choice(rng, (1, 3)), integer(rng, 10, 60)
    patch, size, n, make_rng = choice(rng, (2, 2, 4)), 8 * integer(rng, 2, 3), log_int(rng, 2000, 6000), spawn(rng)
    width, stages, depth = 4 * log_int(rng, 3, 10), integer(rng, 1, 3 if patch == 2 else 2), integer(rng, 1, 3)
    scale = None if chance(rng, 0.15) else log_uniform(rng, 1e-6, 1e-1)
    make = functools.partial(
        convnext, colours, [width * 2**i for i in range(stages)], depth, classes,
        patch=patch, kernel=choice(rng, (3, 5, 7)), expansion=choice(rng, (2, 3, 4)),
        activation=choice(rng, list(ACTIVATIONS.values())), scale=scale,
    )  # fmt: skip
    change, smoothing = draw_augmentation(rng, size, 0.7), choice(rng, (0.0, 0.1, 0.2))
    blend, batch_size = uniform(rng, 0.1, 1.0) if chance(rng, 0.6) else 0.0, log_int(rng, 12, 48)
    positions = (size // patch) ** 2
    work = batch_size * positions * depth * stages * (8 * width**2 + 400 * width)  # depthwise filters are slow

    @functools.cache
    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        images, labels = source(data_rng, n, classes, size=size, channels=colours)
        return split((preprocess(images, "standardised"), labels), data_rng, held_out=512 / n)

    def soft(labels: Tensor) -> Tensor:
        return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes

    def batches(batch_rng: torch.Generator) -> Iterator[Data]:
        for images, labels in dataset_batches(load()[0], batch_size, batch_rng):
            images, targets = change(images, batch_rng), soft(labels)
            if blend:
                # A draw from Beta(1, 1) to the power that favours one of the two, as Beta(blend, blend) does.
                share = 0.5 * torch.rand(len(images), 1, generator=batch_rng) ** (1 / blend)
                partner = torch.randperm(len(images), generator=batch_rng)
                targets = (1 - share) * targets + share * targets[partner]
                share = share[:, :, None, None]
                images = (1 - share) * images + share * images[partner]
            yield images, targets

    def held_out() -> Data:
        images, labels = load()[1]
        return images, soft(labels)

    return ModuleTask(
        make, batches, classification, length=run_length(rng, 300, 700, work, seconds=3.0), eval_batch=held_out
    )


FAMILIES = (
    TaskFamily("convnext_images", "depthwise convolutions, layer scale, augmented images", "train", convnext_images),
)
