"""Training families without labels: two views of an example are to be told from those of all others in the batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Batch, ModuleTask, Task, TaskFamily
from ..data_images import IMAGE_SOURCES, preprocess, scenes
from ..image_views import draw_augmentation
from ..nets import (
    Style,
    VisionTransformer,
    convnet,
    initialise,
    mlp,
    random_style,
    residual_convnet,
    transformer_blocks,
)
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
from .vision import mlp_work, vit_work

_HELD_OUT_BATCHES = 4  # the loss depends on the size of the batch: held-out data comes in batches of the same size


def image_encoder(
    rng: torch.Generator, channels: int, size: int, outputs: int
) -> tuple[Callable[[], nn.Module], float]:
    """Draws a network from ``[batch, channels, size, size]`` to ``[batch, outputs]``; ``size`` a multiple of 4.

    Returns:
        Its maker, and roughly its multiply-adds per image.
    """
    style = random_style(rng, norms=("none", "layer", "batch"), inits=("default", "xavier", "orthogonal", "scaled"))
    kind, width, stages = choice(rng, ("convnet", "resnet", "vit", "mlp")), log_int(rng, 8, 24), integer(rng, 2, 3)
    depth, hidden = integer(rng, 1, 2), log_int(rng, 64, 256)
    maps, widths, tokens = (
        [width * 2**i for i in range(stages)],
        [channels * size**2, hidden, hidden, outputs],
        2 * width,
    )
    tokens -= tokens % 4
    # Every stage of a convolutional network costs about the same: twice the width at half the size.
    convolution = 9 * width**2 * (size // 2) ** 2
    makers: dict[str, tuple[Callable[[], nn.Module], float]] = {
        "convnet": (lambda: convnet(channels, maps, outputs, style), convolution),
        "resnet": (lambda: residual_convnet(channels, maps, outputs, style), 3 * stages * convolution),
        "vit": (
            lambda: VisionTransformer((channels, size), 4, tokens, depth, 4, outputs, style),
            2 * vit_work(size, 4, depth, tokens),
        ),
        "mlp": (lambda: mlp(widths, style), mlp_work(widths)),
    }
    make, work = makers[kind]
    return lambda: initialise(make(), style), work


class TwoTowers(nn.Module):
    """Unit vectors of both views from one encoder (``second`` is ``None``) or from two, and a temperature.

    A learned temperature is held as the logarithm of its inverse, which begins at log(1 / 0.07) as in CLIP (Radford
    et al. 2021).
    """

    log_scale: Tensor  #: a parameter, or a buffer where it is fixed

    def __init__(self, first: nn.Module, second: nn.Module | None, temperature: float | None) -> None:
        super().__init__()
        self.first = first
        self.second = second
        if temperature is None:
            self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        else:
            self.register_buffer("log_scale", torch.tensor(math.log(1 / temperature)))

    def scale(self) -> Tensor:
        """At most 100, as in CLIP."""
        return self.log_scale.clamp(max=math.log(100.0)).exp()

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Batches ``[groups, batch, ...]`` to ``[groups, batch, width]``; what is compared is within a group."""
        groups, batch = first.shape[:2]
        views = [first.flatten(0, 1), second.flatten(0, 1)]
        if self.second is None:
            one, two = self.first(torch.cat(views)).chunk(2)
        else:
            one, two = self.first(views[0]), self.second(views[1])
        one, two = F.normalize(one, dim=-1), F.normalize(two, dim=-1)
        return one.view(groups, batch, -1), two.view(groups, batch, -1)


def nt_xent(module: TwoTowers, batch: Batch) -> Tensor:
    """Cross-entropy (nats) of finding a view's other one among all in the batch (SimCLR, Chen et al. 2020)."""
    views = torch.cat(module(*batch), 1)
    count = views.shape[1]
    scores = module.scale() * views @ views.transpose(1, 2)
    scores = scores.masked_fill(torch.eye(count, dtype=torch.bool, device=views.device), -1e9)
    other = torch.arange(count, device=views.device).roll(count // 2)
    return F.cross_entropy(scores.flatten(0, 1), other.repeat(len(views)))


def info_nce(module: TwoTowers, batch: Batch) -> Tensor:
    """Cross-entropy (nats) of finding an example's other view among all others' and the reverse, on average."""
    one, two = module(*batch)
    groups, count, _ = one.shape
    scores = module.scale() * one @ two.transpose(1, 2)
    same = torch.arange(count, device=one.device).repeat(groups)
    loss = F.cross_entropy(scores.flatten(0, 1), same) + F.cross_entropy(scores.transpose(1, 2).flatten(0, 1), same)
    return 0.5 * loss


Views = Callable[[Data, torch.Generator], tuple[Tensor, Tensor]]


def contrastive_task(
    rng: torch.Generator,
    make_module: Callable[[], TwoTowers],
    load: Callable[[], tuple[Data, Data]],
    views: Views,
    loss_fn: Callable[[TwoTowers, Batch], Tensor],
    *,
    batch_size: int,
    length: int,
) -> ModuleTask:
    """A task whose batches are pairs of views ``[1, batch_size, ...]``, drawn afresh each time.

    The first ``4 * batch_size`` of the held-out examples give its held-out loss, in batches of the same size.
    """
    load, make_rng = functools.cache(load), spawn(rng)

    def grouped(data: Data, groups: int, view_rng: torch.Generator) -> Batch:
        return tuple(t.unflatten(0, (groups, -1)) for t in views(data, view_rng))

    def batches(batch_rng: torch.Generator) -> Iterator[Batch]:
        for data in dataset_batches(load()[0], batch_size, batch_rng):
            yield grouped(data, 1, batch_rng)

    def held_out() -> Batch:
        rows = tuple(t[: _HELD_OUT_BATCHES * batch_size] for t in load()[1])
        return grouped(rows, _HELD_OUT_BATCHES, make_rng())

    return ModuleTask(make_module, batches, loss_fn, length=length, eval_batch=held_out)


def projector(rng: torch.Generator, width: int) -> Callable[[], nn.Module]:
    """Draws the head that SimCLR puts between what is kept and what is compared: one hidden layer, or none."""
    hidden, outputs = log_int(rng, 32, 128), log_int(rng, 16, 64)
    if chance(rng, 0.25):
        return lambda: nn.Linear(width, outputs)
    return lambda: nn.Sequential(nn.ReLU(), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def temperature_of(rng: torch.Generator) -> float | None:
    """Draws a fixed temperature, or ``None`` for a learned one."""
    fixed = log_uniform(rng, 0.05, 0.5)
    return fixed if chance(rng, 0.7) else None


def contrastive_images(rng: torch.Generator) -> Task:
    """Two random crops, mirrored, brightened and noisy, of one picture among others, as in SimCLR.

    Pictures are drawn by formula; those of one class differ as little as photographs of one kind of thing do.
    """
    source, size, make_rng = choice(rng, ("scenes", *IMAGE_SOURCES)), 4 * integer(rng, 3, 5), spawn(rng)
    n, classes, colours = log_int(rng, 1500, 5000), integer(rng, 10, 60), choice(rng, (1, 3))
    change, temperature, width = draw_augmentation(rng, size), temperature_of(rng), log_int(rng, 24, 96)
    channels = 3 if source == "scenes" else colours if source in ("textures", "shapes") else 1
    (make_encoder, work), make_projector = image_encoder(rng, channels, size, width), projector(rng, width)
    batch_size, loss = log_int(rng, 16, 96), choice(rng, (nt_xent, nt_xent, info_nce))

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        if source == "scenes":
            images = scenes(data_rng, n, size)
        else:
            options = {"channels": channels} if channels > 1 else {}
            images, _ = IMAGE_SOURCES[source](data_rng, n, classes, size=size, **options)
        return split((preprocess(images, "standardised"),), data_rng, held_out=512 / n)

    return contrastive_task(
        rng,
        lambda: TwoTowers(nn.Sequential(make_encoder(), make_projector()), None, temperature),
        load,
        lambda data, view_rng: (change(data[0], view_rng), change(data[0], view_rng)),
        loss,
        batch_size=batch_size,
        length=run_length(rng, 250, 800, 2 * batch_size * work),
    )


def contrastive_tables(rng: torch.Generator) -> Task:
    """A row of a table and the same row with many entries taken from other rows (SCARF, Bahri et al. 2022).

    The columns depend on each other through a few hidden causes, so that a row can be known by some of its entries.
    """
    columns, causes, n = log_int(rng, 24, 160), integer(rng, 6, 16), log_int(rng, 2000, 8000)
    make_rng, replaced, both = spawn(rng), uniform(rng, 0.1, 0.4), chance(rng, 0.5)
    style = random_style(rng, inits=("default", "xavier", "orthogonal", "scaled"))
    width, batch_size, temperature = log_int(rng, 32, 256), log_int(rng, 24, 128), temperature_of(rng)
    make_projector, depth = projector(rng, width), integer(rng, 1, 4)

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        hidden = torch.randn(n, causes, generator=data_rng) @ torch.randn(causes, 2 * columns, generator=data_rng)
        tone, level = hidden.chunk(2, 1)
        table = (tone / 2).sin() + 0.3 * level + 0.3 * torch.randn(n, columns, generator=data_rng)
        return split((table,), data_rng, held_out=512 / n)

    def corrupted(table: Tensor, view_rng: torch.Generator) -> Tensor:
        donor = torch.randint(len(table), table.shape, generator=view_rng)
        return torch.where(torch.rand(table.shape, generator=view_rng) < replaced, table.gather(0, donor), table)

    def views(data: Data, view_rng: torch.Generator) -> tuple[Tensor, Tensor]:
        (table,) = data
        return corrupted(table, view_rng) if both else table, corrupted(table, view_rng)

    widths = [columns, *[width] * depth, width]
    return contrastive_task(
        rng,
        lambda: TwoTowers(nn.Sequential(initialise(mlp(widths, style), style), make_projector()), None, temperature),
        load,
        views,
        info_nce,
        batch_size=batch_size,
        length=run_length(rng, 250, 800),
    )


COLOURS, CELLS = 8, 4  # words are colours and the cells of a grid; word 0 is a blank
WORDS = 1 + COLOURS + CELLS**2


def captioned(rng: torch.Generator, n: int, size: int, spots: int, blank: float) -> Data:
    """Pictures ``[n, 3, size, size]`` of coloured spots and captions ``[n, 2 * spots]``: colour, place, colour, ...

    In random order, some words left blank; spots may lie upon each other.
    """
    colours, cells = (torch.randint(high, (n, spots), generator=rng) for high in (COLOURS, CELLS**2))
    palette = torch.randn(COLOURS, 3, generator=rng)
    centre = torch.stack([cells // CELLS, cells % CELLS], -1) + 0.2 + 0.6 * torch.rand(n, spots, 2, generator=rng)
    line = (torch.arange(size) + 0.5) * CELLS / size
    distance = (line - centre[..., None]).square()  # [n, spots, 2, size]
    width = 0.15 + 0.3 * torch.rand(n, spots, 1, 1, generator=rng)
    spot = (-(distance[:, :, 0, :, None] + distance[:, :, 1, None, :]) / width).exp()
    images = torch.einsum("nkhw,nkc->nchw", spot, palette[colours]) + 0.2 * torch.randn(n, 3, size, size, generator=rng)
    order = torch.rand(n, spots, generator=rng).argsort(1)
    said = torch.stack([1 + colours, 1 + COLOURS + cells], -1).gather(1, order[..., None].expand(-1, -1, 2)).flatten(1)
    return images, torch.where(torch.rand(said.shape, generator=rng) < blank, 0, said)


class CaptionEncoder(nn.Module):
    """Words ``[batch, time]`` to ``[batch, outputs]`` by a GRU's last state (``depth`` 0) or a transformer's mean."""

    def __init__(self, words: int, width: int, depth: int, outputs: int, style: Style) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.position = nn.Parameter(0.1 * torch.randn(words, width))
        recurrent = nn.GRU(width, width, batch_first=True)
        self.body = transformer_blocks(width, depth, 2, style, causal=False) if depth else recurrent
        self.output = nn.Linear(width, outputs)

    def forward(self, words: Tensor) -> Tensor:
        x = self.body(self.embed(words) + self.position)
        return self.output(x.mean(1) if isinstance(x, Tensor) else x[0][:, -1])


def contrastive_captions(rng: torch.Generator) -> Task:
    """Pictures of coloured spots and what is said of them, in two encoders with a common space, as in CLIP.

    Captions leave out words, so that some fit several pictures; the temperature is learned, or fixed in a few.
    """
    size, spots, blank = 4 * integer(rng, 3, 5), integer(rng, 2, 4), uniform(rng, 0.1, 0.5)
    n, make_rng, outputs = log_int(rng, 2000, 8000), spawn(rng), log_int(rng, 16, 64)
    (make_images, work), width, depth = image_encoder(rng, 3, size, outputs), choice(rng, (16, 32)), integer(rng, 0, 2)
    work += 2 * spots * max(1, depth) * 12 * width**2
    style = random_style(rng, norms=("layer", "rms"), inits=("default",))
    temperature = log_uniform(rng, 0.05, 0.2) if chance(rng, 0.2) else None
    noise, batch_size = uniform(rng, 0.2, 1.0), log_int(rng, 16, 64)

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        images, words = captioned(data_rng, n, size, spots, blank)
        return split((preprocess(images, "standardised"), words), data_rng, held_out=512 / n)

    def views(data: Data, view_rng: torch.Generator) -> tuple[Tensor, Tensor]:
        images, words = data
        return images + noise * torch.randn(images.shape, generator=view_rng), words

    return contrastive_task(
        rng,
        lambda: TwoTowers(make_images(), CaptionEncoder(2 * spots, width, depth, outputs, style), temperature),
        load,
        views,
        info_nce,
        batch_size=batch_size,
        length=run_length(rng, 300, 800, 2 * batch_size * work),
    )


FAMILIES = (
    TaskFamily("contrastive_images", "encoders that know a picture's other view", "train", contrastive_images),
    TaskFamily("contrastive_tables", "encoders that know a row by a part of it", "train", contrastive_tables),
    TaskFamily("contrastive_captions", "two encoders, of pictures and captions", "train", contrastive_captions),
)
