"""Choosing settings on validation articles: where each search begins, its steps, and the articles that it reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from data import Article
from read import Method, Reader, cache_losses
from torch import Tensor

#: Dynamic evaluation: where the search for its settings begins (eps in units of the gradient's rms), and the weights
#: that it moves. First of the LSTM's weights, as it was published; then with the memory that the learned rule has, too.
BEGIN = {
    "sgd": (Method("sgd", lr=0.5, decay=0.002), "lstm"),
    "adam": (Method("adam", lr=3e-3, decay=0.002, eps=1.0), "lstm"),
    "rms": (Method("rms", lr=3e-3, decay=0.002, eps=1.0), "lstm"),
    "rms_memory": (Method("rms", lr=0.1, decay=0.002, eps=16.0), "memory"),
    "rms_all": (Method("rms", lr=3e-3, decay=0.002, eps=1.0), "all"),
}
#: Factors tried one after the other, around the best so far; the same for every method.
SEARCH = (
    ("lr", (1 / 3, 3.0)), ("memory", (1 / 3, 3.0)), ("eps", (1 / 4, 4.0)), ("decay", (1 / 4, 4.0)), ("lr", (0.6, 1.7)),
    ("memory", (0.6, 1.7)), ("clip", (0.5, 2.0)),
)  # fmt: skip


def cut(articles: Sequence[Article], words: int) -> list[Article]:
    """Beginnings of the articles, about ``words`` words together; of fewer articles rather than of under 1000 words."""
    longest = max(1000, words // len(articles))
    total = sum(min(len(a.tokens), longest) for a in articles)
    selected = articles[:: max(1, round(total / words))]
    return [Article(a.title, a.words[:longest], a.tokens[:longest]) for a in selected]


def thinned(articles: Sequence[Article], words: int) -> list[Article]:
    """Every n-th article, so that they have at most about ``words`` words together."""
    return list(articles)[:: max(1, math.ceil(sum(len(a.tokens) for a in articles) / words))]


def mean_loss(reader: Reader, articles: Sequence[Article], method: Method) -> float:
    """Nats per word over whole articles; infinite for what diverges."""
    losses = torch.cat([reader.read(a.tokens, method).losses for a in articles])
    value = float(losses.double().mean())
    return value if math.isfinite(value) else math.inf


def tune(begin: Method, loss: Callable[[Method], float], memory: bool = False) -> tuple[Method, list[dict[str, float]]]:
    """Coordinate search by the steps of ``SEARCH``, the memory's where a method has one beside others to set."""
    tried: dict[Method, float] = {}

    def value(method: Method) -> float:
        if method not in tried:
            tried[method] = loss(method)
        return tried[method]

    best = begin
    value(best)
    for name, factors in SEARCH:
        if getattr(best, name) == 0.0 or (name == "memory" and not memory):
            continue
        for factor in factors:
            moved = dataclasses.replace(best, **{name: getattr(best, name) * factor})
            # As long as it gets better by more than a hair, go on in that direction.
            while value(moved) < value(best) - 5e-4:
                best, moved = moved, dataclasses.replace(moved, **{name: getattr(moved, name) * factor})
    without = dataclasses.replace(best, decay=0.0)
    best = without if value(without) < value(best) else best
    return best, [{**method.settings(), "loss": loss} for method, loss in tried.items()]


def tune_cache(articles: Sequence[Article], losses: Sequence[Tensor]) -> dict[str, float]:
    """The mixture's weight and the cache's memory, by a grid."""
    weights, memories = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5), (30.0, 100.0, 300.0, 1000.0)
    grid = [(weight, memory) for weight in weights for memory in memories]

    def mean(weight: float, memory: float) -> float:
        mixed = (cache_losses(l, a.tokens, weight, memory) for a, l in zip(articles, losses, strict=True))
        return float(torch.cat(list(mixed)).mean())

    weight, memory = min(grid, key=lambda setting: mean(*setting))
    return {"weight": weight, "memory": memory}
