"""Validation families on letters and photographs: larger and longer than what is trained on, other data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..base import Task, TaskFamily
from ..data_images import preprocess
from ..data_optional import PHOTO_QUESTIONS, letters, photo_patches
from ..nets import VisionTransformer, convnet, mlp, random_style, residual_convnet
from ..sampling import Data, choice, integer, log_int, run_length, spawn, split
from .vision import autoencoder_task, classifier, hidden_widths, images_only, mlp_work, vae_task, vit_work


def letter_data(
    rng: torch.Generator, n: int, classes: int, how: str, colour: bool = False
) -> Callable[[], tuple[Data, Data]]:
    """A loader of ``(training, held-out)`` images of letters and their labels."""
    make_rng = spawn(rng)

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        images, labels = letters(data_rng, n, classes, colour)
        return split((preprocess(images, how), labels), data_rng)

    return load


def photo_data(rng: torch.Generator, n: int, size: int, question: str) -> Callable[[], tuple[Data, Data]]:
    """A loader of ``(training, held-out)`` patches of photographs, standardised, and their labels."""
    make_rng = spawn(rng)

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        images, labels = photo_patches(data_rng, n, size, question, held_out=False)
        unseen, unseen_labels = photo_patches(data_rng, min(512, n // 4), size, question, held_out=True)
        return (
            (preprocess(images, "standardised"), labels),
            (preprocess(unseen, "standardised", reference=images), unseen_labels),
        )

    return load


def val_mlp_letters(rng: torch.Generator) -> Task:
    classes, batch_size = choice(rng, (26, 52)), log_int(rng, 32, 256)
    style = random_style(rng, norms=("none", "layer"))
    widths = [784, *hidden_widths(rng, 128, 640, (1, 4)), classes]
    load = letter_data(rng, log_int(rng, 3000, 8000), classes, choice(rng, ("raw", "raw", "standardised")))
    length = run_length(rng, 600, 2000, batch_size * mlp_work(widths), seconds=10.0)
    return classifier(lambda: mlp(widths, style), style, load, batch_size, length)


def val_conv_letters(rng: torch.Generator) -> Task:
    classes, style = choice(rng, (26, 52)), random_style(rng, norms=("none", "batch", "layer"))
    channels = [log_int(rng, 16, 32) * 2**i for i in range(3)]
    load = letter_data(rng, 4000, classes, choice(rng, ("raw", "standardised")))
    length, batch_size = run_length(rng, 500, 1500), log_int(rng, 16, 64)
    return classifier(lambda: convnet(1, channels, classes, style), style, load, batch_size, length)


def val_vit_letters(rng: torch.Generator) -> Task:
    classes, style = choice(rng, (10, 26)), random_style(rng, norms=("layer",), inits=("default",))
    patch, width, depth, heads = choice(rng, (4, 7, 7)), choice(rng, (64, 96)), integer(rng, 2, 4), 4
    load = letter_data(rng, 4000, classes, "standardised", colour=True)
    work = vit_work(28, patch, depth, width)
    batch_size = log_int(rng, 16, 32)
    length = run_length(rng, 500, 1200, batch_size * work, seconds=8.0)
    return classifier(
        lambda: VisionTransformer((3, 28), patch, width, depth, heads, classes, style), style, load, batch_size, length
    )


def val_resnet_photos(rng: torch.Generator) -> Task:
    style, question = random_style(rng, norms=("batch",), inits=("default",)), choice(rng, PHOTO_QUESTIONS)
    size, blocks = choice(rng, (16, 20, 24)), integer(rng, 1, 2)
    channels = [log_int(rng, 16, 24) * 2**i for i in range(3)]
    load = photo_data(rng, 3000, size, question)
    length, batch_size = run_length(rng, 300, 600), log_int(rng, 16, 48)
    return classifier(lambda: residual_convnet(3, channels, 8, style, blocks), style, load, batch_size, length)


def val_vae_letters(rng: torch.Generator) -> Task:
    load = images_only(letter_data(rng, 5000, 52, "raw"))
    return vae_task(rng, load, 784, hidden_widths(rng, 128, 384, (1, 2)), log_int(rng, 8, 48), seconds=10.0)


def val_autoencoder_photos(rng: torch.Generator) -> Task:
    size, code, batch_size = integer(rng, 10, 16), log_int(rng, 16, 64), log_int(rng, 32, 128)
    style = random_style(rng, norms=("none", "layer"), inits=("default", "xavier"), residual=0.0)
    hidden = hidden_widths(rng, 128, 384, (1, 3))
    load = images_only(photo_data(rng, 4000, size, "place"))
    return autoencoder_task(rng, load, [3 * size * size, *hidden, code], style, batch_size, (400, 1500), seconds=10.0)


FAMILIES = (
    TaskFamily("val_mlp_letters", "wide perceptrons on 28 x 28 letters, mostly raw", "validation", val_mlp_letters),
    TaskFamily("val_conv_letters", "convolutional networks on letters", "validation", val_conv_letters),
    TaskFamily("val_vit_letters", "vision transformers on letters in colour", "validation", val_vit_letters),
    TaskFamily("val_resnet_photos", "residual BatchNorm networks on photographs", "validation", val_resnet_photos),
    TaskFamily("val_vae_letters", "variational autoencoders of letters", "validation", val_vae_letters),
    TaskFamily("val_autoencoder_photos", "autoencoders of photo patches", "validation", val_autoencoder_photos),
)
