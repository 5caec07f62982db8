"""The model card: what ``config.json``, the weights and ``results.json`` say, in words, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from learned_optim.policy import markdown as md
from learned_optim.policy.fingerprint import fingerprint
from learned_optim.policy.results import is_number, validate
from learned_optim.rule.config import PolicyConfig

_METRICS = ("speedup", "loss", "held_out_loss")
_PLOT_WIDTH = 20
_NAMED = 6  # families of tasks that are named; of more, their number is

#: Columns of the table of tasks: what each says, and from which value on the reference is ahead.
_STEPS, _TIME, _HELD_OUT = "speedup in steps", "speedup in time", "held-out loss"
_MEANINGS = {
    _STEPS: "the reference's steps to its own final loss, over this rule's",
    _TIME: "the same in time",
    _HELD_OUT: "at the end, over the reference's",
}


def model_card(
    config: PolicyConfig,
    weights: Mapping[str, Tensor],
    results: Mapping[str, Any] | None = None,
    *,
    repo_id: str | None = None,
) -> str:
    """The card of a policy, as Markdown with the Hub's metadata block; the same for the same arguments.

    Args:
        config: the policy's.
        weights: the policy's.
        results: what was measured, if anything.
        repo_id: Hub repository that the lines of usage name; ``None`` for the bundled name, or else a folder.

    Raises:
        ValueError: ``results`` are not as :mod:`learned_optim.policy.results` wants them.
    """
    results = results or {}
    validate(results)
    bundled_as = results.get("bundled_as")
    name = repo_id or bundled_as or "path/to/this/folder"
    title = repo_id.partition("/")[2] if repo_id else bundled_as
    what = "An update rule (*policy*) for `learned_optim`, a drop-in `torch.optim` optimizer."
    lines = [
        *_metadata(results), "",
        f"# {md.text(title) or 'An update rule'}", "",
        " ".join(filter(None, (what, md.text(results.get("purpose"))))), "",
        "```python", "from learned_optim import LearnedOptimizer", "",
        f"optimizer = LearnedOptimizer(model.parameters(), policy={json.dumps(md.plain(name))})", "```", "",
        "## What it gains", "", *evaluation(results), "",
        *(["## Habits", "", *shown, ""] if (shown := habits(results)) else []),
        "## How it was made", "", *training(results), "",
        "## The rule", *architecture(config, weights), "",
        "## Limits", "", *_limits(config, results),
    ]  # fmt: skip
    if results:
        lines += ["", "Everything that was measured is in [results.json](results.json)."]
    return "\n".join(lines) + "\n"


def architecture(config: PolicyConfig, weights: Mapping[str, Tensor]) -> list[str]:
    """What the rule is, line by line as a Markdown list."""
    count = sum(weight.numel() for weight in weights.values())
    trained = any(bool(weight.detach().count_nonzero()) for weight in weights.values())
    mixture = {"momentum": config.momentum_weight, "gradient": config.gradient_weight}
    mixture |= {f"h_{j}": weight for j, weight in enumerate(config.hidden_weights, start=1)}
    start = " + ".join(f"{weight:g}·{name}" for name, weight in mixture.items())
    return [
        "",
        f"- cell: {config.cell}, {config.hidden_size} hidden unit{'s' * (config.hidden_size > 1)} per coordinate, "
        "beside Adam's two moments",
        f"- meta-parameters: {count}" + ("" if trained else ", all of them zero: the rule is its base mixture"),
        f"- base mixture: `{config.step_scale:g}·lr·({start})`, caution {config.caution:g}",
        *([_orthogonalised(config)] if config.orthogonal else []),
        f"- decays {config.betas[0]:g} and {config.betas[1]:g}, eps {config.eps:g}",
        f"- fingerprint: `{fingerprint(config, weights)}`, format {config.format_version}",
    ]


def _orthogonalised(config: PolicyConfig) -> str:
    method = config.orthogonal_method.replace("_", "-")
    how = f"by {config.orthogonal:g} ({method}, {config.orthogonal_iterations} iterations)"
    if config.orthogonal_block:
        how += f" in blocks of at most {config.orthogonal_block} rows"
    if config.orthogonal_damping:
        how += f", damped by (cosine / {config.orthogonal_damping_threshold:g})^{config.orthogonal_damping:g}"
    return f"- matrices: orthogonalised {how}; not those of {config.orthogonal_aspect:g} rows per column or more"


def training(results: Mapping[str, Any]) -> list[str]:
    """How the rule was made, as far as the results say."""
    made = results.get("training") or {}
    tasks = [md.text(task) for task in made.get("tasks") or []]
    effort = (
        f"{md.number(made['outer_steps'])} outer steps" if made.get("outer_steps") is not None else "",
        f"{md.number(made['core_hours'])} core hours" if made.get("core_hours") is not None else "",
        f"seeds {seeds}" if (seeds := md.seeds(made.get("seeds"))) else "",
    )
    shown = [
        ("method", md.text(made.get("method"))),
        ("tasks", ", ".join(tasks) if len(tasks) <= _NAMED else f"{len(tasks)} families of small ones"),
        ("effort", ", ".join(filter(None, effort))),
        ("command", md.code(made.get("command"))),
    ]
    return [f"- {name}: {value}" for name, value in shown if value] or ["Not recorded."]


def evaluation(results: Mapping[str, Any]) -> list[str]:
    """Table and plot of the tasks, the best first and those that diverged at the end; or "Not evaluated."."""
    measured = results.get("evaluation") or {}
    tasks = sorted(measured.get("tasks") or [], key=_rank)
    if not tasks and not measured.get("summary"):
        return ["Not evaluated."]
    over = f"Over {reference}. " if (reference := md.text(measured.get("reference"))) else ""
    lines = [*_table(tasks, over), ""] if tasks else [*md.table(("", "measured"), _figures(measured["summary"])), ""]
    if any((task.get("speedup") or 0.0) > 0.0 for task in tasks):
        lines += [*_plot(tasks), ""]
    shown = [
        ("suite", md.text(measured.get("suite"))),
        ("reference", reference),
        ("seeds", md.seeds(measured.get("seeds"))),
        ("command", md.code(measured.get("command"))),
    ]
    lines += [f"- {verdict}" for verdict in _verdict(tasks)]
    return lines + [f"- {name}: {value}" for name, value in shown if value]


def summary(results: Mapping[str, Any]) -> list[str]:
    """The figures over all tasks, which the card leaves to the table."""
    figures = (results.get("evaluation") or {}).get("summary") or {}
    return [f"- {name}: {value}" for name, value in _figures(figures)]


def habits(results: Mapping[str, Any]) -> list[str]:
    """What the rule does on noise, after changes and the like, where that was measured."""
    measured = results.get("habits") or {}
    figures, command = _figures(measured.get("figures") or {}), md.code(measured.get("command"))
    lines = [*md.table(("habit", "measured"), figures), ""] if figures else []
    return lines + ([f"- command: {command}"] if command else [])


def _figures(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(md.text(key), md.number(v) if is_number(v) else md.text(v)) for key, v in values.items()]


def notes(results: Mapping[str, Any]) -> list[str]:
    """Limits and remarks that the results hold."""
    return [md.text(note) for note in results.get("notes") or []]


def _metadata(results: Mapping[str, Any]) -> list[str]:
    tasks = (results.get("evaluation") or {}).get("tasks") or []
    metrics = [metric for metric in _METRICS if any(task.get(metric) is not None for task in tasks)]
    lists = {
        "tags": ["learned-optim", "learned-optimizer", "meta-learning", "optimizer", "pytorch"],
        "metrics": metrics,
        "datasets": results.get("datasets") or [],
    }
    lines = ["---", "library_name: learned-optim"]
    if results.get("license"):
        lines.append(f"license: {md.yaml(results['license'])}")
    for key, values in lists.items():
        lines += [f"{key}:", *(f"- {md.yaml(value)}" for value in values)] if values else []
    return [*lines, "---"]


def _verdict(tasks: list[Mapping[str, Any]]) -> list[str]:
    known = [task for task in tasks if task.get("speedup") is not None]
    lost = [task for task in known if task["speedup"] < 1.0 or task.get("diverged")]
    lost += [task for task in tasks if task.get("diverged") and task not in lost]
    if not known and not lost:
        return []
    names = ": " + "; ".join(_title(task) for task in lost) if lost else ""
    return [f"in steps it loses against the reference on {len(lost)} of {len(tasks)} tasks{names}"]


def _rank(task: Mapping[str, Any]) -> tuple[bool, float, str]:
    speedup = task.get("speedup")
    return bool(task.get("diverged")), -(speedup if speedup is not None else -math.inf), task["task"]


def _title(task: Mapping[str, Any]) -> str:
    return md.text(task.get("title") or task["task"])


def _ratios(task: Mapping[str, Any]) -> dict[str, float]:
    """What the table shows of a task, as far as it is known and positive."""
    steps, ended = task.get("speedup"), (task.get("held_out_loss"), task.get("reference_held_out_loss"))
    parts = {_STEPS: (steps, 1.0), _TIME: (steps, task.get("time_ratio")), _HELD_OUT: ended}
    return {name: a / b for name, (a, b) in parts.items() if a is not None and b is not None and a > 0.0 and b > 0.0}


def _table(tasks: list[Mapping[str, Any]], over: str) -> list[str]:
    """What the columns mean, one row a task, and the geometric means of the figures that are known."""
    rows = [(_title(task), _ratios(task)) for task in tasks]
    columns = [name for name in _MEANINGS if any(name in ratios for _, ratios in rows)]
    cells = [[title, *(_cell(ratios.get(name), name) for name in columns)] for title, ratios in rows]
    for row, task in zip(cells, tasks, strict=True):
        if task.get("diverged"):
            row[0] += ": **diverged**"
    if columns and len(tasks) > 1:
        cells.append(["geometric mean"])
        for name in columns:
            logs = [math.log(ratios[name]) for _, ratios in rows if name in ratios]
            of = "" if len(logs) == len(tasks) else f" of {len(logs)}"
            cells[-1].append(_cell(math.exp(sum(logs) / len(logs)), name) + of)
    meanings = " ".join(f"{name.capitalize()}: {_MEANINGS[name]}." for name in columns)
    return [*([over + meanings, ""] if meanings else []), *md.table(("task", *columns), cells)]


def _cell(value: float | None, column: str) -> str:
    if value is None:
        return "–"
    behind = round(value, 2) > 1.0 if column == _HELD_OUT else round(value, 2) < 1.0
    return f"**{md.ratio(value)}** (loses)" if behind else md.ratio(value)


def _plot(tasks: list[Mapping[str, Any]]) -> list[str]:
    """Speedups as bars from a line at 1, logarithmic; in characters, so that it shows wherever the card does."""
    logs = [
        (md.plain(t.get("title") or t["task"])[:30], math.log(t["speedup"]))
        for t in tasks
        if (t.get("speedup") or 0.0) > 0.0
    ]
    scale = max(math.log(1.25), *(abs(value) for _, value in logs))
    width = max(len("speedup"), *(len(name) for name, _ in logs))
    ends = f"{math.exp(-scale):.2g}".ljust(_PLOT_WIDTH), f"{math.exp(scale):.3g}".rjust(_PLOT_WIDTH)
    lines = [f"{'speedup'.ljust(width)}  {ends[0]}1{ends[1]}"]
    for name, value in logs:
        bar = "█" * round(_PLOT_WIDTH * abs(value) / scale)
        left, right = (bar, "") if value < 0.0 else ("", bar)
        lines.append(f"{name.ljust(width)}  {left.rjust(_PLOT_WIDTH)}|{right}")
    return ["```text", *lines, "```"]


def _limits(config: PolicyConfig, results: Mapping[str, Any]) -> list[str]:
    evaluation = results.get("evaluation") or {}
    lines = [f"- keeps {2 + config.hidden_size} float32 numbers per parameter (AdamW keeps 2)"]
    if evaluation.get("tasks"):
        measured = "measured on the tasks in the table only: on unlike ones compare"
    elif evaluation.get("summary"):
        measured = "measured as said above only: elsewhere compare"
    else:
        measured = "nothing was measured: compare"
    lines.append(f"- {measured} it with a tuned optimizer first")
    return lines + [f"- {note}" for note in notes(results)]
