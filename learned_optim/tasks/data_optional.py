"""Data that ships inside scikit-learn and matplotlib (the extra ``tasks``). Nothing is downloaded.

The tables (iris, wine, ...) serve training families; the letters and the photographs serve validation families.
"""

from __future__ import annotations

import functools
import importlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import Data, choice

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SIGNS = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφψωБГДЖЗИЛЦЧШЩЫЭЮЯбджзийлцчшщыэюя"
"""Greek and Cyrillic letters that no Latin one looks like."""
FONTS = tuple(
    f"DejaVu{face}.ttf"
    for face in (
        *("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique"),
        *("SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique"),
        *("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic"),
    )
)
CLASSIFICATION_TABLES = ("iris", "wine", "breast_cancer")
REGRESSION_TABLES = ("diabetes", "linnerud")


def optional_import(module: str) -> Any:
    """Imports a module of the extra ``tasks``.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this task needs {module}: pip install scikit-learn matplotlib, or in the clone pip install -e ".[tasks]"'
        ) from error


@functools.cache
def table(name: str) -> tuple[Tensor, Tensor]:
    """A standard table: standardised inputs ``[n, columns]`` and labels int64 ``[n]``, or standardised targets
    ``[n, outputs]`` for the tables in ``REGRESSION_TABLES``."""
    source = getattr(optional_import("sklearn.datasets"), f"load_{name}")()
    inputs = torch.as_tensor(source.data, dtype=torch.float32)
    if name in CLASSIFICATION_TABLES:
        return standardise(inputs), torch.as_tensor(source.target, dtype=torch.int64)
    targets = torch.as_tensor(source.target, dtype=torch.float32)
    return standardise(inputs), standardise(targets.view(len(targets), -1))


def standardise(columns: Tensor) -> Tensor:
    """Subtracts each column's mean and divides by its deviation."""
    return (columns - columns.mean(0)) / (columns.std(0) + 1e-6)


@functools.cache
def glyphs(alphabet: str = LETTERS) -> Tensor:
    """Every letter in every font, ``[fonts, letters, 28, 28]`` in [0, 1], centred, with blank borders."""
    matplotlib = optional_import("matplotlib")
    image_font = optional_import("PIL.ImageFont")
    image_draw = optional_import("PIL.ImageDraw")
    image = optional_import("PIL.Image")
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pages = []
    for font_name in FONTS:
        font = image_font.truetype(str(folder / font_name), 18)
        for letter in alphabet:
            page = image.new("L", (28, 28))
            image_draw.Draw(page).text((14, 14), letter, fill=255, font=font, anchor="mm")
            pages.append(torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8))
    return torch.stack(pages).float().div_(255).view(len(FONTS), len(alphabet), 28, 28)


def letters(rng: torch.Generator, n: int, classes: int, colour: bool, alphabet: str = LETTERS) -> Data:
    """Letters in random fonts, slightly turned, scaled and shifted: images ``[n, 1 or 3, 28, 28]`` and labels.

    Args:
        rng: source of every choice, the ``classes`` letters of ``alphabet`` included.
        n: number of images.
        classes: number of different letters, at most as many as the alphabet has.
        colour: random bright ink on random dark paper, three channels, rather than white on black.
        alphabet: the letters to choose from.
    """
    labels = torch.randint(classes, (n,), generator=rng)
    chosen = torch.randperm(len(alphabet), generator=rng)[:classes]
    pages = glyphs(alphabet)[torch.randint(len(FONTS), (n,), generator=rng), chosen[labels]][:, None]
    angle = 0.25 * (2 * torch.rand(n, generator=rng) - 1)
    zoom = 1 + 0.2 * (2 * torch.rand(n, generator=rng) - 1)
    shift = 0.15 * (2 * torch.rand(n, 2, generator=rng) - 1)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    images = F.grid_sample(pages, F.affine_grid(affine, [n, 1, 28, 28], align_corners=False), align_corners=False)
    if colour:
        ink, paper = torch.rand(2, n, 3, 1, 1, generator=rng)
        ink, paper = 0.5 + 0.5 * ink, 0.5 * paper  # bright on dark: always legible
        images = (paper + (ink - paper) * images + 0.03 * torch.randn(n, 3, 28, 28, generator=rng)).clamp(0, 1)
    return images, labels


@functools.cache
def photographs() -> Tensor:
    """scikit-learn's two sample photographs, ``[2, 3, 427, 640]`` in [0, 1]."""
    photos = optional_import("sklearn.datasets").load_sample_images().images
    return torch.stack([torch.tensor(photo) for photo in photos]).permute(0, 3, 1, 2).float().div_(255)


PHOTO_QUESTIONS = ("place", "orientation", "photo_and_mirror")


def photo_patches(rng: torch.Generator, n: int, size: int, question: str, held_out: bool) -> Data:
    """Patches of the photographs, ``[n, 3, size, size]`` in [0, 1], and labels.

    Patches are cut inside cells of 64 x 64 pixels; every fifth cell is held out, so that no pixel is in both parts.

    Args:
        rng: source of every choice.
        n: number of patches.
        size: pixels along a side after scaling down by a random factor of at most 64 / size.
        question: what the label says. ``"place"``: which photograph and which quarter of it (8 classes);
            ``"orientation"``: turned by 0, 90, 180 or 270 degrees (4 classes);
            ``"photo_and_mirror"``: which photograph, upside down or not (4 classes).
        held_out: whether to cut from the held-out cells.
    """
    photos = photographs()
    rows, columns = photos.shape[2] // 64, photos.shape[3] // 64
    cells = [(r, c) for r in range(rows) for c in range(columns) if ((r * columns + 2 * c) % 5 == 0) == held_out]
    patches, labels = torch.empty(n, 3, size, size), torch.empty(n, dtype=torch.int64)
    which = torch.randint(len(photos), (n,), generator=rng).tolist()
    turns = torch.randint(4, (n,), generator=rng).tolist()
    # Patches of one cut size are scaled together; a handful of cut sizes is variety enough.
    for part in torch.arange(n).tensor_split(min(8, n)):
        cut = int(size * 2 ** (math.log2(64 / size) * float(torch.rand((), generator=rng))))
        offset = torch.randint(64 - cut + 1, (len(part), 2), generator=rng).tolist()
        pieces = []
        for i, (dy, dx) in zip(part.tolist(), offset, strict=True):
            r, c = choice(rng, cells)
            piece = photos[which[i], :, 64 * r + dy : 64 * r + dy + cut, 64 * c + dx : 64 * c + dx + cut]
            if question == "place":
                labels[i] = 4 * which[i] + 2 * (2 * r >= rows) + (2 * c >= columns)
            elif question == "orientation":
                labels[i] = turns[i]
                piece = torch.rot90(piece, turns[i], (1, 2))
            else:
                labels[i] = 2 * which[i] + turns[i] % 2
                piece = piece.flip(1) if turns[i] % 2 else piece
            pieces.append(piece)
        patches[part] = F.interpolate(torch.stack(pieces), size=(size, size), mode="area")
    return patches, labels
