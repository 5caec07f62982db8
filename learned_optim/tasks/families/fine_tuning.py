"""Training families that fine-tune networks of images and text; those of tables are in :mod:`.fine_tuning_tables`.

A network is one of a few that were trained before on another, related kind of data, once per machine
(:mod:`..pretrained`); what it is tuned on, how much of it and for how long is drawn per task. Sets are small, labels
partly wrong: memorising is part of the work, and the held-out loss has its minimum before the end.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import ModuleTask, Task, TaskFamily
from ..data_images import IMAGE_SOURCES, preprocess
from ..data_text import CHARACTERS, characters, windows
from ..nets import RecurrentLM, Style, TransformerLM, VisionTransformer, convnet, mlp, residual_convnet
from ..objectives import classification, next_token
from ..pretrained import TUNED, Recipe, freeze, pretrained_state, without_head
from ..sampling import (
    Data,
    chance,
    choice,
    dataset_task,
    integer,
    log_int,
    spawn,
    split,
    uniform,
)


class Tuning(NamedTuple):
    """What of a network is tuned, see :func:`..pretrained.freeze`."""

    tuned: str
    share: float
    rank: int
    scale: float


def draw_tuning(rng: torch.Generator, tuned: Sequence[str] = ("all", *TUNED)) -> Tuning:
    return Tuning(choice(rng, tuned), uniform(rng, 0.2, 0.8), log_int(rng, 1, 16), choice(rng, (0.5, 1.0, 2.0, 4.0)))


def tuned_network(
    recipe: Recipe, make: Callable[[], nn.Module], tuning: Tuning, outputs: int | None, pool: nn.Module | None = None
) -> nn.Module:
    """The pre-trained network, partly frozen; with a new head of ``outputs`` unless that is ``None``."""
    network = make()
    network.load_state_dict(pretrained_state(recipe))
    body, head = without_head(network)
    body = freeze(body, tuning.tuned, share=tuning.share, rank=tuning.rank, scale=tuning.scale)
    if outputs is not None:
        head = nn.Linear(head.in_features, outputs)
    parts: list[tuple[str, nn.Module]] = [("body", body), ("head", head)]
    if pool is not None:
        parts.insert(1, ("pool", pool))
    return nn.Sequential(OrderedDict(parts))


def mislabelled(data: Data, fraction: float, rng: torch.Generator) -> Data:
    """Exchanges the labels or targets of a part of the examples among themselves."""
    inputs, labels = data
    wrong = (torch.rand(len(labels), generator=rng) < fraction).nonzero().squeeze(1)
    labels = labels.clone()
    labels[wrong] = labels[wrong[torch.randperm(len(wrong), generator=rng)]]
    return inputs, labels


def tuning_set(rng: torch.Generator) -> tuple[int, int, int]:
    """Draws ``(examples, batch size, steps)``: 50 to 1,000 examples mostly, and some thousands.

    Small sets are seen thirty times at most: after that there is nothing left to learn. The held-out examples, 512,
    come on top.
    """
    n = log_int(rng, 50, 1000) if chance(rng, 0.7) else log_int(rng, 1000, 6000)
    batch_size, length = log_int(rng, 8, 64), log_int(rng, 250, 800)
    return n, max(4, min(batch_size, 30 * n // length)), length


# --- images ---------------------------------------------------------------------------------------------------------


class ImageNetwork(NamedTuple):
    """A network and the images, 16 x 16, that it was trained on before."""

    source: str
    channels: int
    make: Callable[[int, int], nn.Module]  #: of channels and outputs


IMAGE_CLASSES, IMAGE_SIZE, SEEN, UNSEEN = 16, 16, 2048, 3000
IMAGE_NETWORKS = {
    "conv_textures": ImageNetwork("textures", 3, lambda c, out: convnet(c, [24, 48, 96], out, Style("gelu"))),
    "conv_strokes": ImageNetwork("strokes", 1, lambda c, out: convnet(c, [16, 32, 64], out, Style(norm="batch"))),
    "resnet_shapes": ImageNetwork("shapes", 3, lambda c, out: residual_convnet(c, [16, 32], out, Style(norm="batch"))),
    "vit_shapes": ImageNetwork(
        "shapes", 1, lambda c, out: VisionTransformer((c, IMAGE_SIZE), 4, 64, 2, 4, out, Style("gelu"))
    ),
    "vit_textures": ImageNetwork(
        "textures", 3, lambda c, out: VisionTransformer((c, IMAGE_SIZE), 4, 48, 3, 2, out, Style("silu", "rms"))
    ),
    "mlp_blobs": ImageNetwork(
        "blobs", 1, lambda c, out: mlp([c * IMAGE_SIZE**2, 192, 128, 96], Style("gelu", "layer")).append(
            nn.Sequential(nn.GELU(), nn.Linear(96, out))
        )
    ),
}  # fmt: skip


@functools.cache
def _images(name: str) -> Data:
    """The first ``SEEN`` serve pre-training; the others are of the same classes."""
    network, rng = IMAGE_NETWORKS[name], torch.Generator().manual_seed(sorted(IMAGE_NETWORKS).index(name))
    return _drawn_images(rng, network.source, SEEN + UNSEEN, IMAGE_CLASSES, network.channels)


def _drawn_images(rng: torch.Generator, source: str, n: int, classes: int, channels: int) -> Data:
    colour = {"channels": channels} if channels > 1 else {}
    images, labels = IMAGE_SOURCES[source](rng, n, classes, size=IMAGE_SIZE, **colour)
    return preprocess(images, "standardised"), labels


def _image_pretraining(name: str) -> Task:
    network = IMAGE_NETWORKS[name]

    def load() -> tuple[Data, Data]:
        images, labels = _images(name)
        return (images[:SEEN], labels[:SEEN]), (images[SEEN:], labels[SEEN:])

    make = functools.partial(network.make, network.channels, IMAGE_CLASSES)
    return dataset_task(make, load, classification, batch_size=48, length=500)


IMAGE_RECIPES = {name: Recipe(f"images_{name}", lambda name=name: _image_pretraining(name)) for name in IMAGE_NETWORKS}


def finetune_images(rng: torch.Generator) -> Task:
    """Classifiers of 16 drawn classes learn new classes, perhaps of another kind of image, or the old ones anew.

    The old classes come with another contrast, blur and noise, and the old head stays: a good start, as when a model
    is adapted to another camera. New classes get a new head, as when a model from a hub is fine-tuned.
    """
    name, tuning, make_rng = choice(rng, sorted(IMAGE_NETWORKS)), draw_tuning(rng), spawn(rng)
    network, (n, batch_size, length) = IMAGE_NETWORKS[name], tuning_set(rng)
    same_classes, same_source, classes = chance(rng, 0.35), chance(rng, 0.7), integer(rng, 4, 24)
    others = [s for s in IMAGE_SOURCES if network.channels == 1 or s in ("textures", "shapes")]
    source, wrong = network.source if same_source else choice(rng, others), choice(rng, (0.0, 0.1, 0.2, 0.4))
    contrast, noise, blur = choice(rng, (-1.0, -0.6, 0.4)), uniform(rng, 0.5, 2.0), chance(rng, 0.3)

    def load() -> tuple[Data, Data]:
        data_rng, total = make_rng(), n + 512
        if same_classes:
            images, labels = (t[SEEN:] for t in _images(name))
            keep = torch.randperm(UNSEEN, generator=data_rng)[:total]
            images, labels = images[keep], labels[keep]
            images = F.avg_pool2d(images, 3, 1, 1) if blur else images
            images = contrast * images + noise * torch.randn(images.shape, generator=data_rng)
        else:
            images, labels = _drawn_images(data_rng, source, total, classes, network.channels)
        return split(mislabelled((images, labels), wrong, data_rng), data_rng, held_out=512 / total)

    make = functools.partial(network.make, network.channels, IMAGE_CLASSES)
    outputs = None if same_classes else classes
    return dataset_task(
        lambda: tuned_network(IMAGE_RECIPES[name], make, tuning, outputs),
        load,
        classification,
        batch_size=batch_size,
        length=length,
    )


# --- text -----------------------------------------------------------------------------------------------------------

CONTEXT, MANUAL = 32, 380_000  # characters; the training text begins with Python's manual, code follows
TEXT_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: RecurrentLM("gru", len(CHARACTERS), 24, 96),
    "lstm": lambda: RecurrentLM("lstm", len(CHARACTERS), 32, 80),
    "lstm_two_layers": lambda: RecurrentLM("lstm", len(CHARACTERS), 24, 56, layers=2),
    "transformer": lambda: TransformerLM(len(CHARACTERS), CONTEXT, 48, 2, 4, Style("gelu")),
    "transformer_deep": lambda: TransformerLM(len(CHARACTERS), CONTEXT, 32, 4, 2, Style("relu", "rms")),
    "transformer_wide": lambda: TransformerLM(len(CHARACTERS), CONTEXT, 72, 1, 4, Style("silu")),
}


def _text_pretraining(name: str) -> Task:
    return ModuleTask(
        TEXT_NETWORKS[name],
        lambda rng: windows(characters("train", False)[:MANUAL], CONTEXT, 24, rng),
        next_token,
        length=400,
    )


TEXT_RECIPES = {name: Recipe(f"text_{name}", lambda name=name: _text_pretraining(name)) for name in TEXT_NETWORKS}


class MeanOverTime(nn.Module):
    """``[batch, time, width]`` to ``[batch, width]``, normalised: small features would hold a new head back."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.mean(1), x.shape[2:])


def finetune_text(rng: torch.Generator) -> Task:
    """Character models of Python's manual go on with a piece of code, or learn from which of several files a line is.

    The first is continued pre-training on a little text of another kind, some characters being wrong; the second is
    the classification of texts, with a new head and wrong labels.
    """
    name, make_rng = choice(rng, sorted(TEXT_NETWORKS)), spawn(rng)
    n, batch_size, length = tuning_set(rng)
    classify, classes, wrong = chance(rng, 0.5), integer(rng, 3, 12), choice(rng, (0.0, 0.1, 0.2))
    # Recurrent cells have no layers within that low-rank corrections could stand beside.
    tuning = draw_tuning(rng, ("all", *TUNED) if name.startswith("transformer") else ("all", "all", "head", "upper"))
    place, context, typos = uniform(rng, 0.0, 1.0), integer(rng, 20, CONTEXT), choice(rng, (0.0, 0.0, 0.02, 0.1))

    def load_classes() -> tuple[Data, Data]:
        data_rng, code = make_rng(), characters("train", False)[MANUAL:]
        sections = code[: len(code) // classes * classes].view(classes, -1)
        labels = torch.randint(classes, (n + 512,), generator=data_rng)
        # Lines from a short stretch each: of one file, mostly.
        start = torch.randint(min(20_000, sections.shape[1] - context), (n + 512, 1), generator=data_rng)
        data = sections[labels[:, None], start + torch.arange(context)], labels
        return split(mislabelled(data, wrong, data_rng), data_rng, held_out=512 / (n + 512))

    def load_stretch() -> tuple[Data, Data]:
        data_rng, code = make_rng(), characters("train", False)[MANUAL:]
        size = (n + 512) * (context + 1)  # at most a quarter of the code
        start = int(place * (len(code) - size))
        lines = code[start : start + size].view(n + 512, context + 1)
        typo = torch.rand(lines.shape, generator=data_rng) < typos
        lines = torch.where(typo, torch.randint(len(CHARACTERS), lines.shape, generator=data_rng), lines)
        return split((lines,), data_rng, held_out=512 / (n + 512))

    return dataset_task(
        lambda: tuned_network(
            TEXT_RECIPES[name],
            TEXT_NETWORKS[name],
            tuning,
            classes if classify else None,
            MeanOverTime() if classify else None,
        ),
        load_classes if classify else load_stretch,
        classification if classify else next_token,
        batch_size=batch_size,
        length=length,
    )


FAMILIES = (
    TaskFamily("finetune_images", "pre-trained image classifiers on few, new images", "train", finetune_images),
    TaskFamily("finetune_text", "pre-trained character models on a little code", "train", finetune_text),
)
