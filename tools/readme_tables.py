"""Fill the tables of README.md from docs/results/*.json: python tools/readme_tables.py [--check]

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->`` and comes from ``docs/results/NAME.json``,
whose key ``table`` maps optimizers to figures. ``--check`` changes nothing and fails if README.md is not current.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

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


def filled(text: str, folder: Path) -> str:
    def fill(match: re.Match[str]) -> str:
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
