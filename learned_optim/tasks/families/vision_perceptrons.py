"""Training families of perceptrons on images and signals made by formula."""

from __future__ import annotations

import torch

from ..base import Task, TaskFamily
from ..data_images import IMAGE_SOURCES
from ..nets import initialise, mlp, random_style
from ..objectives import classification
from ..sampling import Data, chance, choice, dataset_task, integer, log_int, run_length, spawn, uniform
from .vision import (
    PREPROCESSING,
    classifier,
    hidden_widths,
    image_data,
    mlp_work,
    noisy_view,
    signal_data,
    sparse_view,
)


def mlp_images(rng: torch.Generator) -> Task:
    size, channels, classes = integer(rng, 8, 20), choice(rng, (1, 1, 3)), integer(rng, 4, 20)
    style, batch_size = random_style(rng), log_int(rng, 8, 256)
    widths = [channels * size * size, *hidden_widths(rng, 16, 256, (1, 4)), classes]
    source, n = choice(rng, ("textures", "shapes")), log_int(rng, 600, 3000)
    load = image_data(rng, source, n, classes, choice(rng, PREPROCESSING), size=size, channels=channels)
    length = run_length(rng, 200, 800, batch_size * mlp_work(widths))
    return classifier(lambda: mlp(widths, style), style, load, batch_size, length, noisy_view(rng, size))


def mlp_sparse_images(rng: torch.Generator) -> Task:
    size = 28 if chance(rng, 0.75) else integer(rng, 36, 54)
    classes, style, batch_size = integer(rng, 5, 30), random_style(rng), log_int(rng, 8, 128)
    widths = [size * size, *hidden_widths(rng, 32, 400 if size == 28 else 160, (1, 3)), classes]
    # Raw pixels most of the time: they are what users feed, and dead inputs only stay dead without centring.
    how = choice(rng, ("raw", "raw", "raw", "standardised", "per_pixel"))
    source, n = choice(rng, ("strokes", "strokes", "blobs")), log_int(rng, 600, 2500)
    load = image_data(rng, source, n, classes, how, size=size)
    length = run_length(rng, 300, 800, batch_size * mlp_work(widths), seconds=3.0)
    return classifier(lambda: mlp(widths, style), style, load, batch_size, length, sparse_view(rng, size))


def mlp_sparse_long(rng: torch.Generator) -> Task:
    """Many raw sparse images and a long run: what is bold early on must calm down late."""
    classes, style, batch_size = integer(rng, 10, 40), random_style(rng, norms=("none", "layer")), log_int(rng, 24, 192)
    widths = [784, *hidden_widths(rng, 64, 400, (1, 4)), classes]
    load = image_data(
        rng, choice(rng, ("strokes", "strokes", "blobs")), log_int(rng, 2000, 6000), classes,
        choice(rng, ("raw", "raw", "standardised")), size=28,
    )  # fmt: skip
    length = run_length(rng, 500, 1500, batch_size * mlp_work(widths), seconds=6.0)
    view = sparse_view(rng, 28) if chance(rng, 0.7) else None  # the others can be fitted to the end
    return classifier(lambda: mlp(widths, style), style, load, batch_size, length, view)


def mlp_tiny_batches(rng: torch.Generator) -> Task:
    """Nearly all of a gradient is noise: what is right for a batch of 64 is far too bold here."""
    classes, style = integer(rng, 5, 26), random_style(rng, norms=("none", "none", "layer"))
    size, batch_size = choice(rng, (12, 20, 28)), choice(rng, (1, 1, 2, 4, 8))
    widths = [size * size, *hidden_widths(rng, 24, 160, (1, 3)), classes]
    source = choice(rng, ("strokes", "blobs") if size > 12 else ("textures", "shapes"))
    load = image_data(rng, source, log_int(rng, 1000, 4000), classes, choice(rng, PREPROCESSING), size=size)
    view = sparse_view(rng, size) if size > 12 else noisy_view(rng, size)
    return classifier(lambda: mlp(widths, style), style, load, batch_size, run_length(rng, 500, 1500), view)


def mlp_large_batches(rng: torch.Generator) -> Task:
    classes, style, size = integer(rng, 5, 26), random_style(rng), choice(rng, (8, 12, 20))
    widths = [size * size, *hidden_widths(rng, 32, 128, (1, 3)), classes]
    source = choice(rng, ("strokes", "blobs") if size > 12 else ("textures", "shapes"))
    load = image_data(rng, source, log_int(rng, 2500, 5000), classes, choice(rng, PREPROCESSING), size=size)
    length, batch_size = run_length(rng, 200, 500), choice(rng, (512, 1024))
    view = sparse_view(rng, size) if size > 12 else noisy_view(rng, size)
    return classifier(lambda: mlp(widths, style), style, load, batch_size, length, view)


def mlp_label_noise(rng: torch.Generator) -> Task:
    """Few examples, a part of them (or all) with random labels: the training loss falls by memorising."""
    size, classes, noise = integer(rng, 8, 20), integer(rng, 2, 10), choice(rng, (0.2, 0.5, 1.0))
    style, batch_size, n = random_style(rng), log_int(rng, 16, 128), log_int(rng, 600, 4000)
    widths = [size * size, *hidden_widths(rng, 32, 256, (1, 3)), classes]
    load_clean = image_data(rng, choice(rng, tuple(IMAGE_SOURCES)), n, classes, choice(rng, PREPROCESSING), size=size)
    make_rng = spawn(rng)

    def load() -> tuple[Data, Data]:
        (images, labels), held_out = load_clean()
        noise_rng = make_rng()
        wrong = torch.rand(len(labels), generator=noise_rng) < noise
        return (images, torch.where(wrong, torch.randint(classes, labels.shape, generator=noise_rng), labels)), held_out

    length = run_length(rng, 200, 800, batch_size * mlp_work(widths))
    return classifier(lambda: mlp(widths, style), style, load, batch_size, length)


def mlp_deep_narrow(rng: torch.Generator) -> Task:
    """Six to twenty layers of 8 to 32 units; without residual connections these barely train."""
    size, classes, style = integer(rng, 6, 12), integer(rng, 2, 10), random_style(rng, residual=0.5)
    widths = [size * size, *[log_int(rng, 8, 32)] * log_int(rng, 6, 20), classes]
    load = image_data(rng, choice(rng, tuple(IMAGE_SOURCES)), 1500, classes, "standardised", size=size)
    length, batch_size, view = run_length(rng, 200, 600), log_int(rng, 16, 256), noisy_view(rng, size)
    return classifier(lambda: mlp(widths, style), style, load, batch_size, length, view)


def mlp_signals(rng: torch.Generator) -> Task:
    """Noise is added afresh every time: a few thousand signals would be memorised at once."""
    points, classes, style = integer(rng, 32, 96), integer(rng, 3, 12), random_style(rng)
    widths = [points, *hidden_widths(rng, 16, 256, (1, 4)), classes]
    load = signal_data(rng, log_int(rng, 500, 4000), classes, points)
    length, batch_size, noise = run_length(rng, 200, 800), log_int(rng, 16, 256), uniform(rng, 0.5, 1.5)
    return dataset_task(
        lambda: initialise(mlp(widths, style), style), load, classification, batch_size=batch_size, length=length,
        change=lambda batch, rng: (batch[0] + noise * torch.randn(batch[0].shape, generator=rng), batch[1]),
    )  # fmt: skip


FAMILIES = (
    TaskFamily("mlp_images", "perceptrons that classify textures and shapes", "train", mlp_images),
    TaskFamily(
        "mlp_sparse_images", "wide-input perceptrons on strokes and spots on a blank page", "train", mlp_sparse_images
    ),
    TaskFamily("mlp_sparse_long", "perceptrons on thousands of sparse images, for long", "train", mlp_sparse_long),
    TaskFamily("mlp_tiny_batches", "perceptrons on images, in batches of 1 to 8", "train", mlp_tiny_batches),
    TaskFamily("mlp_large_batches", "perceptrons on images, in batches of 512 or 1,024", "train", mlp_large_batches),
    TaskFamily("mlp_label_noise", "perceptrons that memorise images with random labels", "train", mlp_label_noise),
    TaskFamily("mlp_deep_narrow", "perceptrons of 6 to 20 narrow layers on small images", "train", mlp_deep_narrow),
    TaskFamily("mlp_signals", "perceptrons that classify one-dimensional signals", "train", mlp_signals),
)
