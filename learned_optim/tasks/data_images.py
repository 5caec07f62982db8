"""Images and signals made by formula, vectorised over examples: the data of the training families in vision.

Images are float32 ``[n, channels, size, size]`` in [0, 1], signals ``[n, 1, length]``; labels are int64 ``[n]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import Data, integer, uniform


def textures(rng: torch.Generator, n: int, classes: int, size: int, channels: int = 1) -> Data:
    """A class is two gratings (frequency, direction, phase, colour); an example shifts them and adds noise."""
    labels = torch.randint(classes, (n,), generator=rng)
    frequency = (1 + 0.15 * size * torch.rand(classes, 2, generator=rng)) * 2 * math.pi / size
    angle = math.pi * torch.rand(classes, 2, generator=rng)
    colour = torch.rand(classes, 2, channels, 1, 1, generator=rng)
    wave = torch.stack([frequency * angle.cos(), frequency * angle.sin()], -1)[labels]  # [n, 2, 2]
    # Up to complete shifts, which only networks that share weights over places can see through.
    phase = 2 * math.pi * torch.rand(classes, 2, 1, generator=rng)[labels]
    phase = phase + uniform(rng, 0.3, math.pi) * (2 * torch.rand(n, 2, 1, generator=rng) - 1)
    gratings = (wave @ _grid(size).T + phase).sin().view(n, 2, 1, size, size)
    contrast = 0.2 + 0.3 * torch.rand(n, 1, 1, 1, generator=rng)
    noise = 0.1 * torch.randn(n, channels, size, size, generator=rng)
    return (0.5 + contrast * (gratings * colour[labels]).sum(1) + noise).clamp_(0, 1), labels


def shapes(rng: torch.Generator, n: int, classes: int, size: int, channels: int = 1) -> Data:
    """A class is a star-shaped outline; an example has random place, size, tilt and colours."""
    labels = torch.randint(classes, (n,), generator=rng)
    order = torch.arange(1, 6)
    amplitude = (0.6 * torch.randn(classes, 5, generator=rng) / order)[labels]
    offset = (2 * math.pi * torch.rand(classes, 5, generator=rng))[labels]
    centre = size / 2 + 0.2 * size * (torch.rand(n, 1, 2, generator=rng) - 0.5)
    position = _grid(size) - centre  # [n, pixels, 2]
    tilt = 0.6 * (torch.rand(n, 1, generator=rng) - 0.5)
    angle = torch.atan2(position[..., 0], position[..., 1]) + tilt
    outline = 1 + sum(amplitude[:, k, None] * (int(order[k]) * angle + offset[:, k, None]).cos() for k in range(5)) / 2
    scale = size * (0.18 + 0.12 * torch.rand(n, 1, generator=rng))
    inside = torch.sigmoid(2 * (scale * outline - position.norm(dim=-1))).view(n, 1, size, size)
    ink, paper = 0.4 * torch.rand(2, n, channels, 1, 1, generator=rng)
    ink = 0.6 + ink  # always brighter than the paper: small networks cannot learn to ignore the sign
    return paper + (ink - paper) * inside, labels


def strokes(rng: torch.Generator, n: int, classes: int, size: int) -> Data:
    """Sparse drawings on a blank page with blank borders: a class is a few curves, an example deforms them."""
    labels = torch.randint(classes, (n,), generator=rng)
    curves, points = integer(rng, 1, 3), size
    control = torch.rand(classes, curves, 4, 2, generator=rng)[labels]
    control = control + 0.06 * torch.randn(control.shape, generator=rng)
    t = torch.linspace(0, 1, points)
    bezier = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)  # [points, 4]
    path = (bezier @ control).view(n, -1, 2)
    border, shift = 0.18, 0.1 * (torch.rand(n, 1, 2, generator=rng) - 0.5)
    path = size * (border + (1 - 2 * border) * path.clamp(0, 1) + shift)
    return _draw(path, size, ink=uniform(rng, 0.9, 2.2)), labels


def blobs(rng: torch.Generator, n: int, classes: int, size: int) -> Data:
    """A few bright spots on black: a class is a constellation, an example jitters it and drops some of the spots."""
    labels = torch.randint(classes, (n,), generator=rng)
    spots = integer(rng, 4, 12)
    position = (0.15 + 0.7 * torch.rand(classes, spots, 2, generator=rng))[labels]
    position = (position + 0.02 * torch.randn(position.shape, generator=rng)).clamp(0.1, 0.9) * size
    present = (torch.rand(n, spots, generator=rng) < 0.8).float()
    return _draw(position, size, ink=3.0, weight=present), labels


def scenes(rng: torch.Generator, n: int, size: int) -> Tensor:
    """Colour patches [n, 3, size, size] with the statistics of natural images, and no labels.

    Amplitudes fall as 1/frequency (Field 1987), colours are mostly shades of grey, and contrast and brightness vary
    from patch to patch, so that a few directions of pixel space hold nearly all of the variance.
    """
    window = 2 * size  # a patch is a part of its scene: no edge meets the opposite one
    frequency = torch.fft.fftfreq(window)[:, None] ** 2 + torch.fft.rfftfreq(window)[None] ** 2
    fall = frequency.clamp(min=window**-2.0) ** (-uniform(rng, 0.8, 1.5) / 2)
    noise = torch.randn(n, 3, window, window, generator=rng)
    field = torch.fft.irfft2(torch.fft.rfft2(noise) * fall, s=(window, window))[..., :size, :size]
    field = field / field.std()
    grey, saturation = field.mean(1, keepdim=True) * math.sqrt(3), uniform(rng, 0.1, 0.5)
    contrast = (0.6 * torch.randn(n, 1, 1, 1, generator=rng)).exp()
    brightness = 0.6 * torch.randn(n, 1, 1, 1, generator=rng)
    return (0.5 + 0.2 * (brightness + contrast * (grey + saturation * (field - field.mean(1, keepdim=True))))).clamp_(
        0, 1
    )


IMAGE_SOURCES: dict[str, Callable[..., Data]] = {
    "textures": textures,
    "shapes": shapes,
    "strokes": strokes,
    "blobs": blobs,
}


def signals(rng: torch.Generator, n: int, classes: int, length: int) -> Data:
    """Series of a class's waveform at a random place, stretched, with a drift and correlated noise added."""
    labels = torch.randint(classes, (n,), generator=rng)
    harmonics = torch.arange(1, 7)
    weights = (torch.randn(classes, 6, 2, generator=rng) / harmonics[:, None].sqrt())[labels]
    width = length * (0.3 + 0.3 * torch.rand(n, 1, generator=rng))
    start = torch.rand(n, 1, generator=rng) * (length - width)
    t = (torch.arange(length) - start) / width  # [n, length], the waveform lives in 0 <= t < 1
    angle = math.pi * t[:, None, :] * harmonics[:, None]
    wave = (weights[..., :1] * angle.sin() + weights[..., 1:] * (2 * angle).sin()).sum(1)
    wave = wave * ((t >= 0) & (t < 1))
    drift = torch.randn(n, 1, generator=rng) * torch.linspace(-1, 1, length)
    noise = torch.randn(n, 1, length + 8, generator=rng)
    noise = F.avg_pool1d(noise, 9, stride=1) * 3 * uniform(rng, 0.1, 0.5)
    return (wave + 0.5 * drift)[:, None, :] + noise, labels


def preprocess(images: Tensor, how: str, reference: Tensor | None = None) -> Tensor:
    """Rescales images in [0, 1] with statistics of ``reference`` (default: of the images themselves).

    ``"raw"`` leaves them non-negative; ``"standardised"`` uses one mean and deviation for all pixels;
    ``"per_pixel"`` one pair per pixel, pixels that never vary becoming 0.
    """
    reference = images if reference is None else reference
    if how == "raw":
        return images
    if how == "standardised":
        return (images - reference.mean()) / (reference.std() + 1e-6)
    if how == "per_pixel":
        return (images - reference.mean(0)) / reference.std(0).clamp_min(0.1)
    raise ValueError(f"preprocessing must be 'raw', 'standardised' or 'per_pixel', got {how!r}")


def _grid(size: int) -> Tensor:
    """Pixel coordinates ``[size * size, 2]``, row then column."""
    line = torch.arange(size, dtype=torch.float32)
    return torch.cartesian_prod(line, line)


def _draw(points: Tensor, size: int, ink: float, weight: Tensor | None = None) -> Tensor:
    """Draws points ``[n, k, 2]`` in pixels with a soft pen: images ``[n, 1, size, size]`` in [0, 1]."""
    n, k, _ = points.shape
    low = points.floor()
    part = points - low
    low = low.long()
    image = torch.zeros(n, size * size)
    weight = torch.ones(n, k) if weight is None else weight
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = (low[..., 0] + dy).clamp(0, size - 1), (low[..., 1] + dx).clamp(0, size - 1)
            share = (part[..., 0] - (1 - dy)).abs() * (part[..., 1] - (1 - dx)).abs()
            image.scatter_add_(1, row * size + column, share * weight)
    pen = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).div_(8)
    return F.conv2d(ink * image.view(n, 1, size, size), pen[None, None], padding=1).clamp_(0, 1)
