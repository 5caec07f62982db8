"""Validation families that fine-tune a network trained before: small data, all layers trained, an early minimum."""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Batch, ModuleTask, Task, TaskFamily
from ..data_images import preprocess
from ..data_optional import LETTERS, SIGNS, letters, photo_patches
from ..data_text import CHARACTERS, VALIDATION_MODULES, characters, module_source, windows
from ..objectives import classification, next_token
from ..pretrained import Recipe, pretrained_state
from ..sampling import Data, choice, dataset_batches, dataset_task, integer, log_int, spawn, uniform


class DenselyConnected(nn.Module):
    """Convolutions that read all maps before them: ``[batch, 3, 28, 28]`` to ``[batch, outputs]``.

    After DenseNet (Huang et al. 2017), with group norms and two strided convolutions to ``[channels, 7, 7]`` in front.
    """

    def __init__(self, channels: int, growth: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels // 2, 3, 2, 1), nn.SiLU(), nn.Conv2d(channels // 2, channels, 3, 2, 1)
        )
        widths = [channels + i * growth for i in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, growth, 3, padding=1)) for width in widths
        )
        self.norm = nn.GroupNorm(4, channels + layers * growth)
        self.head = nn.Linear(9 * (channels + layers * growth), outputs)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        for layer in self.layers:
            maps = torch.cat([maps, layer(maps)], 1)
        # Where in the image something is matters: means over a third of it each way, not over all.
        return self.head(F.adaptive_avg_pool2d(F.silu(self.norm(maps)), 3).flatten(1))


@functools.cache  # a recipe is known by the identity of its function
def image_recipe(channels: int, growth: int, layers: int) -> Recipe:
    """Pre-training on thousands of Latin letters in colour."""

    def make_task() -> Task:
        def load() -> tuple[Data, Data]:
            images, labels = letters(torch.Generator().manual_seed(11), 4000, len(LETTERS), colour=True)
            data = preprocess(images, "standardised"), labels
            return data, data  # nobody asks for the held-out loss

        return dataset_task(
            lambda: DenselyConnected(channels, growth, layers, len(LETTERS)),
            load,
            classification,
            batch_size=48,
            length=400,
        )

    return Recipe(f"val_images_{channels}_{growth}_{layers}", make_task)


def shifted(data: Data, batch_size: int, most: int, rng: torch.Generator) -> Iterator[Data]:
    """Batches of ``(images, labels)`` whose images are shifted together by up to ``most`` pixels each way."""
    for images, labels in dataset_batches(data, batch_size, rng):
        dy, dx = torch.randint(-most, most + 1, (2,), generator=rng).tolist()
        yield images.roll((dy, dx), (2, 3)), labels


def val_fine_tuning_images(rng: torch.Generator) -> Task:
    """A convolutional network that knows Latin letters learns Greek and Cyrillic ones, or about photographs.

    Of photographs it has to say which of two it sees a patch of, and whether upside down. A few hundred examples,
    some wrongly labelled, slightly shifted from batch to batch; all layers are trained, the new head starts at
    random. Held-out labels are right. This is what fine-tuning for lack of data looks like: the held-out loss is
    lowest early, and a rule that steps too far loses what the network knew.
    """
    source = choice(rng, ("signs", "photographs"))
    channels, growth, layers = choice(rng, ((32, 16, 5), (24, 12, 7)))
    classes = 4 if source == "photographs" else integer(rng, 10, 30)
    n, noise, most = log_int(rng, 200, 500), uniform(rng, 0.05, 0.25), integer(rng, 1, 3)
    batch_size, length, make_rng = log_int(rng, 16, 32), log_int(rng, 300, 450), spawn(rng)

    @functools.cache
    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        if source == "signs":
            images, labels = letters(data_rng, n + 400, classes, colour=True, alphabet=SIGNS)
        else:
            sizes = ((n, False), (400, True))  # no pixel is in both parts
            parts = [photo_patches(data_rng, k, 28, "photo_and_mirror", held_out) for k, held_out in sizes]
            images, labels = (torch.cat(pair) for pair in zip(*parts, strict=True))
        images, unseen = preprocess(images, "standardised", reference=images[:n]).split([n, 400])
        wrong = torch.rand(n, generator=data_rng) < noise
        noisy = torch.where(wrong, torch.randint(classes, (n,), generator=data_rng), labels[:n])
        return (images, noisy), (unseen, labels[n:])

    def make_module() -> nn.Module:
        network = DenselyConnected(channels, growth, layers, classes)
        state = pretrained_state(image_recipe(channels, growth, layers))
        fresh = network.head.state_dict(prefix="head.")
        network.load_state_dict({k: fresh.get(k, t) for k, t in state.items()})
        return network

    return ModuleTask(
        make_module,
        lambda batch_rng: shifted(load()[0], batch_size, most, batch_rng),
        classification,
        length=length,
        eval_batch=lambda: load()[1],
    )


class RotaryBlock(nn.Module):
    """Causal attention with queries and keys turned by their place, then a gated network: ``[batch, time, width]``.

    The block of LLaMA (Touvron et al. 2023): RMS norms, no biases. Attention is written out because its fused
    kernels cannot be differentiated twice.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        later = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(later, -math.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, width))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + half) of ``[..., time, size]`` by angles ``[time, size / 2]``."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


class RotaryLM(nn.Module):
    """Language model of ``RotaryBlock``, tied: tokens ``[batch, time]`` to logits ``[batch, time, vocabulary]``."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(RotaryBlock(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.frequencies = 1e3 ** -torch.linspace(0, 1, width // heads // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        time = torch.arange(tokens.shape[1], device=tokens.device)
        angle = time[:, None] * self.frequencies.to(tokens.device)
        cos, sin = angle.cos(), angle.sin()
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x) @ self.embed.weight.T


@functools.cache
def text_recipe(width: int, depth: int) -> Recipe:
    """Pre-training on the documentation strings of ``VALIDATION_MODULES``."""

    def make_task() -> Task:
        def batches(rng: torch.Generator) -> Iterator[Batch]:
            return windows(characters("validation", held_out=False), 48, 12, rng)

        return ModuleTask(lambda: RotaryLM(len(CHARACTERS), width, depth, 4), batches, next_token, length=350)

    return Recipe(f"val_text_{width}_{depth}", make_task)


@functools.cache
def code(module: str) -> str:
    """The code of a module as ``ast`` writes it, without its documentation strings; "" if this Python has no such."""
    pieces = []
    for source in module_source(module):
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                said = ast.get_docstring(node, clean=False) is not None
                node.body = node.body[1:] or [ast.Pass()] if said else node.body
        pieces.append(ast.unparse(tree))
    return "".join(c for c in "\n".join(pieces) if c in CHARACTERS)


def val_fine_tuning_text(rng: torch.Generator) -> Task:
    """A character model of English documentation goes on with some pages of Python code.

    What was written in both is the same language's library, but the code of these modules is not in the text of the
    pre-training. A few thousand characters are read a dozen times and more, as when a language model is fitted to
    one's own small corpus.
    """
    width, depth = choice(rng, ((64, 3), (80, 2)))
    n, order = log_int(rng, 6000, 20000), torch.randperm(len(VALIDATION_MODULES), generator=rng).tolist()
    context, batch_size, length = integer(rng, 28, 40), log_int(rng, 8, 12), log_int(rng, 300, 450)
    make_rng = spawn(rng)

    @functools.cache
    def load() -> tuple[Tensor, Tensor]:
        training, held_out = "", ""
        for i in order:  # as many modules as it takes, the end of each for the held-out loss
            text = code(VALIDATION_MODULES[i])[: 3 * n]
            cut = round(0.7 * len(text))
            training, held_out = training + text[:cut], held_out + text[cut:]
            if len(training) >= n and len(held_out) >= 4000:
                break
        tokens = [torch.tensor([CHARACTERS.index(c) for c in part]) for part in (training[:n], held_out[:20000])]
        return tokens[0], next(windows(tokens[1], context, 64, make_rng()))[0]

    def make_module() -> nn.Module:
        network = RotaryLM(len(CHARACTERS), width, depth, 4)
        network.load_state_dict(pretrained_state(text_recipe(width, depth)))
        return network

    return ModuleTask(
        make_module,
        lambda batch_rng: windows(load()[0], context, batch_size, batch_rng),
        next_token,
        length=length,
        eval_batch=lambda: (load()[1],),
    )


FAMILIES = (
    TaskFamily(
        "val_fine_tuning_images",
        "densely connected networks that know letters, fine-tuned on signs or photographs",
        "validation",
        val_fine_tuning_images,
    ),
    TaskFamily(
        "val_fine_tuning_text",
        "character models of documentation fine-tuned on code",
        "validation",
        val_fine_tuning_text,
    ),
)
