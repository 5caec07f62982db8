"""What the habits suite shows: Markdown tables, and the block ``habits`` of ``results.json``. Free of torch."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from learned_optim.policy.files import write_atomically
from learned_optim.policy.markdown import table

#: Values of a row by contender, one per seed; ``None`` for a run that diverged.
Row = Mapping[str, list[float | None]]


class Section(NamedTuple):
    """A table with what it says."""

    title: str
    text: str  #: what is measured, and what would be right
    rows: list[tuple[str, Row]]


def markdown(values: Mapping[str, Any], level: int = 2) -> str:
    """All tables, mean ± standard deviation over the seeds.

    Args:
        values: what ``run_habits`` returned.
        level: of the headings.
    """
    lines = []
    for section in sections(values):
        names = list(section.rows[0][1])
        rows = [[label, *(cell(row.get(name, [])) for name in names)] for label, row in section.rows]
        text = textwrap.fill(section.text, width=120, break_on_hyphens=False)
        lines += [f"{'#' * level} {section.title}", "", text, "", *table(["", *names], rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def sections(values: Mapping[str, Any]) -> list[Section]:
    """Everything that was measured, with the ratios that are made of it."""
    lengths = values["lengths"]
    return [
        Section(
            "Steps on pure noise",
            "Root mean square of a step over the learning rate. Gradients are drawn anew from a normal distribution: "
            "there is nothing to learn. Right: small, and never growing.",
            _noise(values),
        ),
        Section(
            "Changes of target",
            f"Mean loss of a small network in the first {lengths['window']} steps after each change of its target, "
            f"{lengths['target']} steps apart. Right: as low after the last change as after the first, and as low as "
            "with an optimizer made anew at each change.",
            _changes(values),
        ),
        Section(
            "A good start, noisy labels",
            f"A linear model that starts at the true weights: its error beyond theirs after {lengths['good_start']:,} "
            "steps on batches of 4. Right: no more than AdamW's.",
            _good_start(values),
        ),
        Section(
            "Gradients that turn their sign at every step",
            f"How far parameters are from where they started after {lengths['flips']:,} steps, how far from where they "
            "were after half of them, and how large the last step is: root mean squares over the learning rate. "
            "Right: nearly nothing.",
            _rows(values, "flips", str),
        ),
        Section(
            "Learning rate and schedule",
            f"A regression with fresh batches and noisy labels, {lengths['training']:,} steps; the error is measured "
            "without noise. Right: no run diverges, ten times the learning rate costs little, and a cosine helps.",
            _rates(values),
        ),
    ]


def cell(row: list[float | None]) -> str:
    """Mean ± standard deviation, or how many runs diverged."""
    known = [value for value in row if value is not None]
    if not row:
        return "–"
    if len(known) < len(row):
        return f"diverged, {len(row) - len(known)} of {len(row)}"
    spread = stdev(known) if len(known) > 1 else 0.0
    return number(fmean(known)) + (f" ± {number(spread, 2)}" if spread > 1e-3 * abs(fmean(known)) else "")


def card_block(values: Mapping[str, Any], contender: str, command: str = "") -> dict[str, Any]:
    """The block ``habits`` of a policy's ``results.json``, see :mod:`learned_optim.policy.results`."""
    rows = {section.title: dict(section.rows) for section in sections(values)}

    def shown(title: str, *labels: str) -> str:
        return ", ".join(cell(rows[title][label][contender]) for label in labels if label in rows[title])

    noise, changes, start, flips, rates = rows
    first, last = (f"step {t:,}" for t in (values["noise_steps"][0], values["noise_steps"][-1]))
    figures = {
        **{f"step on pure noise over lr, {tensor} ({first}, {last})":
           shown(noise, f"{tensor}, {first}", f"{tensor}, {last}") for tensor in _TENSORS.values()},
        "loss after changes of target, optimizer kept over made anew (first, last)":
            shown(changes, *(label for label in rows[changes] if label.startswith("kept over"))),
        "mean loss after a change, over that of tuned AdamW": shown(changes, OVER_TUNED),
        "error from a good start over AdamW's at the same lr (lr, a tenth, a thirtieth)":
            shown(start, *(label for label in rows[start] if label.endswith(SAME_LR))),
        "gradients that turn their sign, way from the start over lr (matrix, vector)":
            shown(flips, *(label for label in rows[flips] if label.endswith("start"))),
        "final error with ten times lr, over that with lr": shown(rates, TEN_TIMES),
        "final error with a cosine, over that with a constant lr": shown(rates, COSINE),
    }  # fmt: skip
    return {**({"command": command} if command else {}), "figures": figures}


def write_habits(path: Path, values: Mapping[str, Any]) -> None:
    """Write what ``run_habits`` returned as JSON, figures of several seeds on one line."""
    write_atomically(path, (_json(values) + "\n").encode())


SAME_LR, OVER_TUNED = "over AdamW's at the same lr", "mean over tuned AdamW's"
TEN_TIMES, COSINE = "with ten times lr, over that", "with a cosine, over that"
_TENSORS = {"matrix": "32 × 32 matrix", "vector": "vector of 1,024"}
_ADAMW, _TUNED = "AdamW, same lr", "AdamW, tuned"


def _rows(values: Mapping[str, Any], measurement: str, label: Callable[[str], str]) -> list[tuple[str, Row]]:
    """Of all figures of a measurement, by contender."""
    by_contender = values["figures"][measurement]
    names = list(next(iter(by_contender.values())))
    return [(_spelled(label(name)), {c: figures[name] for c, figures in by_contender.items()}) for name in names]


def _spelled(label: str) -> str:
    first, comma, rest = label.partition(",")
    return _TENSORS.get(first, first) + comma + re.sub(r"\d+", lambda match: f"{int(match[0]):,}", rest)


def _noise(values: Mapping[str, Any]) -> list[tuple[str, Row]]:
    shown = {f"step {t:,}" for t in values["noise_steps"]}
    rows = [(label, row) for label, row in _rows(values, "noise", str) if label.rpartition(", ")[2] in shown]
    return sorted(rows, key=lambda row: row[0].partition(", ")[0])  # by tensor; the steps stay in order


def _changes(values: Mapping[str, Any]) -> list[tuple[str, Row]]:
    rows = dict(_rows(values, "changes", str))
    changes = [label for label in rows if label.startswith("change ")]
    anew = {label: rows[f"made anew, {label}"] for label in (*changes, "mean")}
    tuned = dict.fromkeys(rows["mean"], rows["mean"][_TUNED])
    return [
        *((f"{label}: loss", rows[label]) for label in changes),
        ("mean", rows["mean"]), ("mean, made anew at each change", anew["mean"]),
        *((f"kept over made anew, {label}", _over(rows[label], anew[label])) for label in (changes[0], changes[-1])),
        (OVER_TUNED, _over(rows["mean"], tuned)),
        ("learning rate", rows["learning rate"]), ("learning rate, made anew", rows["made anew, learning rate"]),
    ]  # fmt: skip


def _good_start(values: Mapping[str, Any]) -> list[tuple[str, Row]]:
    rows = _rows(values, "good start", str)
    its = {label: dict.fromkeys(row, row[_ADAMW]) for label, row in rows}
    largest = rows[0][0]
    return [
        *((f"{label}: error", row) for label, row in rows),
        *((f"{label}: {SAME_LR}", _over(row, its[label])) for label, row in rows),
        *((f"{label}: over AdamW's at {largest}", _over(row, its[largest])) for label, row in rows[1:]),
    ]


def _rates(values: Mapping[str, Any]) -> list[tuple[str, Row]]:
    rows = dict(_rows(values, "rates", str))
    right = rows["right lr"]
    return [
        ("learning rate", rows["learning rate"]), ("error", right),
        (TEN_TIMES, _over(rows["ten times lr"], right)), (COSINE, _over(rows["cosine"], right)),
    ]  # fmt: skip


def _over(row: Row, other: Row) -> Row:
    """Ratios, seed by seed."""

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or not b else a / b

    return {name: [ratio(a, b) for a, b in zip(row[name], other[name], strict=True)] for name in row}


def number(value: float, digits: int = 3) -> str:
    """So many digits, and no power of ten for large ones."""
    return f"{value:,.0f}" if abs(value) >= 10.0**digits else f"{value:.{digits}g}"


def _json(values: Any, indent: str = "") -> str:
    if not isinstance(values, Mapping) or not values:
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    items = (f"{inner}{json.dumps(key, ensure_ascii=False)}: {_json(value, inner)}" for key, value in values.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"
