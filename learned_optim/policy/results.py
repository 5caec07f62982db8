"""``results.json`` of a policy: what was measured, and how the policy was made.

It holds one object. Every key is optional, unknown ones are kept and not shown, and what is shown must
have the type given here (:func:`validate`)::

    {
      "bundled_as": "default",                the name it has in the package, if it comes with it
      "purpose": "For ...",                   what the rule is for, in a sentence or two
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
          "title": "perceptron, letters",     what the card calls it, in place of its name
          "split": "held-out",
          "speedup": 1.2,                     the reference's steps to its own final loss over the rule's
          "spread": 0.1,                      standard deviation of the speedup over seeds
          "time_ratio": 1.4,                  time of a training iteration over the reference's
          "loss": 0.3, "reference_loss": 0.31,
          "held_out_loss": 0.5, "reference_held_out_loss": 0.45,
          "diverged": false
        }],
        "summary": {"what": 1.0}              figures or words; the card shows them where there are no tasks
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
from collections.abc import Mapping
from typing import Any

_NUMBER, _COUNT, _TEXT, _FLAG = "a finite number", "a whole number of 0 or more", "text", "true or false"
_TEXTS, _SEEDS, _FIGURES = "a list of texts", "a whole number or a list of them", "an object of numbers and texts"
_OBJECT, _OBJECTS = "an object", "a list of objects"

_RESULTS = {"bundled_as": _TEXT, "purpose": _TEXT, "license": _TEXT, "datasets": _TEXTS, "training": _OBJECT,
            "evaluation": _OBJECT, "habits": _OBJECT, "notes": _TEXTS}  # fmt: skip
_TRAINING = {"method": _TEXT, "tasks": _TEXTS, "outer_steps": _COUNT, "core_hours": _NUMBER, "seeds": _SEEDS,
             "command": _TEXT}  # fmt: skip
_EVALUATION = {"suite": _TEXT, "command": _TEXT, "seeds": _SEEDS, "reference": _TEXT, "tasks": _OBJECTS,
               "summary": _FIGURES}  # fmt: skip
_TASK = {"task": _TEXT, "title": _TEXT, "split": _TEXT, "speedup": _NUMBER, "spread": _NUMBER,
         "time_ratio": _NUMBER, "loss": _NUMBER, "reference_loss": _NUMBER, "held_out_loss": _NUMBER,
         "reference_held_out_loss": _NUMBER, "diverged": _FLAG}  # fmt: skip
_HABITS = {"command": _TEXT, "figures": _FIGURES}

_LARGEST = 1e300  # what is shown is also averaged and drawn, in floats


def validate(results: Any) -> None:
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


def is_number(value: Any) -> bool:
    """Whether ``value`` can be shown, averaged and drawn."""
    return _is(value, _NUMBER)
