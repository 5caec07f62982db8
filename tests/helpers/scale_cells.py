"""Cells of the scale suite that were never run: made-up curves, and a corpus of made-up tokens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from learned_optim.bench.scale.cells import EVALUATIONS, Cell, Result, speedup
from learned_optim.bench.scale.config import MODELS, VOCABULARY, Model
from learned_optim.bench.scale.rivals import Setting, shorter
from learned_optim.bench.scale.text import FORMAT

SMALL = MODELS["text-0.3M"]


def cell(setting: Setting, model: Model = SMALL, seed: int = 0, device: str = "cpu", policy: str = "") -> Cell:
    return Cell(model, setting, seed, device, "text" if model.line == "text" else "", policy)


def result(cell: Cell, quickness: float = 1.0, *, update: float = 0.1, date: str = "2026-01-01") -> Result:
    """A loss of ``1 + (1 + t)^-1/2`` in t = ``quickness`` x steps; ``inf`` throughout where that is 0."""
    at = np.round(np.linspace(0, cell.steps, EVALUATIONS + 1))
    losses = 1.0 + (1.0 + quickness * at) ** -0.5 if quickness else np.full(len(at), math.inf)
    return Result(cell, at, losses, losses[1:], 1.0 + update, update, {"date": date})


def judged(ours: list[Result], rival: list[Result]) -> tuple[float, bool]:
    """The speedup, and whether no run is missing."""
    found = speedup(ours, rival)
    assert found is not None
    return found.value, found.is_final


def lengths(whole: Setting) -> list[Setting]:
    """A setting, and the same over fewer and fewer steps."""
    settings: list[Setting] = []
    following: Setting | None = whole
    while following is not None:
        settings.append(following)
        following = shorter(following)
    return settings


def write_corpus(folder: Path, tokens: int = 30_000) -> Path:
    """Tokens that follow one another in cycles with some noise, where the suite looks for its text."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, VOCABULARY, tokens)
    stream = np.where(rng.random(tokens) < 0.3, noise, 3 * np.arange(tokens) % 97).astype(np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"text-{FORMAT}-{VOCABULARY}.npz"
    np.savez(path, train=stream[: -tokens // 5], held_out=stream[-tokens // 5 :], characters=2.5)
    return path
