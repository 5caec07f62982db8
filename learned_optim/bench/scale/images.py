"""The images: outlines made by formula, as training families have them, and the ConvNeXts that tell them apart."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.bench.scale.config import CLASSES, Model
from learned_optim.tasks.data_images import preprocess, shapes
from learned_optim.tasks.families.convnext import convnext
from learned_optim.tasks.image_views import Augmentation

SIZE = 24
IMAGES = 60_000
HELD_OUT = 4096
_VIEWS = Augmentation(shift=3, flip=True, jitter=0.2, noise=0.2)


@functools.cache
def data(images: int = IMAGES, held_out: int = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Images ``[n, 3, 24, 24]`` and labels ``[n]``, the held-out ones first. The same for every run."""
    pictures, labels = shapes(torch.Generator().manual_seed(28), images + held_out, CLASSES, SIZE, channels=3)
    return preprocess(pictures, "standardised"), labels


def batch(model: Model, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A training batch, drawn with replacement; cropped, mirrored, with other contrast and noise."""
    images, labels = data()
    index = torch.randint(HELD_OUT, len(images), (model.batch,), generator=rng)
    return _VIEWS(images[index], rng), labels[index]


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of those that nothing is trained on, as they are."""
    images, labels = data()
    return images[: min(count, HELD_OUT)], labels[: min(count, HELD_OUT)]


def network(model: Model) -> nn.Module:
    """A ConvNeXt of three stages."""
    widths = [model.width * 2**i for i in range(3)]
    return convnext(
        3, widths, model.depth, CLASSES, patch=2, kernel=5, expansion=4, activation=nn.GELU, scale=1e-2
    )  # fmt: skip


def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy in nats per image."""
    images, labels = batch
    return F.cross_entropy(network(images).float(), labels)
