"""What the scale suite measures: its models and its options. Without torch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

Line = Literal["text", "images"]
Rival = Literal["adamw", "muon", "soap"]
Device = Literal["cpu", "cuda"]

VOCABULARY = 1536
CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Model:
    """A network of one line, and how long it is trained.

    Args:
        name: what tables and ``--models`` call it.
        line: ``text`` is a transformer of width ``32 depth``; ``images`` is a ConvNeXt of three stages, the first of
            them ``width`` wide, with ``depth`` blocks each, ``width`` about ``8 depth``.
        depth: blocks (of each stage).
        width: of the residual stream (of the first stage).
        batch: sequences or images per step.
        steps: of a whole run.
        context: tokens per sequence.
        parameters: all of them, embeddings included.
        seeds: runs of the settings that are compared in the end.
        device: where it is run if ``--models`` names none.
    """

    name: str
    line: Line
    depth: int
    width: int
    batch: int
    steps: int
    context: int
    parameters: int
    seeds: int = dataclasses.field(default=2, compare=False)
    device: Device = dataclasses.field(default="cpu", compare=False)

    @property
    def samples(self) -> float:
        """Tokens (images) that are seen, per parameter."""
        return self.steps * self.batch * max(self.context, 1) / self.parameters

    @property
    def work(self) -> float:
        """Floating-point operations of a whole run's gradients."""
        if self.line == "text":
            attention = 2 * self.depth * self.width * self.context  # causal: half of the products are needed
            return 6.0 * self.steps * self.batch * self.context * (self.parameters + attention)
        # Each stage has as much work as the first: twice the width, a quarter of the positions. 400: as convnext.py.
        return 6.0 * self.steps * self.batch * 144 * self.depth * 3 * (8 * self.width**2 + 400 * self.width)


def _text(name: str, depth: int, batch: int, steps: int, context: int, parameters: int, **more: Any) -> Model:
    return Model(f"text-{name}", "text", depth, 32 * depth, batch, steps, context, parameters, **more)


def _images(name: str, depth: int, width: int, parameters: int, **more: Any) -> Model:
    # The same images for all sizes: there is only one label in each.
    return Model(f"images-{name}", "images", depth, width, 128, 2000, 0, parameters, **more)


#: Text: 4 tokens per parameter. Images: 256,000 for every size.
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _text("0.3M", 2, 8, 1150, 128, 294_208),
        _text("1M", 4, 16, 2314, 128, 1_184_896),
        _text("3M", 6, 32, 3170, 128, 3_246_528, device="cuda"),
        _text("12M", 10, 64, 3248, 256, 13_303_360, seeds=1, device="cuda"),
        _text("40M", 15, 128, 2622, 512, 42_961_440, seeds=1, device="cuda"),
        _text("124M", 21, 128, 7073, 512, 115_892_448, seeds=1, device="cuda"),
        _images("0.1M", 2, 16, 110_932),
        _images("0.3M", 3, 24, 341_020, device="cuda"),
        _images("1M", 4, 36, 972_784, device="cuda"),
        _images("3M", 6, 52, 2_930_768, seeds=1, device="cuda"),
        _images("10M", 10, 80, 11_233_300, seeds=1, device="cuda"),
    )
}


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """Speedup against size: ours with default arguments against optimizers tuned for each model.

    Args:
        policies: to measure: bundled names, folders or Hub ids.
        models: names or patterns, as ``text-*``; none means those of the device: the small ones on ``cpu``, the others
            on ``cuda``.
        cells: patterns of the runs that are made, as ``*.muon.*``; ``--dry-run`` lists their names. Runs over fewer
            steps, which speedups with a schedule need, are ``*.part*``.
        rivals: what ours is compared with, each tuned.
        exponents: ours runs at the default learning rate times these powers of two, too: does it remain right?
        minutes: no run is begun that is not expected to end within them, and one under way is kept and stopped; 0 is
            without limit.
        device: ``cuda`` trains in bfloat16 autocast with compiled models.
        dry_run: only show what is missing and write the report of what is there.
        quick: models of two blocks, 20 steps: a look at the tool, not a measurement.
        cache: folder of the text once it is tokens; none means ``learned_optim/bench`` in ``$XDG_CACHE_HOME`` or
            ``~/.cache``. Text that is there is taken, whatever machine it comes from.

    Raises:
        ValueError: a value out of range, with what was found.
    """

    policies: tuple[str, ...] = ("default",)
    models: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ("adamw", "muon")
    exponents: tuple[int, ...] = ()
    minutes: float = 0.0
    device: Device = "cpu"
    dry_run: bool = False
    quick: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError(f"ScaleConfig.policies must be at least one name, found {self.policies}")
        if self.minutes < 0:
            raise ValueError(f"ScaleConfig.minutes must be 0 or more, found {self.minutes}")
        for pattern in self.models:
            if not any(fnmatch(name, pattern) for name in MODELS):
                raise ValueError(f"ScaleConfig.models must be names or patterns of {list(MODELS)}, found {pattern!r}")

    def chosen(self) -> tuple[Model, ...]:
        """The models, smallest first, text before images; with ``quick`` small stand-ins of the same names."""
        wanted = self.models
        models = [m for m in MODELS.values() if any(fnmatch(m.name, p) for p in wanted)] if wanted else [
            m for m in MODELS.values() if m.device == self.device
        ]  # fmt: skip
        return tuple(quick(m) for m in models) if self.quick else tuple(models)


def quick(model: Model) -> Model:
    """The same line with the smallest model, for 20 steps."""
    first = MODELS["text-0.3M" if model.line == "text" else "images-0.1M"]
    return dataclasses.replace(first, name=model.name, steps=20, batch=4, seeds=model.seeds)


def ladder(models: Sequence[Model]) -> tuple[Model, ...]:
    """All models, smallest first line by line, of which some are given: quick ones, if those are."""
    quickly = any(model != MODELS[model.name] for model in models)
    return tuple(quick(model) if quickly else model for model in MODELS.values())
