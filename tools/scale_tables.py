"""Tables and picture of docs/scale.md, for readme_tables.py: made of the cells in docs/results/scale."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from learned_optim.bench.scale import report
from learned_optim.bench.scale.cells import read_all
from learned_optim.bench.scale.config import MODELS
from learned_optim.bench.scale.figures import SCHEDULES, OfModel, by_model, compare
from learned_optim.bench.scale.plots import draw
from learned_optim.bench.scale.rivals import ours


class Results(Protocol):
    """Where results files are."""

    folder: Path


def rows(results: Results) -> list[OfModel]:
    """Every model, measured or not."""
    return _rows(results.folder / "scale")


@cache
def _rows(folder: Path) -> list[OfModel]:
    return by_model(read_all(folder), list(MODELS.values()), ("adamw", "muon"))


def scale(results: Results) -> str:
    """Speedups."""
    return report.speedups(rows(results))


def scale_losses(results: Results) -> str:
    """Losses and the rivals' settings."""
    return report.losses(rows(results))


def scale_runs(results: Results) -> str:
    """Models, devices, milliseconds."""
    return report.runs(rows(results))


def speedup_of(model: str, rival: int, policy: str) -> Callable[[Results], str]:
    """Figure within a sentence: in steps, with the rivals' decay; rivals are AdamW and Muon."""

    def figure(results: Results) -> str:
        (row,) = (row for row in rows(results) if row.model.name == model)
        mine = [runs for runs in row.ours if runs.setting == ours(policy)[1]]
        comparison = compare(mine[0], row.rivals[rival]) if mine else None
        return report.MISSING if comparison is None else f"{comparison.steps:.2f}"

    return figure


def evaluation_of(policy: str, results: Results) -> dict[str, Any]:
    """What the card of a policy says of these runs: speedups in steps, of each model that was measured."""
    figures: dict[str, str] = {}
    for row in rows(results):
        for runs, rival in itertools.product(row.ours, row.rivals):
            found = compare(runs, rival) if runs.setting in ours(policy) else None
            if found is not None and runs.setting is not None:
                what = f"{row.model.name}, {SCHEDULES[runs.setting.schedule]}: speedup in steps over {rival.name}"
                figures[what] = report.speedup(found, rival, time=False)
    return {
        "suite": "transformers on text, held-out loss at the end",
        "reference": "AdamW and Muon, tuned for each model, with warm-up and decay",
        "command": f"learned-optim bench --suite scale --policies {policy}",
        "summary": figures,
    }


#: By name.
FIGURES = {
    f"{model.replace('-', '_').replace('.', '_')}{suffix}_{name}": speedup_of(model, i, policy)
    for model in ("text-0.3M", "text-1M")
    for policy, suffix in (("default", ""), ("pretraining", "_pretraining"))
    for i, name in enumerate(("adamw", "muon"))
}


def draw_scale(results: Results, path: Path) -> None:
    """The picture."""
    draw(rows(results), path)
