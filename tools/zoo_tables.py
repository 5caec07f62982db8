"""Tables of docs/zoo.md: training families (zoo.json) and validation families like users' work (users.json)."""

from __future__ import annotations

import math
from statistics import geometric_mean, mean
from typing import Any

from learned_optim.bench import habits_report

Results = dict[str, Any]
Table = dict[str, dict[str, str]]


def zoo(results: Results) -> Table:
    """A row per training family."""
    draws = list(results["zoo"]["draws"].values())
    families: dict[str, list[dict[str, Any]]] = {}
    for draw in draws:
        families.setdefault(draw["family"], []).append(draw)
    return {**{name: _row(some) for name, some in families.items()}, "all": _row(draws)}


def _row(draws: list[dict[str, Any]]) -> dict[str, str]:
    saturated = [draw["saturated"] for draw in draws if draw["saturated"]]
    why = f" ({', '.join(sorted(set(saturated)))})" if saturated else ""
    sizes = [draw["parameters"] for draw in draws]
    return {
        "parameters": f"{min(sizes):,} to {max(sizes):,}",
        "seconds": f"{mean(draw['seconds'] for draw in draws):.1f}",
        "steps, AdamW over default": f"{math.exp(-mean(draw['log_time_ratio'] for draw in draws)):.2f}",
        "default's final loss over AdamW's": f"{geometric_mean(_final(draw) for draw in draws):.2f}",
        "saturated": f"{len(saturated)} of {len(draws)}{why}",
    }


def _final(draw: dict[str, Any]) -> float:
    ours, adamws = (max(draw[name]["losses"][-1], 1e-10) for name in ("default", "adamw"))
    return min(max(ours / adamws, 1e-3), 1e3)  # of a run that fits its data exactly the ratio means nothing


def good_start(results: Results) -> str:
    """The excess error of ``default`` from a good start over AdamW's at the same learning rate."""
    rows = {label: row for section in habits_report.sections(results["habits"]) for label, row in section.rows}
    values = rows["lr 0.001: over AdamW's at the same lr"]["default"]
    return f"{mean(value for value in values if value is not None):.0f}"


#: What the validation families like users' work are, for readers.
USERS = {
    "val_fine_tuning_images": "fine-tuning, images", "val_fine_tuning_text": "fine-tuning, text",
    "val_switching": "targets that switch", "val_fitted_q": "fitted Q", "val_physics_informed": "physics-informed",
    "val_recommender": "recommender", "val_forecasting": "forecasting", "val_graph": "molecules",
    "val_seq2seq": "translation",
}  # fmt: skip
_END, _LOWEST = "held-out loss at the end", "lowest held-out loss"


def users(results: Results) -> Table:
    """The validation families like users' work, as the quality suite saw them; the best first."""
    ours = _contenders(results["users"])["learned: default"]
    table = {}
    for task in sorted(ours["tasks"], key=lambda task: -task["speedup"]):
        held_out = task["held_out"]
        table[USERS[task["task"].partition("/")[0]]] = {
            "speedup in steps": f"{task['speedup']:.2f} ± {task['spread']:.2f}",
            "cost of an iteration": f"{task['time_ratio']:.2f}",
            "speedup in time": f"{task['speedup'] / task['time_ratio']:.2f}",
            **{name: f"{held_out[name]['loss'] / held_out[name]['reference_loss']:.2f}" for name in (_END, _LOWEST)},
        }
    summary = ours["summary"]
    table["geometric mean"] = {
        "speedup in steps": f"{summary['speedup']:.2f} ± {summary['spread']:.2f}",
        "cost of an iteration": f"{summary['time_ratio']:.2f}",
        "speedup in time": f"{summary['time_speedup']:.2f}",
        **{name: f"{summary['held_out_ratios'][name]:.2f}" for name in (_END, _LOWEST)},
    }
    return table


def users_steps(results: Results) -> str:
    """Speedup in steps on the validation families like users' work, geometric mean."""
    return f"{_contenders(results['users'])['learned: default']['summary']['speedup']:.1f}"


def users_time(results: Results) -> str:
    """The same in time."""
    return f"{_contenders(results['users'])['learned: default']['summary']['time_speedup']:.1f}"


def rivals(results: Results) -> Table:
    """All optimizers on the same tasks, in summary, over AdamW tuned per task."""
    table = {}
    for name, contender in _contenders(results["rivals"]).items():
        summary = contender["summary"]
        table[name] = {
            "speedup in steps": f"{summary['speedup']:.2f}",
            "worst": f"{summary['worst']:.2f}, {USERS[summary['worst_task'].partition('/')[0]]}",
            "speedup in time": f"{summary['time_speedup']:.2f}",
            **{figure: f"{summary['held_out_ratios'][figure]:.2f}" for figure in (_END, _LOWEST)},
        }
    return table


def _contenders(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in values["quality"]["contenders"] if c["name"] != "AdamW, tuned"}
