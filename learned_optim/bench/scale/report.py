"""The tables of the scale suite, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from learned_optim.bench.scale.figures import Comparison, OfModel, Runs, compare
from learned_optim.policy.markdown import table

MISSING = "missing"
UNFINISHED = "*"


def markdown(rows: Sequence[OfModel], level: int = 2) -> str:
    """Speedups, losses and how they were measured; what is missing is shown as missing.

    Args:
        rows: of :func:`~learned_optim.bench.scale.figures.by_model`.
        level: of the headings.
    """
    head = "#" * level
    parts = [
        f"{head} Speedup\n\n{speedups(rows)}",
        f"{head} Held-out loss at the end\n\n{losses(rows)}",
        f"{head} Runs\n\n{runs(rows)}",
    ]
    return "\n".join(parts)


def speedups(rows: Sequence[OfModel]) -> str:
    """Ours over each rival, in steps and in time."""
    rivals = [runs.name for runs in rows[0].rivals] if rows else []
    head = ["model", "LearnedOptimizer", *(f"over {name}, in {unit}" for name in rivals for unit in ("steps", "time"))]
    lines = []
    for row in rows:
        if not row.results:
            lines.append([row.model.name, *[MISSING] * (len(head) - 1)])
            continue
        for ours in row.ours:
            cells = [row.model.name, ours.name]
            for rival in row.rivals:
                comparison = compare(ours, rival)
                cells += [speedup(comparison, rival, time=time) for time in (False, True)]
            lines.append(cells)
    return _table(head, lines) + _footnote(rows)


def losses(rows: Sequence[OfModel]) -> str:
    """Final held-out losses, mean over the seeds; rivals with the setting that they are best with."""
    head = ["model", "optimizer", "held-out loss", "seeds", "best learning rate", "settings tried"]
    lines = []
    for row in rows:
        if not row.results:
            lines.append([row.model.name, *[MISSING] * (len(head) - 1)])
            continue
        for runs in (*row.ours, *row.others, *row.rivals):
            state = runs.tuning
            setting = "" if state is None else _setting(runs)
            lines.append([row.model.name, runs.name, _loss(runs), str(len(runs.results)), setting,
                          "" if state is None else _tried(runs)])  # fmt: skip
    return _table(head, lines)


def runs(rows: Sequence[OfModel]) -> str:
    """What each model is, and what an iteration takes."""
    lines = []
    for row in rows:
        model = row.model
        shape = f"{model.depth} × {model.width}"
        size = f"{model.batch} × {model.context} tokens" if model.context else f"{model.batch} images"
        known = row.results
        gpu = next((r.facts["gpu"] for r in known if "gpu" in r.facts), "")
        times = ", ".join(f"{_name(runs)} {_milliseconds(runs)}" for runs in (row.ours[0], *row.rivals))
        where = (gpu or "one CPU thread") if known else MISSING
        times = times if known else MISSING
        lines.append(
            [model.name, f"{model.parameters:,}", shape, size, f"{model.steps:,}", f"{model.samples:.2g}", where, times]
        )  # fmt: skip
    head = ["model", "parameters", "depth × width", "batch", "steps", "samples per parameter", "measured on",
            "milliseconds per iteration"]  # fmt: skip
    return _table(head, lines)


def _name(runs: Runs) -> str:
    return runs.name if runs.tuning is not None else "ours"


def _milliseconds(runs: Runs) -> str:
    return f"{1e3 * min(r.step_seconds for r in runs.results):.3g}" if runs.results else MISSING


def speedup(comparison: Comparison | None, rival: Runs, *, time: bool) -> str:
    """In steps or in time, with its deviation; what is missing, if there is none."""
    if comparison is None:
        return "rival diverged" if rival.results and all(r.diverged for r in rival.results) else MISSING
    factor = 1.0 / comparison.iteration if time else 1.0
    text = f"{comparison.steps * factor:.2f}"
    if comparison.deviation is not None:
        text += f" ± {comparison.deviation * factor:.2f}"
    return text if comparison.is_final else f"{text} {UNFINISHED}"


def _loss(runs: Runs) -> str:
    if runs.loss is None:
        return MISSING
    return "diverged" if any(r.diverged for r in runs.results) else f"{runs.loss:.4f}"


def _setting(runs: Runs) -> str:
    if runs.tuning is None or runs.tuning.best is None:
        return MISSING
    best = runs.tuning.best
    return f"{best.lr:g}" + (f", AdamW {best.lr * 2.0**best.auxiliary:g}" if best.optimizer == "muon" else "")


def _tried(runs: Runs) -> str:
    state = runs.tuning
    if state is None:
        return ""
    return f"{len(state.tried)}" if state.done else f"{len(state.tried)}, {len(state.missing)} or more missing"


def _footnote(rows: Sequence[OfModel]) -> str:
    compared = (compare(ours, rival) for row in rows for ours in row.ours for rival in row.rivals)
    if all(comparison is None or comparison.is_final for comparison in compared):
        return ""
    return f"\n\\{UNFINISHED} Preliminary: some runs of the rival's tuning, or over fewer steps, are missing.\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"{line}\n" for line in table(head, lines, left=(0, 1)))
