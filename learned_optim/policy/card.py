"""The model card: what ``config.json``, the weights and ``results.json`` say, in words, and nothing else.

``results.json`` holds one object. Every key is optional, unknown ones are kept and not shown, and what is shown must
have the type given here (:func:`validate_results`)::

    {
      "bundled_as": "default",                the name it has in the package, if it comes with it
      "license": "apache-2.0",                a licence id of the Hub
      "datasets": ["owner/name"],             data sets of the Hub that it was trained or evaluated on
      "training": {
        "method": "set by hand",              or "unrolled back-propagation", "ES", ...
        "tasks": ["mlp", "conv"],             names of the tasks or families
        "outer_steps": 300,
        "core_hours": 1.5,
        "seeds": [0, 1],                      or their number
        "command": "learned-optim meta-train ..."
      },
      "evaluation": {
        "suite": "held-out tasks",
        "command": "learned-optim bench ...",
        "seeds": [0, 1, 2],                   or their number
        "reference": "AdamW, best of 14 settings per task",
        "tasks": [{
          "task": "mlp-letters",
          "split": "held-out",
          "speedup": 1.2,                     above 1: better than the reference; null: not known
          "spread": 0.1,                      standard deviation of the speedup over seeds
          "loss": 0.3, "reference_loss": 0.31,
          "held_out_loss": 0.5, "reference_held_out_loss": 0.45,
          "diverged": false
        }],
        "summary": {"what": 1.0}              figures or words, shown as they are
      },
      "habits": {                             what ``bench --suite habits`` measured
        "command": "learned-optim bench --suite habits",
        "figures": {"what": "1.2 and 3.4"}    figures or words, shown as they are
      },
      "notes": ["a sentence"]                 limits and remarks, shown as they are
    }

A task that diverged has ``"diverged": true`` and ``null`` for what has no finite value: JSON knows no NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from learned_optim.policy import markdown as md
from learned_optim.policy.fingerprint import fingerprint
from learned_optim.rule.config import PolicyConfig

_NUMBER, _COUNT, _TEXT, _FLAG = "a finite number", "a whole number of 0 or more", "text", "true or false"
_TEXTS, _SEEDS, _FIGURES = "a list of texts", "a whole number or a list of them", "an object of numbers and texts"
_OBJECT, _OBJECTS = "an object", "a list of objects"

_RESULTS = {"bundled_as": _TEXT, "license": _TEXT, "datasets": _TEXTS, "training": _OBJECT, "evaluation": _OBJECT,
            "habits": _OBJECT, "notes": _TEXTS}  # fmt: skip
_TRAINING = {"method": _TEXT, "tasks": _TEXTS, "outer_steps": _COUNT, "core_hours": _NUMBER, "seeds": _SEEDS,
             "command": _TEXT}  # fmt: skip
_EVALUATION = {"suite": _TEXT, "command": _TEXT, "seeds": _SEEDS, "reference": _TEXT, "tasks": _OBJECTS,
               "summary": _FIGURES}  # fmt: skip
_TASK = {"task": _TEXT, "split": _TEXT, "speedup": _NUMBER, "spread": _NUMBER, "loss": _NUMBER,
         "reference_loss": _NUMBER, "held_out_loss": _NUMBER, "reference_held_out_loss": _NUMBER,
         "diverged": _FLAG}  # fmt: skip

_HABITS = {"command": _TEXT, "figures": _FIGURES}

_METRICS = ("speedup", "loss", "held_out_loss")
_LARGEST = 1e300  # what is shown is also averaged and drawn, in floats
_PLOT_WIDTH = 20


def validate_results(results: Any) -> None:
    """Raise unless ``results`` can be stored and shown.

    Raises:
        ValueError: a value that is shown has another type, or one is not plain JSON (NaN included).
    """
    _check({"results": results}, {"results": _OBJECT}, "")
    _check(results, _RESULTS, "results.")
    _check(results.get("training") or {}, _TRAINING, "results.training.")
    _check(results.get("habits") or {}, _HABITS, "results.habits.")
    evaluation = results.get("evaluation") or {}
    _check(evaluation, _EVALUATION, "results.evaluation.")
    for index, task in enumerate(evaluation.get("tasks") or []):
        _check(task, _TASK, f"results.evaluation.tasks[{index}].")
        if not task.get("task"):
            raise ValueError(f"results.evaluation.tasks[{index}].task is missing: every task needs its name")
    try:
        json.dumps(results, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"results are not plain JSON: {error}") from error


def _check(values: Mapping[str, Any], wanted: Mapping[str, str], where: str) -> None:
    for key, kind in wanted.items():
        value = values.get(key)
        if value is not None and not _is(value, kind):
            raise ValueError(f"{where}{key} must be {kind}, found {value!r:.80}")


def _is(value: Any, kind: str) -> bool:
    if kind == _FLAG:
        return isinstance(value, bool)
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _NUMBER:
        return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < _LARGEST
    if kind == _COUNT:
        return not isinstance(value, bool) and isinstance(value, int) and value >= 0
    if kind == _SEEDS:
        return _is(value, _COUNT) or (isinstance(value, list) and all(_is(x, _COUNT) for x in value))
    if kind == _TEXTS:
        return isinstance(value, list) and all(isinstance(x, str) for x in value)
    if kind == _OBJECTS:
        return isinstance(value, list) and all(isinstance(x, Mapping) for x in value)
    if kind == _FIGURES:
        return isinstance(value, Mapping) and all(_is(x, _TEXT) or _is(x, _NUMBER) for x in value.values())
    return isinstance(value, Mapping)


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
        ValueError: ``results`` are not as described above.
    """
    results = results or {}
    validate_results(results)
    bundled_as = results.get("bundled_as")
    name = repo_id or bundled_as or "path/to/this/folder"
    title = repo_id.partition("/")[2] if repo_id else bundled_as
    lines = [
        *_metadata(results), "",
        f"# {md.text(title) or 'An update rule'}", "",
        "An update rule (*policy*) for `learned_optim`, a drop-in `torch.optim` optimizer.",
        *architecture(config, weights), "",
        "## Use", "",
        "```python", "from learned_optim import LearnedOptimizer", "",
        f"optimizer = LearnedOptimizer(model.parameters(), policy={json.dumps(md.plain(name))})",
        "loss.backward()", "optimizer.step()", "```", "",
        "## How it was made", "", *training(results), "",
        "## Results", "", *evaluation(results), "",
        *(["## Habits", "", *shown, ""] if (shown := habits(results)) else []),
        "## Limits", "", *_limits(config, results),
    ]  # fmt: skip
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
        f"- base mixture: {config.step_scale:g}·lr·({start}), caution {config.caution:g}",
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
    shown = [
        ("method", md.text(made.get("method"))),
        ("tasks", ", ".join(md.text(task) for task in made.get("tasks") or [])),
        ("outer steps", md.number(made.get("outer_steps"))),
        ("compute", f"{md.number(made['core_hours'])} core hours" if made.get("core_hours") is not None else ""),
        ("seeds", md.seeds(made.get("seeds"))),
        ("command", md.code(made.get("command"))),
    ]
    return [f"- {name}: {value}" for name, value in shown if value] or ["Not recorded."]


def evaluation(results: Mapping[str, Any]) -> list[str]:
    """Table and plot of the tasks, the best first and those where it loses at the end; or "Not evaluated."."""
    measured = results.get("evaluation") or {}
    tasks = sorted(measured.get("tasks") or [], key=_rank)
    summary = measured.get("summary") or {}
    if not tasks and not summary:
        return ["Not evaluated."]
    shown = [
        ("suite", md.text(measured.get("suite"))),
        ("reference", md.text(measured.get("reference"))),
        ("seeds", md.seeds(measured.get("seeds"))),
        ("command", md.code(measured.get("command"))),
        *_figures(summary),
    ]
    lines = [f"- {name}: {value}" for name, value in shown if value]
    lines += [f"- {sentence}" for sentence in _verdict(tasks)]
    if tasks:
        lines += ["", *_table(tasks)]
    if any((task.get("speedup") or 0.0) > 0.0 for task in tasks):
        lines += ["", *_plot(tasks)]
    return lines


def habits(results: Mapping[str, Any]) -> list[str]:
    """What the rule does on noise, after changes and the like, where that was measured."""
    measured = results.get("habits") or {}
    shown = [("command", md.code(measured.get("command"))), *_figures(measured.get("figures") or {})]
    return [f"- {name}: {value}" for name, value in shown if value]


def _figures(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(md.text(key), md.number(v) if _is(v, _NUMBER) else md.text(v)) for key, v in values.items()]


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
    sentences = []
    if known or lost:
        names = ": " + ", ".join(md.text(task["task"]) for task in lost) if lost else ""
        sentences.append(f"it loses against the reference on {len(lost)} of {len(tasks)} tasks{names}")
    if known and all(task["speedup"] > 0.0 for task in known):
        mean = math.exp(sum(math.log(task["speedup"]) for task in known) / len(known))
        worst = min(task["speedup"] for task in known)
        over = "" if len(known) == len(tasks) else f" over the {len(known)} tasks that have one"
        sentences.append(f"speedup, geometric mean{over}: {md.number(mean)}, worst: {md.number(worst)}")
    return sentences


def _rank(task: Mapping[str, Any]) -> tuple[bool, float, str]:
    speedup = task.get("speedup")
    return bool(task.get("diverged")), -(speedup if speedup is not None else -math.inf), task["task"]


def _table(tasks: list[Mapping[str, Any]]) -> list[str]:
    columns = [key for key in _TASK if key not in ("task", "diverged") and any(t.get(key) is not None for t in tasks)]
    if any(task.get("diverged") for task in tasks):
        columns.append("diverged")
    header = ["task", *(column.replace("_", " ").replace("held out", "held-out") for column in columns)]
    rows = [[md.text(task["task"]), *(_cell(task, column) for column in columns)] for task in tasks]
    align = ["---", *("---" if column == "split" else "---:" for column in columns)]
    return [f"| {' | '.join(row)} |" for row in (header, align, *rows)]


def _cell(task: Mapping[str, Any], column: str) -> str:
    value = task.get(column)
    if column == "diverged":
        return "**yes**" if value else "no"
    if column == "split":
        return md.text(value) or "–"
    if value is None:
        return "–"
    return f"**{md.number(value)}** (loses)" if column == "speedup" and value < 1.0 else md.number(value)


def _plot(tasks: list[Mapping[str, Any]]) -> list[str]:
    """Speedups as bars from a line at 1, logarithmic; in characters, so that it shows wherever the card does."""
    logs = [(md.plain(t["task"])[:30], math.log(t["speedup"])) for t in tasks if (t.get("speedup") or 0.0) > 0.0]
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
