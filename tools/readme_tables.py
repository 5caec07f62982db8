"""Fill the tables of README.md from docs/results/*.json: python tools/readme_tables.py [--check]

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->`` and comes from ``docs/results/NAME.json``,
whose key ``table`` maps optimizers to figures; ``quality`` comes from the bundled policy's ``results.json``.
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
    """What a policy's bench says, task by task and as a geometric mean."""
    evaluation = results["evaluation"]
    table = {
        row["task"].removeprefix("val_").removesuffix("/0").replace("_", " "): {
            "speedup": f"{row['speedup']:.2f}",
            "training loss": f"{row['loss']:.3g}",
            "AdamW's": f"{row['reference_loss']:.3g}",
            "held-out loss": f"{row['held_out_loss']:.3g}",
            "AdamW's, held out": f"{row['reference_held_out_loss']:.3g}",
        }
        for row in evaluation["tasks"]
    }
    mean = math.exp(sum(math.log(row["speedup"]) for row in evaluation["tasks"]) / len(evaluation["tasks"]))
    return {**table, "geometric mean": {**dict.fromkeys(next(iter(table.values())), ""), "speedup": f"{mean:.2f}"}}


def filled(text: str, folder: Path) -> str:
    def fill(match: re.Match[str]) -> str:
        if match[2] == "quality":
            table = quality(json.loads((ROOT / "pretrained" / "default" / "results.json").read_text(encoding="utf-8")))
        else:
            table = json.loads((folder / f"{match[2]}.json").read_text(encoding="utf-8"))["table"]
        return f"{match[1]}\n{markdown(table)}\n{match[3]}"

    return MARKED.sub(fill, text)


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
