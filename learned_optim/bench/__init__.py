"""Benchmarks: learned update rules against hand-designed optimizers. Names are imported on first use.

quality_config.py   what a run of the quality suite is made of
curves.py           what is kept of a run; the definition of speedup
baselines.py        optimizers, and the grids they are tuned over
ablations.py        a policy with parts taken away
runs.py             one run, and what identifies it
cache.py            finished runs on disk
pool.py             many runs, in several processes
quality.py          the suite: ``run_quality``
figures.py          from runs to figures
report.py           tables and ``results.json``
plots.py            pictures
habits_config.py    what a run of the habits suite is made of
habits.py           that suite: ``run_habits``
habits_report.py    its tables
habits_plots.py     its picture
config.py           what a run of the step suite is made of
step.py             what a step costs
scale/              speedup against the size of the model: a suite with a package of its own

From Python::

    from learned_optim.bench import QualityConfig, markdown, results, run_quality

    measured = run_quality(QualityConfig(policies=("run/best",), seeds=1, keep=4))
    text = markdown(measured)                           # tables
    policy.save_pretrained("run/best", results=results(measured))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learned_optim.bench.cache import read_looks as read_looks
    from learned_optim.bench.curves import Run as Run
    from learned_optim.bench.figures import compare as compare
    from learned_optim.bench.figures import summarise as summarise
    from learned_optim.bench.plots import draw_all as draw_all
    from learned_optim.bench.quality import QualityResult as QualityResult
    from learned_optim.bench.quality import run_quality as run_quality
    from learned_optim.bench.quality_config import QualityConfig as QualityConfig
    from learned_optim.bench.report import markdown as markdown
    from learned_optim.bench.report import results as results

_WHERE = {
    "QualityConfig": "quality_config", "QualityResult": "quality", "Run": "curves", "compare": "figures",
    "draw_all": "plots", "markdown": "report", "read_looks": "cache", "results": "report", "run_quality": "quality",
    "summarise": "figures",
}  # fmt: skip
__all__ = [
    "QualityConfig",
    "QualityResult",
    "Run",
    "compare",
    "draw_all",
    "markdown",
    "read_looks",
    "results",
    "run_quality",
    "summarise",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'learned_optim.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"learned_optim.bench.{_WHERE[name]}"), name)
