"""Random views of images: crops, mirror images, other contrast, noise, holes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import chance, integer, uniform


@dataclass(frozen=True)
class Augmentation:
    """Random changes of images ``[n, channels, size, size]`` with unit variance; each image gets its own.

    Attributes:
        shift: most pixels each way; what comes in is a mirror image.
        flip: mirror half of them left to right.
        jitter: deviation of log contrast and of brightness.
        noise: deviation of what is added to every pixel.
        hole: side in pixels of a square that is set to 0; 0 for none.
    """

    shift: int = 0
    flip: bool = False
    jitter: float = 0.0
    noise: float = 0.0
    hole: int = 0

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        n, _, size, _ = images.shape
        line, one = torch.arange(size), (n, 1, 1, 1)
        corner = torch.randint(2 * self.shift + 1, (2, n, 1), generator=rng)
        row, column = corner + line
        if self.flip:
            column = torch.where(torch.rand(n, 1, generator=rng) < 0.5, column.flip(1), column)
        padded = F.pad(images, (self.shift,) * 4, mode="reflect") if self.shift else images
        views = padded[torch.arange(n)[:, None, None], :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
        if self.jitter:
            contrast, brightness = self.jitter * torch.randn(2, *one, generator=rng)
            views = contrast.exp() * views + brightness
        if self.noise:
            views = views + self.noise * torch.randn(views.shape, generator=rng)
        if self.hole:
            start = torch.randint(1 - self.hole // 2, size - self.hole // 2, (2, n, 1), generator=rng)
            inside = (line >= start) & (line < start + self.hole)  # [2, n, size]
            views = views.masked_fill((inside[0, :, :, None] & inside[1, :, None, :])[:, None], 0.0)
        return views.contiguous()


def draw_augmentation(rng: torch.Generator, size: int, strength: float = 1.0) -> Augmentation:
    """Draws one for images of ``size`` pixels; every kind of change is there in most, but not all."""
    return Augmentation(
        shift=integer(rng, 0, max(1, round(strength * size / 5))),
        flip=chance(rng, 0.5),
        jitter=strength * uniform(rng, 0.1, 0.5) if chance(rng, 0.7) else 0.0,
        noise=strength * uniform(rng, 0.05, 0.5) if chance(rng, 0.7) else 0.0,
        hole=integer(rng, 2, size // 2) if chance(rng, 0.4) else 0,
    )
