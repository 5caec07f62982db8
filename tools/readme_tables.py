"""Fill the figures of README.md and docs/*.md from results files: python tools/readme_tables.py [--check] [--draw]

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->``, a figure within a sentence between
``<!-- figure:NAME -->`` and ``<!-- / -->``. Tables are made by the functions in ``TABLES`` and figures by those in
``FIGURES``; any other table is the key ``table`` of ``docs/results/NAME.json``. What is measured, and by which command,
the pages say; in addition:

- ``peers.json`` and ``ablations.json`` are the ``results.json`` of ``learned-optim bench --suite quality --keep 3
  --backend compiled``, the latter's with ``--ablations --seeds 3``;
- ``iteration.json`` comes from ``tools/measure_iteration.py``. Until there is one, its figures are dashes;
- ``habits.json`` is what ``learned-optim bench --suite habits`` writes;
- ``nanogpt.json`` was measured outside this repository;
- ``scale/`` are the cells of ``learned-optim bench --suite scale``.

``--check`` changes nothing and fails if a document is not current; ``--draw`` also draws docs/nanogpt.png and
docs/scale.png.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import nanogpt_tables
import scale_tables
import zoo_tables

from learned_optim.bench import habits_report
from learned_optim.policy.markdown import table as in_markdown

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PRETRAINED = ROOT / "pretrained"
#: Results that are not in docs/results.
ELSEWHERE = {
    "quality": PRETRAINED / "default" / "results.json",
    "config": PRETRAINED / "default" / "config.json",
    "step": ROOT / "docs" / "step" / "results.json",
}
OF_TABLES = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
OF_FIGURES = re.compile(r"(<!-- figure:(\w+) -->).*?(<!-- / -->)", re.DOTALL)
NOT_MEASURED = "–"
#: What the validation families are, for readers.
TASKS = {
    "val_recurrent_char": "GRU or LSTM, characters",
    "val_transformer_char": "transformer, characters",
    "val_lstm_word_tied": "LSTM, words",
    "val_formula_regression": "perceptron, formula",
    "val_generated_tables": "perceptron, table",
    "val_mlp_letters": "perceptron, letters",
    "val_conv_letters": "conv net, letters",
    "val_vit_letters": "vision transformer, letters",
    "val_resnet_photos": "ResNet, photos",
    "val_vae_letters": "VAE, letters",
    "val_autoencoder_photos": "autoencoder, photos",
}

Table = dict[str, dict[str, str]]


class Results:
    """The results files, read when asked for."""

    def __init__(self, folder: Path = ROOT / "docs" / "results") -> None:
        self.folder = folder
        self._read: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        return ELSEWHERE.get(name, self.folder / f"{name}.json")

    def __contains__(self, name: str) -> bool:
        return self.path(name).is_file()

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = json.loads(self.path(name).read_text(encoding="utf-8"))
        return self._read[name]

    def contender(self, name: str) -> dict[str, Any]:
        """One row of ``peers.json``."""
        (row,) = [c for c in self["peers"]["quality"]["contenders"] if c["name"] == name]
        return row


def markdown(table: Table) -> str:
    """A table with the optimizers side by side; they stand one below the other where they outnumber the figures."""
    names, rows = list(table), list(next(iter(table.values())))
    if len(names) >= len(rows):
        head, lines = rows, [[name, *(table[name][row] for row in rows)] for name in names]
    else:
        head, lines = names, [[row, *(table[name][row] for name in names)] for row in rows]
    return "".join(f"{line}\n" for line in in_markdown(["", *head], lines))


def family(row: dict[str, Any]) -> str:
    return row["task"].partition("/")[0]


def title(row: dict[str, Any]) -> str:
    return TASKS.get(family(row), family(row).removeprefix("val_").replace("_", " "))


def ratios(results: Results) -> list[tuple[str, dict[str, float | None]]]:
    """Of the bundled policy over AdamW tuned per task, by task, last the geometric means; ``None``: not measured."""
    measured = results["iteration"]["tasks"] if "iteration" in results else {}
    rows: list[tuple[str, dict[str, float | None]]] = []
    for row in results["quality"]["evaluation"]["tasks"]:
        steps, iteration = row["speedup"], measured.get(family(row), {}).get("ratio", {}).get("default")
        rows.append((title(row), {
            "steps": steps,
            "iteration": iteration,
            "time": steps / iteration if iteration else None,
            "held-out": row["held_out_loss"] / row["reference_held_out_loss"],
        }))  # fmt: skip
    means: dict[str, float | None] = {}
    for name in rows[0][1]:
        column = [value for _, figures in rows if (value := figures[name]) is not None]
        means[name] = geometric_mean(column) if len(column) == len(rows) else None
    return [*sorted(rows, key=lambda row: -(row[1]["steps"] or 0.0)), ("geometric mean", means)]


def validation(results: Results) -> Table:
    """Steps, time and held-out loss over AdamW tuned per task; bold where AdamW is ahead."""

    def marked(value: float | None, behind: Callable[[float], bool]) -> str:
        if value is None:
            return NOT_MEASURED
        return f"**{value:.2f}**" if behind(round(value, 2)) else f"{value:.2f}"

    return {
        name: {
            "speedup in steps": marked(row["steps"], lambda x: x < 1.0),
            "cost of an iteration": marked(row["iteration"], lambda x: False),
            "speedup in time": marked(row["time"], lambda x: x < 1.0),
            "held-out loss": marked(row["held-out"], lambda x: x > 1.0),
        }
        for name, row in ratios(results)
    }


def quality(results: Results) -> Table:
    """What a policy's bench says, task by task and as a geometric mean; parameters and time as in ``peers.json``."""
    ours = {row["task"]: row for row in results.contender("learned: default")["tasks"]}
    theirs = {row["task"]: row for row in results.contender("AdamW, tuned")["tasks"]}
    tasks = results["quality"]["evaluation"]["tasks"]
    table = {
        title(row): {
            "parameters": f"{ours[row['task']]['parameters']:,}",
            "steps": f"{ours[row['task']]['steps']:,}",
            "speedup": _with_spread(row["speedup"], row["spread"]),
            "training loss": f"{row['loss']:.3g}",
            "AdamW's": f"{row['reference_loss']:.3g}",
            "held-out loss": f"{row['held_out_loss']:.3g}",
            "AdamW's, held out": f"{row['reference_held_out_loss']:.3g}",
            "time per step": f"{ours[row['task']]['time_ratio']:.1f}",
            "AdamW's setting": theirs[row["task"]]["setting"],
        }
        for row in tasks
    }
    mean = geometric_mean([row["speedup"] for row in tasks])
    return {**table, "geometric mean": {**dict.fromkeys(next(iter(table.values())), ""), "speedup": f"{mean:.2f}"}}


def peers(results: Results) -> Table:
    """All that the bench ran, over AdamW tuned per task: geometric means, with the spread over seeds."""
    return {
        row["name"].replace("learned: default", "LearnedOptimizer").replace("learned: ", "LearnedOptimizer, "): {
            "settings tried per task": str(row["settings"]),
            **_over_tuned(row["summary"]),
            "time per step": f"{row['summary']['time_ratio']:.2f}",
        }
        for row in results["peers"]["quality"]["contenders"]
    }


def ablations(results: Results) -> Table:
    """Tuned AdamW, and the bench's ablations of a policy."""
    contenders = results["ablations"]["quality"]["contenders"]
    rows = [r for r in contenders if r["role"] == "ablation" or r["name"] == "AdamW, tuned"]
    rows.sort(key=lambda row: row["role"] == "ablation")
    return {row["name"]: _over_tuned(row["summary"]) for row in rows}


def _over_tuned(figures: dict[str, Any]) -> dict[str, str]:
    return {
        "speedup": _with_spread(figures["speedup"], figures["speedup"] * (figures["spread"] or 0.0)),
        "worst task": f"{figures['worst']:.2f}",
        "held-out loss, end": f"{figures['held_out_ratio'] - 1:+.1%}",
    }


def _with_spread(value: float, spread: float | None) -> str:
    return f"{value:.2f} ± {spread:.2f}" if spread else f"{value:.2f}"


#: Sizes of one tensor that are shown, out of those that the bench measures.
SHOWN = {10_000: "10,000", 1_000_000: "1 million", 8_000_000: "8 million", 100_000_000: "100 million"}


def step(results: Results) -> Table:
    """What a step costs on the CPU, in ns per parameter and in AdamW's; a GPT's training step; bytes of state."""
    measured = results["step"]["devices"]["cpu"]
    columns: dict[str, dict[str, str]] = {}
    for case in measured["cases"]:
        if case["tensors"] > 1 or case["parameters"] in SHOWN:
            head = SHOWN.get(case["parameters"], f"GPT, {case['tensors']} tensors")
            columns[head] = {n: f"{row['median']:.3g} ({row['ratio']:.2f})" for n, row in case["optimizers"].items()}
    of_training = measured["training"]["optimizers"]
    columns["GPT, training step"] = {
        name: f"{row['median']:.0f} ms ({row['ratio']:.2f})" for name, row in of_training.items()
    }
    of_all = measured["cases"][-1]["optimizers"]
    columns["bytes of state"] = {name: f"{row['bytes']:.0f}" for name, row in of_all.items()}
    return {name: {head: column.get(name, "–") for head, column in columns.items()} for name in of_all}


def meta_train_speed(results: Results) -> Table:
    """Inner steps per second of an unroll and its backward pass, and over those of ``higher``."""
    table = {}
    for case in results["meta_train_speed"]["speed"]:
        rates, order = case["steps per second"], "second" if case["second order"] else "first"
        table[f"{case['network']}, T = {case['T']}, {order} order"] = {
            "inner steps per second": f"{rates['ours']:.0f}",
            "over `higher`, same rule": f"{rates['ours'] / rates['same rule']:.1f}",
            "over `higher`, Adam": f"{rates['ours'] / rates['adam']:.2f}",
        }
    return table


def habits(results: Results) -> str:
    """What the habits suite measured: a table for each."""
    return habits_report.markdown(results["habits"], level=3)


#: Tables, and some paragraphs, that are made of what was measured; the other tables stand in their files as they are.
TABLES: dict[str, Callable[[Results], Table | str]] = {
    "validation": validation, "quality": quality, "peers": peers, "ablations": ablations, "step": step,
    "meta_train_speed": meta_train_speed, "habits": habits, "zoo": zoo_tables.zoo, "users": zoo_tables.users,
    "rivals": zoo_tables.rivals, "scale": scale_tables.scale, "scale_losses": scale_tables.scale_losses,
    "scale_runs": scale_tables.scale_runs, "nanogpt": nanogpt_tables.nanogpt,
    "nanogpt_short": nanogpt_tables.nanogpt_short, "nanogpt_how": nanogpt_tables.nanogpt_how,
}  # fmt: skip


def _mean(name: str) -> Callable[[Results], str]:
    def figure(results: Results) -> str:
        value = ratios(results)[-1][1][name]
        return NOT_MEASURED if value is None else f"{value:.1f}"

    return figure


def _held_out(results: Results) -> str:
    ratio = ratios(results)[-1][1]["held-out"] or 1.0
    return f"{abs(1.0 - ratio):.0%} {'lower' if ratio <= 1.0 else 'higher'}"


def _sizes(results: Results) -> str:
    sizes = [row["parameters"] for row in results.contender("learned: default")["tasks"]]
    return " and ".join(f"{round(size, -3):,}" for size in (min(sizes), max(sizes)))


def _bytes(of_state: int) -> Callable[[Results], str]:
    """Of state per parameter: v in float32, m and the hidden units in ``of_state`` bytes each."""
    return lambda results: str(4 + of_state * (1 + len(results["config"]["hidden_weights"])))


def _count(results: Results) -> str:
    words = ("seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen")
    count = len(results["quality"]["evaluation"]["tasks"])
    return words[count - 7] if 7 <= count < 7 + len(words) else str(count)


def _summary(key: str) -> Callable[[Results], str]:
    return lambda results: f"{results['quality']['evaluation']['summary'][key]:.2f}"


def _muon_lower(results: Results) -> str:
    theirs = {row["task"]: row["loss"] for row in results.contender("Muon, tuned")["tasks"]}
    ours = results["quality"]["evaluation"]["tasks"]
    return str(sum(theirs[row["task"]] < row["loss"] for row in ours))


#: Figures within sentences.
FIGURES: dict[str, Callable[[Results], str]] = {
    "steps": _mean("steps"), "iteration": _mean("iteration"), "time": _mean("time"), "held_out": _held_out,
    "sizes": _sizes, "tasks": _count, "bytes": _bytes(4), "bytes_bfloat16": _bytes(2),
    "over_muon": _summary("speedup over Muon, tuned, geometric mean"),
    "muon_lower": _muon_lower, "good_start": zoo_tables.good_start,
    "users_steps": zoo_tables.users_steps, "users_time": zoo_tables.users_time, **scale_tables.FIGURES,
}  # fmt: skip


def filled(text: str, results: Results) -> str:
    def table(match: re.Match[str]) -> str:
        made = TABLES[match[2]](results) if match[2] in TABLES else results[match[2]]["table"]
        return f"{match[1]}\n{made if isinstance(made, str) else markdown(made)}\n{match[3]}"

    text = OF_TABLES.sub(table, text)
    return OF_FIGURES.sub(lambda match: f"{match[1]}{FIGURES[match[2]](results)}{match[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a document is not current")
    parser.add_argument("--draw", action="store_true", help="draw docs/nanogpt.png and docs/scale.png, too")
    arguments = parser.parse_args()
    results, stale = Results(), []
    for path in DOCUMENTS:
        old = path.read_text(encoding="utf-8")
        new = filled(old, results)
        if new != old:
            stale.append(path)
            if not arguments.check:
                path.write_text(new, encoding="utf-8")
    if arguments.check:
        for path in stale:
            print(f"not current: {path.relative_to(ROOT)}", file=sys.stderr)
        return int(bool(stale))
    if arguments.draw:
        nanogpt_tables.draw_nanogpt(results, ROOT / "docs" / "nanogpt.png")
        scale_tables.draw_scale(results, ROOT / "docs" / "scale.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
