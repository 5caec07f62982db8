"""``learned-optim bench --suite step``: measure, print the table, write the rest."""

# ruff: noqa: T201  (printing is what a command line is for)

from __future__ import annotations

import sys
from pathlib import Path

from learned_optim.bench.config import StepBenchConfig


def run(config: StepBenchConfig, out: Path, command: str) -> None:
    """Run the suite into ``out``; what is measured next is said on terminals."""
    from learned_optim.bench.step import run_config, table

    def say(what: str) -> None:
        if sys.stderr.isatty():
            print(what, file=sys.stderr)

    print(table(run_config(config, out, say)))
    print(out)
