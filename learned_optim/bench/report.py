"""What the quality suite shows: Markdown tables, and ``results.json`` (:mod:`learned_optim.policy.results`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from learned_optim.bench.figures import Comparison, Summary, compare_all, summarise
from learned_optim.bench.quality import FIXED, HELD_OUT, REFERENCE, Contender, QualityResult
from learned_optim.policy.files import write_atomically
from learned_optim.policy.markdown import table
from learned_optim.policy.results import validate

DEFINITION = (
    "Speedup: steps the reference needs to reach its own final smoothed training loss / steps the contender needs to "
    "reach it; where it never does, the part of its run the reference needs to reach the contender's final loss "
    "(below 1). Every contender trains as many steps as the reference."
)


def markdown(result: QualityResult, looks: int | None = None) -> str:
    """All tables.

    Args:
        result: what was measured.
        looks: how often policies were compared on validation tasks so far, this time included.
    """
    subject = result.subject()
    seeds = result.config.seeds
    lines = [
        f"# Quality: {subject.name} on {len(result.tasks)} tasks, {seeds} seed{'s' * (seeds > 1)}", "",
        "## Against optimizers tuned per task", "", *summary_table(result), "",
        f"## Task by task: {subject.name} against {_reference(result)}", "", *task_table(result, subject), "",
    ]  # fmt: skip
    if any(c.held_out for c in compare_all(result, subject.name, REFERENCE)):
        lines += [
            "## Held-out loss", "", "Over that of AdamW, both at the setting whose own figure is the lowest; below 1 "
            "is better. Geometric means.", "", *held_out_table(result), "",
            f"{subject.name}, task by task:", "", *held_out_task_table(result, subject), "",
        ]  # fmt: skip
    if any(c.role == "ablation" for c in result.contenders):
        lines += ["## Ablations", "", *ablation_table(result), ""]
    lines += ["## Notes", "", f"- {DEFINITION}"]
    lines.append("- Held-out columns of the first two tables: at the settings whose training loss is the lowest.")
    lines.append("- Time per step: processor seconds of one thread, over those of the reference.")
    lines += [f"- {note}" for note in result.notes]
    if looks is not None:
        lines.append(f"- Policies were compared on validation tasks {looks} times so far, with this cache.")
    return "\n".join(lines) + "\n"


def summary_table(result: QualityResult) -> list[str]:
    """Geometric-mean speedups of every contender over the references; the rest is over tuned AdamW."""
    names = [c.name for c in result.contenders if c.role == "baseline"]
    others = [name for name in names if name != REFERENCE]
    rows = []
    for c in result.contenders:
        if c.role == "ablation" or c.name == REFERENCE:
            continue
        over = {name: summarise(compare_all(result, c.name, name)) for name in names if name != c.name}
        s = over[REFERENCE]
        rows.append([
            c.name, _plus_minus(s), *(_ratio(over[name].speedup) if name in over else "–" for name in others),
            f"{_ratio(s.worst)} ({s.worst_task})" if s.worst else "–", f"{s.losses} of {s.tasks}",
            _ratio(s.held_out_speedup), _percent(s.held_out_ratio), _ratio(s.time_ratio), _ratio(s.time_speedup),
            str(s.diverged),
        ])  # fmt: skip
    head = ["", f"speedup over {REFERENCE}", *(f"over {name}" for name in others), "worst task", "tasks lost",
            "held-out speedup", "held-out loss at the end", "time per step", "speedup in time",
            "diverged runs"]  # fmt: skip
    return table(head, rows)


def task_table(result: QualityResult, contender: Contender) -> list[str]:
    """One contender against tuned AdamW, task by task, the best first."""
    comparisons = sorted(compare_all(result, contender.name, REFERENCE), key=lambda c: -(c.speedup or 0.0))
    by_name = {task.task: task for task in result.tasks}
    rows = []
    for c in comparisons:
        task = by_name[c.task]
        spread = f" ± {c.spread:.2f}" if c.spread is not None else ""
        rows.append([
            c.task, str(task.steps), "diverged" if c.diverged else _ratio(c.speedup) + spread,
            _ratio(c.held_out_speedup), _number(c.loss), _number(c.reference_loss),
            _number(c.held_out_loss), _number(c.reference_held_out_loss), _ratio(c.time_ratio), _ratio(c.time_speedup),
            str(task.choices[REFERENCE].setting),
        ])  # fmt: skip
    head = ["task", "steps", "speedup", "held-out speedup", "loss", "AdamW's", "held-out loss", "AdamW's",
            "time per step", "speedup in time", "AdamW's best setting"]  # fmt: skip
    return table(head, rows, left=(0, 10))


def held_out_table(result: QualityResult) -> list[str]:
    """Both held-out figures of every contender over those of AdamW chosen by the same figure."""
    rows = []
    for c in result.contenders:
        if c.role != "ablation" and c.name != REFERENCE:
            ratios = summarise(compare_all(result, c.name, REFERENCE)).held_out_ratios
            rows.append([c.name, *(_ratio(ratios[figure]) for figure in HELD_OUT)])
    return table(["", *HELD_OUT], rows)


def held_out_task_table(result: QualityResult, contender: Contender) -> list[str]:
    """Both held-out figures of one contender, task by task."""
    rows = []
    for c in compare_all(result, contender.name, REFERENCE):
        figures = [c.held_out[figure] for figure in HELD_OUT if figure in c.held_out]
        cells = [(_number(f.loss), _number(f.reference_loss), _ratio(f.ratio), f.reference_setting) for f in figures]
        rows.append([c.task, *(cell for four in cells or [("–",) * 4] * len(HELD_OUT) for cell in four)])
    head = [word for figure in HELD_OUT for word in (figure, "AdamW's", "ratio", "AdamW's setting")]
    return table(["task", *head], rows, left=(0, 4, 8))


def ablation_table(result: QualityResult) -> list[str]:
    """What each part pays: AdamW, then the ablations, then what the policy itself does."""
    rows = []
    for c in [c for c in result.contenders if c.name == FIXED or c.role in ("ablation", "learned")]:
        if c.role == "learned" and c is not result.subject():
            continue
        s = summarise(compare_all(result, c.name, REFERENCE))
        rows.append([c.name, _plus_minus(s), f"{_ratio(s.worst)} ({s.worst_task})" if s.worst else "–",
                     _percent(s.held_out_ratio), _ratio(s.time_ratio), str(s.diverged)])  # fmt: skip
    order = {FIXED: 0, result.subject().name: 2}
    rows = [[REFERENCE, "1", "1", "0%", "1", "–"], *sorted(rows, key=lambda row: order.get(row[0], 1))]
    head = ["", f"speedup over {REFERENCE}", "worst task", "held-out loss at the end", "time per step", "diverged runs"]
    return table(head, rows)


def results(result: QualityResult, contender: Contender | None = None, *, command: str = "") -> dict[str, Any]:
    """What goes into ``results.json`` of a policy: what its own results held, with the evaluation replaced.

    Besides what the card shows, ``quality`` holds the figures of all contenders.

    Args:
        result: what was measured.
        contender: with the policy in question; the subject if ``None``.
        command: that made the result.
    """
    contender = contender or result.subject()
    comparisons = compare_all(result, contender.name, REFERENCE)
    own = dict((contender.policy.results if contender.policy is not None else None) or {})
    splits = {task.task: task.split for task in result.tasks}
    tasks = [
        {
            "task": c.task, "split": splits[c.task] or None,
            "speedup": None if c.diverged else c.speedup, "spread": None if c.diverged else c.spread,
            "time_ratio": c.time_ratio,
            "loss": c.loss, "reference_loss": c.reference_loss,
            "held_out_loss": c.held_out_loss, "reference_held_out_loss": c.reference_held_out_loss,
            "diverged": c.diverged > 0,
        }
        for c in comparisons
    ]  # fmt: skip
    made: dict[str, Any] = {
        "suite": "quality, " + " ".join(result.config.tasks) + " tasks", "command": command or None,
        "seeds": list(range(result.config.seeds)), "reference": _reference(result), "tasks": tasks,
        "summary": _summary(result, contender),
    }  # fmt: skip
    own["evaluation"] = {key: value for key, value in made.items() if value is not None}
    own["quality"] = _everything(result)
    validate(own)
    return own


def write_results(folder: Path, values: dict[str, Any]) -> None:
    """Write ``results.json`` into ``folder``."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "results.json", text.encode())


def _summary(result: QualityResult, contender: Contender) -> dict[str, float | str]:
    baselines = [c.name for c in result.contenders if c.role == "baseline"]
    summary: dict[str, float | str | None] = {}
    for name in baselines:
        s = summarise(compare_all(result, contender.name, name))
        summary[f"speedup over {name}, geometric mean"] = s.speedup
        if name == REFERENCE:
            summary["spread over seeds, of its logarithm"] = s.spread
            summary["worst task"] = s.worst
            summary["runs that diverged"] = s.diverged
            summary["held-out speedup, geometric mean"] = s.held_out_speedup
            summary["held-out loss at the end, over the reference's, geometric mean"] = s.held_out_ratio
            for figure, ratio in s.held_out_ratios.items():
                summary[f"{figure}, over that of AdamW chosen by it, geometric mean"] = ratio
            summary["time per step, over the reference's"] = s.time_ratio
            summary["speedup in time, geometric mean"] = s.time_speedup
    tuned = [c for c in result.contenders if c.role == "learned, tuned" and c.label == contender.label]
    for c in tuned:
        for name in baselines:
            s = summarise(compare_all(result, c.name, name))
            summary[f"speedup over {name}, geometric mean, lr tuned too"] = s.speedup
    for c in [c for c in result.contenders if c.role == "ablation" and c.label == contender.label]:
        summary[f"speedup over {REFERENCE}, {c.name}"] = _plus_minus(summarise(compare_all(result, c.name, REFERENCE)))
    return {key: _rounded(value) for key, value in summary.items() if value is not None}


def _everything(result: QualityResult) -> dict[str, Any]:
    contenders = []
    for c in result.contenders:
        comparisons = compare_all(result, c.name, REFERENCE)
        contenders.append({
            "name": c.name, "role": c.role, "settings": len(c.settings),
            "policy": c.policy.fingerprint() if c.policy is not None else None,
            "summary": _plain(summarise(comparisons)),
            "tasks": [
                {**_plain(comparison), "setting": str(task.choices[c.name].setting), "steps": task.steps,
                 "parameters": task.choices[c.name].runs[0].parameters}
                for task, comparison in zip(result.tasks, comparisons, strict=True)
            ],
        })  # fmt: skip
    return {
        "reference": _reference(result), "definition": DEFINITION, "config": result.config.to_dict(),
        "notes": list(result.notes), "contenders": contenders,
    }  # fmt: skip


def _reference(result: QualityResult) -> str:
    count = len(next(c for c in result.contenders if c.name == REFERENCE).settings)
    return f"AdamW, best of {count} settings per task"


def _plain(values: Comparison | Summary) -> dict[str, Any]:
    return _rounded(dataclasses.asdict(values))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _plus_minus(s: Summary) -> str:
    if s.speedup is None:
        return "–"
    return _ratio(s.speedup) + (f" ± {s.speedup * s.spread:.2f}" if s.spread is not None else "")


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio - 1.0:+.1%}"
