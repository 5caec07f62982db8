"""Training family on tables with categories: embeddings of columns beside numbers, targets from random trees."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..base import Task, TaskFamily
from ..data_optional import standardise
from ..nets import Residual, Style, initialise, mlp, norm_layer, random_style, transformer_blocks
from ..objectives import classification, regression
from ..sampling import Data, chance, choice, dataset_task, integer, log_int, run_length, spawn, split, uniform
from .embeddings import zipf_ranks
from .vision import hidden_widths, mlp_work


class Table:
    """A generated table: columns of categories of unequal frequency, columns of numbers, a target by random trees.

    The target is a sum of oblivious trees (every level asks one question: is a number above a threshold, is a
    category in a set), as boosting would fit, and of an effect of every category, with noise. Some numbers depend on
    a category, some are heavy-tailed, some are missing (given as the column's mean).
    """

    def __init__(self, rng: torch.Generator, rows: int, cardinalities: list[int], numbers: int, classes: int) -> None:
        self.rows, self.cardinalities, self.numbers, self.classes = rows, cardinalities, numbers, classes
        self.trees, self.depth, self.noise = log_int(rng, 10, 60), integer(rng, 2, 4), uniform(rng, 0.1, 0.6)
        self.exponent, self.missing, self.make_rng = uniform(rng, 0.0, 1.1), choice(rng, (0.0, 0.1)), spawn(rng)

    def load(self) -> tuple[Data, Data]:
        """``((categories int64 [rows, columns], numbers [rows, numbers]), targets)`` flat, training and held-out."""
        rng, n = self.make_rng(), self.rows
        columns = [zipf_ranks(rng, (n,), size, self.exponent) for size in self.cardinalities]
        columns = [torch.randperm(s, generator=rng)[c] for s, c in zip(self.cardinalities, columns, strict=True)]
        x = torch.randn(n, self.numbers, generator=rng)
        for i in range(0, self.numbers, 3):
            of = integer(rng, 0, len(columns) - 1)
            x[:, i] += torch.randn(self.cardinalities[of], generator=rng)[columns[of]]
        outputs = max(1, self.classes)
        score = torch.zeros(n, outputs)
        for _ in range(self.trees):
            leaf = torch.zeros(n, dtype=torch.int64)
            for _ in range(self.depth):
                leaf = 2 * leaf + self._question(rng, columns, x)
            score += torch.randn(2**self.depth, outputs, generator=rng)[leaf]
        score = standardise(score)
        for size, column in zip(self.cardinalities, columns, strict=True):
            score += 0.8 * torch.randn(size, outputs, generator=rng)[column] / len(columns) ** 0.5
        score = standardise(score)
        heavy = torch.rand(self.numbers, generator=rng) < 0.25
        x = standardise(torch.where(heavy, x.clamp(max=4).exp(), x))
        x = x.masked_fill(torch.rand(x.shape, generator=rng) < self.missing, 0.0)
        if self.classes:
            noise = -torch.log(-torch.rand(score.shape, generator=rng).clamp(1e-9, 1 - 1e-7).log())
            targets = (score / self.noise + noise).argmax(1)
        else:
            targets = score + self.noise * torch.randn(score.shape, generator=rng)
        return split((torch.stack(columns, 1), x, targets), rng)

    def _question(self, rng: torch.Generator, columns: list[Tensor], x: Tensor) -> Tensor:
        if chance(rng, 0.5):
            return (x[:, integer(rng, 0, self.numbers - 1)] > 0.8 * float(torch.randn((), generator=rng))).long()
        which = integer(rng, 0, len(columns) - 1)
        return torch.randint(2, (self.cardinalities[which],), generator=rng)[columns[which]]


class Embedded(nn.Module):
    """Categories ``[batch, columns]`` as embeddings beside numbers ``[batch, numbers]``, to a network."""

    def __init__(self, cardinalities: list[int], width: int, scale: float, body: nn.Module) -> None:
        super().__init__()
        # Small columns get few dimensions, as in fastai's rule of thumb.
        tables = [nn.Embedding(size, column_width(size, width)) for size in cardinalities]
        for table in tables:
            nn.init.normal_(table.weight, std=scale)
        self.tables = nn.ModuleList(tables)
        self.body = body

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        embedded = [table(column) for table, column in zip(self.tables, categories.unbind(1), strict=True)]
        return self.body(torch.cat([*embedded, numbers], 1))


def column_width(cardinality: int, most: int) -> int:
    """Dimensions of a column's embedding."""
    return min(most, (cardinality + 1) // 2)


def residual_network(inputs: int, width: int, depth: int, outputs: int, style: Style) -> nn.Sequential:
    """Pre-norm residual blocks of two layers each."""
    norm = "batch" if style.norm == "none" else style.norm
    blocks = [
        Residual(
            nn.Sequential(
                *norm_layer(norm, width), nn.Linear(width, 2 * width), style.act(), nn.Linear(2 * width, width)
            )
        )
        for _ in range(depth)
    ]
    tail = [*norm_layer(norm, width), style.act(), nn.Linear(width, outputs)]
    return nn.Sequential(nn.Linear(inputs, width), *blocks, *tail)


class FeatureTransformer(nn.Module):
    """A token per column, category or number, and one for the answer, through a transformer (FT-Transformer)."""

    offsets: Tensor

    def __init__(
        self, cardinalities: list[int], numbers: int, width: int, depth: int, heads: int, outputs: int, style: Style
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(sum(cardinalities), width)  # one table for all columns
        sizes = torch.tensor(cardinalities)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes)
        bound = width**-0.5
        nn.init.uniform_(self.embed.weight, -bound, bound)
        self.scale, self.shift = (nn.Parameter(torch.empty(numbers, width).uniform_(-bound, bound)) for _ in range(2))
        self.answer = nn.Parameter(torch.empty(1, width).uniform_(-bound, bound))
        self.blocks = transformer_blocks(width, depth, heads, style, causal=False)
        self.output = nn.Linear(width, outputs)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        of_numbers = numbers.unsqueeze(2) * self.scale + self.shift
        answer = self.answer.expand(len(numbers), 1, -1)
        tokens = torch.cat([answer, self.embed(categories + self.offsets), of_numbers], 1)
        return self.output(self.blocks(tokens)[:, 0])


def categorical_tables(rng: torch.Generator) -> Task:
    """Tables as companies have them: products, shops and codes beside amounts, a target of many interactions.

    Perceptrons, residual networks and transformers over columns; two classes, several, or a number.
    """
    cardinalities = [log_int(rng, 2, 2000) for _ in range(integer(rng, 2, 8))]
    numbers, classes, rows = (
        integer(rng, 2, 16),
        choice(rng, (0, 2, 2, integer(rng, 3, 10))),
        log_int(rng, 10000, 60000),
    )
    table = Table(rng, rows, cardinalities, numbers, classes)
    kind, style = choice(rng, ("mlp", "residual", "transformer")), random_style(rng)
    width, scale, outputs = log_int(rng, 4, 32), uniform(rng, 0.05, 1.0), max(1, classes)
    inputs = sum(column_width(size, width) for size in cardinalities) + numbers
    batch_size, depth = log_int(rng, 32, 256), integer(rng, 1, 3)
    hidden, heads = hidden_widths(rng, 32, 160, (1, 4)), choice(rng, (1, 2, 4))
    loss = classification if classes else regression

    def make() -> nn.Module:
        if kind == "transformer":
            own = Style(style.activation, "rms" if style.norm == "rms" else "layer", style.init, style.scale)
            size = 8 * (1 + width // 8)
            return initialise(FeatureTransformer(cardinalities, numbers, size, depth, heads, outputs, own), own)
        if kind == "mlp":
            body: nn.Module = mlp([inputs, *hidden, outputs], style)
        else:
            body = residual_network(inputs, hidden[0], depth, outputs, style)
        return initialise(Embedded(cardinalities, width, scale, body), style)

    if kind == "transformer":
        batch_size = min(batch_size, 64)
        work = batch_size * (1 + len(cardinalities) + numbers) * depth * 12 * (width + 8) ** 2
    else:
        work = batch_size * mlp_work([inputs, *hidden, outputs]) * 3
    return dataset_task(
        make,
        table.load,
        lambda module, batch: loss(functools.partial(_split_inputs, module), (batch[:2], batch[2])),
        batch_size=batch_size,
        length=run_length(rng, 250, 800, work),
    )


def _split_inputs(module: nn.Module, inputs: Data) -> Tensor:
    return module(*inputs)


FAMILIES = (TaskFamily("categorical_tables", "tables with columns of categories", "train", categorical_tables),)
