"""Tables of docs/zoo.md: training families (zoo.json) and validation families like users' work (users.json)."""

from __future__ import annotations

import math
from statistics import geometric_mean, mean
from typing import Any

from learned_optim.bench import habits_report
from learned_optim.tasks import FAMILIES

Results = dict[str, Any]
Table = dict[str, dict[str, str]]


def zoo(results: Results) -> Table:
    """A row per training family."""
    draws = list(results["zoo"]["draws"].values())
    families: dict[str, list[dict[str, Any]]] = {}
    for draw in draws:
        families.setdefault(draw["family"], []).append(draw)
    table = {name: _row(FAMILIES[name].description, some) for name, some in families.items()}
    return {**table, "all": _row("", draws)}


def _row(description: str, draws: list[dict[str, Any]]) -> dict[str, str]:
    saturated = [draw["saturated"] for draw in draws if draw["saturated"]]
    sizes = [draw["parameters"] for draw in draws]
    return {
        "what": description,
        "parameters": f"{min(sizes):,} to {max(sizes):,}",
        "seconds": f"{mean(draw['seconds'] for draw in draws):.1f}",
        "steps, AdamW over default": f"{math.exp(-mean(draw['log_time_ratio'] for draw in draws)):.2f}",
        "default's final loss over AdamW's": f"{geometric_mean(_final(draw) for draw in draws):.2f}",
        "saturated": f"{len(saturated)} of {len(draws)}" + (f" ({', '.join(sorted(set(saturated)))})" if saturated else ""),
    }


def _final(draw: dict[str, Any]) -> float:
    ours, adamws = (max(draw[name]["losses"][-1], 1e-10) for name in ("default", "adamw"))
    return min(max(ours / adamws, 1e-3), 1e3)  # of a run that fits its data exactly the ratio means nothing


def good_start(results: Results) -> str:
    """The excess error of ``default`` from a good start over AdamW's at the same learning rate."""
    rows = {label: row for section in habits_report.sections(results["habits"]) for label, row in section.rows}
    values = rows["lr 0.001: over AdamW's at the same lr"]["default"]
    return f"{mean(value for value in values if value is not None):.0f}"


def users(results: Results) -> Table:
    """The validation families like users' work, as the quality suite saw them."""
    table: Table = {}
    for name, row in results["users"]["quality"]["table"].items():
        table[name] = row
    return table
