"""``learned-optim bench --suite quality``: runs, tables, pictures."""

# ruff: noqa: T201  (printing is what a command line is for)

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from learned_optim.bench.quality_config import QualityConfig

if TYPE_CHECKING:
    from learned_optim.bench.pool import Progress


class Bar:
    """A bar with the time left, on terminals: known runs count for nothing, the others for the seconds they take."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=0.0, disable=None, file=sys.stderr, dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}",
        )  # fmt: skip
        self._known = self._done = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show it."""
        cost, self._done = progress.cost_done - self._done, progress.cost_done
        self._known += cost if progress.cached else 0.0
        self._bar.total = max(progress.cost_total - self._known, 1e-9)
        if not progress.cached:
            self._bar.update(cost)
        self._bar.set_description_str(f"{progress.done}/{progress.total} {progress.what}", refresh=False)

    def close(self) -> None:
        """Leave the line."""
        self._bar.close()


def run(config: QualityConfig, out: Path, command: str) -> None:
    """Run the suite, print its tables, and write them with the figures and pictures into ``out``.

    ``out`` then holds ``results.json`` of the first policy, ``table.md``, ``plots/`` and, for several policies,
    ``policies/<label>/results.json`` of each.
    """
    from learned_optim.bench.cache import read_looks, write
    from learned_optim.bench.quality import load_policies, run_quality
    from learned_optim.bench.report import markdown, results, write_results
    from learned_optim.cli import UsageError
    from learned_optim.tasks import get_families

    try:
        get_families(config.tasks)
    except ValueError as error:
        raise UsageError(f"bench: {error}") from error
    policies = load_policies(config.policies)  # before the hours
    bar = Bar()
    try:
        result = run_quality(config, policies=policies, progress=bar)
    finally:
        bar.close()
    text = markdown(result, looks=len(read_looks(config.cache_folder())))
    write_results(out, results(result, command=command))
    if len(policies) > 1:
        for contender in (c for c in result.contenders if c.role == "learned"):
            write_results(out / "policies" / contender.label, results(result, contender, command=command))
    write(out / "table.md", text.encode())
    print(text)
    try:
        from learned_optim.bench.plots import draw_all

        draw_all(result, out / "plots")
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
    print(out)
