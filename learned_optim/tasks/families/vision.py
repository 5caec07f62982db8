"""Training families on images and signals made by formula; perceptrons are in :mod:`.vision_perceptrons`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..base import LossFn, ModuleTask, Task, TaskFamily
from ..data_images import IMAGE_SOURCES, preprocess, scenes, signals
from ..image_views import Augmentation
from ..nets import AutoEncoder, Style, VisionTransformer, convnet, initialise, random_style, residual_convnet
from ..objectives import bernoulli_reconstruction, classification, negative_elbo, reconstruction
from ..sampling import (
    Data,
    chance,
    choice,
    dataset_batches,
    dataset_task,
    integer,
    log_int,
    run_length,
    spawn,
    split,
    uniform,
)

PREPROCESSING = ("raw", "standardised", "per_pixel")


def image_data(
    rng: torch.Generator, source: str, n: int, classes: int, how: str, **options: int
) -> Callable[[], tuple[Data, Data]]:
    """A loader of ``(training, held-out)`` images and labels from one of ``IMAGE_SOURCES``, a new set per task."""
    make_rng = spawn(rng)

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        images, labels = IMAGE_SOURCES[source](data_rng, n, classes, **options)
        return split((preprocess(images, how), labels), data_rng)

    return load


def images_only(load: Callable[[], tuple[Data, Data]]) -> Callable[[], tuple[Data, Data]]:
    """Drops the labels."""

    def load_images() -> tuple[Data, Data]:
        train, held_out = load()
        return train[:1], held_out[:1]

    return load_images


def hidden_widths(rng: torch.Generator, low: int, high: int, depth: tuple[int, int]) -> list[int]:
    """Widths of the hidden layers: all equal, or shrinking to a quarter."""
    width, layers = log_int(rng, low, high), integer(rng, *depth)
    last = width if chance(rng, 0.6) else max(8, width // 4)
    return [round(width * (last / width) ** (i / max(1, layers - 1))) for i in range(layers)]


def mlp_work(widths: Sequence[int]) -> int:
    """Weights of a perceptron, which are its multiply-adds per example."""
    return sum(a * b for a, b in pairwise(widths))


def classifier(
    make: Callable[[], nn.Module],
    style: Style,
    load: Callable[[], tuple[Data, Data]],
    batch_size: int,
    length: int,
    view: Augmentation | None = None,
) -> ModuleTask:
    """A network that classifies what ``load`` gives, its weights drawn as ``style`` says.

    With ``view``, it is trained on another random view of each image every time.
    """
    return dataset_task(
        lambda: initialise(make(), style), load, classification, batch_size=batch_size, length=length,
        change=None if view is None else lambda batch, rng: (view(batch[0], rng), *batch[1:]),
    )  # fmt: skip


def sparse_view(rng: torch.Generator, size: int) -> Augmentation:
    """Shifts and perhaps holes, which leave a blank page blank."""
    return Augmentation(
        shift=integer(rng, 1, max(1, size // 8)), hole=integer(rng, size // 4, size // 2) if chance(rng, 0.5) else 0
    )


def noisy_view(rng: torch.Generator, size: int) -> Augmentation:
    """The same, and noise on every pixel."""
    return replace(sparse_view(rng, size), noise=uniform(rng, 0.2, 1.0))


def vit_work(size: int, patch: int, depth: int, width: int) -> int:
    """Multiply-adds per image of a vision transformer, attention aside."""
    return (size // patch) ** 2 * 12 * depth * width**2


def sparse_image_data(rng: torch.Generator, classes: int) -> Callable[[], tuple[Data, Data]]:
    """Some thousand images of 28 x 28, strokes or spots on a blank page."""
    source, how = choice(rng, ("strokes", "strokes", "blobs")), choice(rng, ("raw", "standardised"))
    return image_data(rng, source, log_int(rng, 2000, 5000), classes, how, size=28)


def conv_sparse_images(rng: torch.Generator) -> Task:
    """As long as it takes to fit the images, as ``mlp_sparse_long``."""
    classes, style = integer(rng, 10, 40), random_style(rng, norms=("none", "batch", "layer"))
    channels = [log_int(rng, 8, 24) * 2**i for i in range(integer(rng, 2, 3))]
    load = sparse_image_data(rng, classes)
    length, batch_size = run_length(rng, 300, 900), log_int(rng, 16, 64)
    return classifier(lambda: convnet(1, channels, classes, style), style, load, batch_size, length)


def vit_sparse_images(rng: torch.Generator) -> Task:
    classes, style = integer(rng, 8, 30), random_style(rng, norms=("layer", "rms"), inits=("default", "xavier"))
    patch, width, depth, heads = choice(rng, (4, 7, 7)), choice(rng, (32, 48, 64)), integer(rng, 2, 4), 4
    load = sparse_image_data(rng, classes)
    batch_size, work = log_int(rng, 12, 32), vit_work(28, patch, depth, width)
    length = run_length(rng, 300, 800, batch_size * work, seconds=4.0)
    return classifier(
        lambda: VisionTransformer((1, 28), patch, width, depth, heads, classes, style), style, load, batch_size, length
    )


def signal_data(rng: torch.Generator, n: int, classes: int, length: int) -> Callable[[], tuple[Data, Data]]:
    """A loader of ``(training, held-out)`` signals and labels, a new set per task."""
    make_rng = spawn(rng)
    return lambda: split(signals(make_rng(), n, classes, length), make_rng())


def conv1d_signals(rng: torch.Generator) -> Task:
    points, classes, style = integer(rng, 32, 96), integer(rng, 3, 12), random_style(rng)
    channels = [log_int(rng, 8, 64)] * integer(rng, 2, 4)
    load = signal_data(rng, log_int(rng, 500, 4000), classes, points)
    length, batch_size = run_length(rng, 200, 800), log_int(rng, 8, 128)
    return classifier(lambda: convnet(1, channels, classes, style, dims=1), style, load, batch_size, length)


def conv2d_images(rng: torch.Generator) -> Task:
    size, colours, classes, style = integer(rng, 10, 20), choice(rng, (1, 3)), integer(rng, 3, 12), random_style(rng)
    width = log_int(rng, 8, 48)
    channels = [width * 2**i if chance(rng, 0.5) else width for i in range(integer(rng, 2, 3))]
    source = choice(rng, ("textures", "shapes"))
    load = image_data(rng, source, 1500, classes, choice(rng, PREPROCESSING[:2]), size=size, channels=colours)
    length, batch_size, view = run_length(rng, 200, 500), log_int(rng, 8, 64), noisy_view(rng, size)
    return classifier(lambda: convnet(colours, channels, classes, style), style, load, batch_size, length, view)


def resnet_images(rng: torch.Generator) -> Task:
    size, colours, classes = integer(rng, 12, 18), choice(rng, (1, 3)), integer(rng, 3, 12)
    style = random_style(rng, norms=("batch", "batch", "batch", "layer"))
    channels = [log_int(rng, 8, 16) * 2**i for i in range(integer(rng, 1, 3))]
    source = choice(rng, ("textures", "shapes"))
    load = image_data(rng, source, 1500, classes, "standardised", size=size, channels=colours)
    length, batch_size = run_length(rng, 200, 400), log_int(rng, 8, 48)
    return classifier(lambda: residual_convnet(colours, channels, classes, style), style, load, batch_size, length)


def vit_images(rng: torch.Generator) -> Task:
    patch, colours, classes = choice(rng, (4, 5)), choice(rng, (1, 3)), integer(rng, 3, 12)
    size, width, depth = patch * integer(rng, 2, 4), choice(rng, (16, 32, 48)), integer(rng, 1, 3)
    style = random_style(rng, norms=("layer", "rms"), inits=("default", "xavier", "zero_output"))
    source = choice(rng, ("textures", "shapes"))
    load = image_data(rng, source, 2000, classes, choice(rng, PREPROCESSING), size=size, channels=colours)
    length, batch_size, heads = run_length(rng, 200, 400), log_int(rng, 8, 64), choice(rng, (1, 2, 4))
    return classifier(
        lambda: VisionTransformer((colours, size), patch, width, depth, heads, classes, style),
        style,
        load,
        batch_size,
        length,
    )


def autoencoder_task(
    rng: torch.Generator,
    load: Callable[[], tuple[Data, Data]],
    widths: list[int],
    style: Style,
    batch_size: int,
    steps: tuple[int, int],
    loss: LossFn = reconstruction,
    seconds: float = 2.0,
) -> ModuleTask:
    """A perceptron autoencoder of the images that ``load`` gives; ``widths`` lead from pixels to code."""
    pixels, *hidden, code = widths
    length = run_length(rng, *steps, 2 * batch_size * mlp_work(widths), seconds)
    return dataset_task(
        lambda: initialise(AutoEncoder(pixels, hidden, code, style), style),
        load,
        loss,
        batch_size=batch_size,
        length=length,
    )


def autoencoder_images(rng: torch.Generator) -> Task:
    """Squared error of standardised pixels, or the Bernoulli likelihood of pixels in [0, 1]."""
    source = choice(rng, tuple(IMAGE_SOURCES))
    size = integer(rng, 8, 20) if source in ("textures", "shapes") else integer(rng, 16, 28)
    style = random_style(rng, norms=("none", "none", "layer", "batch"), residual=0.0)
    hidden, code = hidden_widths(rng, 32, 256, (1, 2)), log_int(rng, 2, 32)
    raw, batch_size = chance(rng, 0.5), log_int(rng, 16, 128)
    load = images_only(image_data(rng, source, 1500, 10, "raw" if raw else "standardised", size=size))
    loss = bernoulli_reconstruction if raw else reconstruction
    return autoencoder_task(rng, load, [size * size, *hidden, code], style, batch_size, (200, 600), loss)


def autoencoder_scenes(rng: torch.Generator) -> Task:
    """Wide autoencoders, in runs long enough that what is left of the error is fine detail."""
    size, batch_size, code = integer(rng, 8, 14), log_int(rng, 24, 128), log_int(rng, 8, 96)
    style = random_style(rng, norms=("none", "none", "layer"), residual=0.0)
    hidden, n, make_rng = hidden_widths(rng, 64, 320, (1, 3)), log_int(rng, 1000, 4000), spawn(rng)

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        return split((preprocess(scenes(data_rng, n, size), "standardised"),), data_rng)

    return autoencoder_task(rng, load, [3 * size * size, *hidden, code], style, batch_size, (300, 1200), seconds=5.0)


def vae_task(
    rng: torch.Generator,
    load: Callable[[], tuple[Data, Data]],
    pixels: int,
    hidden: list[int],
    code: int,
    seconds: float,
) -> ModuleTask:
    """A variational autoencoder on the images that ``load`` gives; the noise of the code comes in the batch."""
    style = random_style(rng, norms=("none", "none", "layer"), inits=("default", "xavier", "scaled"), residual=0.0)
    batch_size = log_int(rng, 16, 128)
    work = 2 * batch_size * mlp_work([pixels, *hidden, code])
    length = run_length(rng, 200 if seconds < 5 else 400, 800 if seconds < 5 else 2000, work, seconds)

    def with_noise(images: Tensor, noise_rng: torch.Generator) -> Data:
        return images, torch.randn(len(images), code, generator=noise_rng)

    def batches(batch_rng: torch.Generator) -> Iterator[Data]:
        for (images,) in dataset_batches(task_data()[0], batch_size, batch_rng):
            yield with_noise(images, batch_rng)

    task_data = functools.cache(load)
    make_rng = spawn(rng)
    return ModuleTask(
        lambda: initialise(AutoEncoder(pixels, hidden, code, style, variational=True), style),
        batches,
        negative_elbo,
        length=length,
        eval_batch=lambda: with_noise(task_data()[1][0], make_rng()),
    )


def vae_images(rng: torch.Generator) -> Task:
    source = choice(rng, ("shapes", "strokes", "blobs"))
    size = integer(rng, 12, 20) if source == "shapes" else integer(rng, 16, 28)
    load = images_only(image_data(rng, source, log_int(rng, 600, 2000), 10, "raw", size=size))
    return vae_task(rng, load, size * size, hidden_widths(rng, 32, 256, (1, 2)), log_int(rng, 2, 32), seconds=2.0)


FAMILIES = (
    TaskFamily("conv_sparse_images", "convolutional networks that fit sparse images", "train", conv_sparse_images),
    TaskFamily("vit_sparse_images", "vision transformers on sparse images", "train", vit_sparse_images),
    TaskFamily("conv1d_signals", "1-D convolutional networks that classify signals", "train", conv1d_signals),
    TaskFamily("conv2d_images", "2-D convolutional networks on textures and shapes", "train", conv2d_images),
    TaskFamily("resnet_images", "residual convolutional networks, mostly with BatchNorm", "train", resnet_images),
    TaskFamily("vit_images", "small vision transformers on textures and shapes", "train", vit_images),
    TaskFamily("autoencoder_images", "perceptron autoencoders of images", "train", autoencoder_images),
    TaskFamily(
        "autoencoder_scenes", "wide autoencoders of patches that vary as natural images do", "train", autoencoder_scenes
    ),
    TaskFamily("vae_images", "variational autoencoders of images in [0, 1]", "train", vae_images),
)
