"""Fill the tables of README.md from docs/results/*.json: python tools/readme_tables.py [--check]

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->`` and comes from ``docs/results/NAME.json``,
whose key ``table`` maps optimizers to figures; ``quality`` comes from the bundled policy's ``results.json``, ``step``
from that of ``learned-optim bench --suite step --out docs/step``. ``peers.json`` and ``ablations.json`` are the
``results.json`` of ``learned-optim bench --suite quality --keep 3 --backend compiled``, the latter's with
``--ablations --seeds 3``; the row of ``elementwise`` in the former is from a run with ``--policies elementwise``.
``--check`` changes nothing and fails if README.md is not current.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "docs" / "results" / "peers.json"
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def markdown(table: dict[str, dict[str, str]]) -> str:
    """A table with the optimizers side by side; they stand one below the other where they outnumber the figures."""
    names, rows = list(table), list(next(iter(table.values())))
    if len(names) >= len(rows):
        lines = [["", *rows], *([name, *(table[name][row] for row in rows)] for name in names)]
    else:
        lines = [["", *names], *([row, *(table[name][row] for name in names)] for row in rows)]
    lines.insert(1, ["---", *["--:"] * (len(lines[0]) - 1)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def quality(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What a policy's bench says, task by task and as a geometric mean; time per step as in ``peers.json``."""
    evaluation = results["evaluation"]
    (measured,) = [c for c in _read(PEERS)["quality"]["contenders"] if c["name"] == "learned: default"]
    times = {row["task"]: f"{row['time_ratio']:.1f}" for row in measured["tasks"]}
    table = {
        row["task"].removeprefix("val_").removesuffix("/0").replace("_", " "): {
            "speedup": f"{row['speedup']:.2f}",
            "training loss": f"{row['loss']:.3g}",
            "AdamW's": f"{row['reference_loss']:.3g}",
            "held-out loss": f"{row['held_out_loss']:.3g}",
            "AdamW's, held out": f"{row['reference_held_out_loss']:.3g}",
            "time per step": times[row["task"]],
        }
        for row in evaluation["tasks"]
    }
    mean = math.exp(sum(math.log(row["speedup"]) for row in evaluation["tasks"]) / len(evaluation["tasks"]))
    return {**table, "geometric mean": {**dict.fromkeys(next(iter(table.values())), ""), "speedup": f"{mean:.2f}"}}


def peers(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """All that the bench ran, over AdamW tuned per task: geometric means, with the spread over seeds."""
    return {
        row["name"].replace("learned: default", "LearnedOptimizer").replace("learned: ", "LearnedOptimizer, "): {
            "settings tried per task": str(row["settings"]),
            **_over_tuned(row["summary"]),
            "time per step": f"{row['summary']['time_ratio']:.2f}",
        }
        for row in results["quality"]["contenders"]
    }


def ablations(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Tuned AdamW, and the bench's ablations of a policy."""
    rows = [r for r in results["quality"]["contenders"] if r["role"] == "ablation" or r["name"] == "AdamW, tuned"]
    rows.sort(key=lambda row: row["role"] == "ablation")
    return {row["name"]: _over_tuned(row["summary"]) for row in rows}


def _over_tuned(figures: dict[str, Any]) -> dict[str, str]:
    speedup, spread = figures["speedup"], figures["speedup"] * (figures["spread"] or 0.0)
    return {
        "speedup": f"{speedup:.2f} ± {spread:.2f}" if spread else f"{speedup:.2f}",
        "worst task": f"{figures['worst']:.2f}",
        "held-out loss, end": f"{figures['held_out_ratio'] - 1:+.1%}",
    }


#: Sizes of one tensor that README.md shows, out of those that the bench measures.
SHOWN = {10_000: "10,000", 1_000_000: "1 million", 8_000_000: "8 million", 100_000_000: "100 million"}


def step(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What a step costs on the CPU, in ns per parameter and in AdamW's; a GPT's training step; bytes of state."""
    measured = results["devices"]["cpu"]
    columns: dict[str, dict[str, str]] = {}
    for case in measured["cases"]:
        if case["tensors"] > 1 or case["parameters"] in SHOWN:
            title = SHOWN.get(case["parameters"], f"GPT, {case['tensors']} tensors")
            columns[title] = {n: f"{row['median']:.3g} ({row['ratio']:.2f})" for n, row in case["optimizers"].items()}
    of_training = measured["training"]["optimizers"]
    columns["GPT, training step"] = {
        name: f"{row['median']:.0f} ms ({row['ratio']:.2f})" for name, row in of_training.items()
    }
    of_all = measured["cases"][-1]["optimizers"]
    columns["bytes of state"] = {name: f"{row['bytes']:.0f}" for name, row in of_all.items()}
    return {name: {title: column.get(name, "–") for title, column in columns.items()} for name in of_all}


def meta_train_speed(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Inner steps per second of an unroll and its backward pass, and over those of ``higher``."""
    table = {}
    for case in results["speed"]:
        rates, order = case["steps per second"], "second" if case["second order"] else "first"
        table[f"{case['network']}, T = {case['T']}, {order} order"] = {
            "inner steps per second": f"{rates['ours']:.0f}",
            "over `higher`, same rule": f"{rates['ours'] / rates['same rule']:.1f}",
            "over `higher`, Adam": f"{rates['ours'] / rates['adam']:.2f}",
        }
    return table


#: Tables that are made of what a benchmark measured; the others stand in its file as they are.
MADE = {"quality": quality, "peers": peers, "ablations": ablations, "step": step, "meta_train_speed": meta_train_speed}
#: Results that are not in docs/results.
ELSEWHERE = {
    "quality": ROOT / "pretrained" / "default" / "results.json", "step": ROOT / "docs" / "step" / "results.json"
}  # fmt: skip


def filled(text: str, folder: Path) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match[2]
        results = _read(ELSEWHERE.get(name, folder / f"{name}.json"))
        table = MADE[name](results) if name in MADE else results["table"]
        return f"{match[1]}\n{markdown(table)}\n{match[3]}"

    return MARKED.sub(fill, text)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old, ROOT / "docs" / "results")
    if "--check" in sys.argv[1:]:
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
