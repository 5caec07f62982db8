"""What the tools share that make meta-training runs and measure what came of them."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from learned_optim import Policy
from learned_optim.meta_train.estimators import with_weights
from learned_optim.policy.policy import PARTS


def arguments(doc: str | None) -> argparse.Namespace:
    """``out`` and ``runs`` of the command line; torch has one thread from here on."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a .json file")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    torch.set_num_threads(1)
    return parser.parse_args()


def write(out: Path, results: Mapping[str, Any]) -> None:
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def gates_put_back(policy: Policy) -> Policy:
    """The policy with the gates of its cell as a new one has them."""
    weights = {n: torch.zeros_like(w) if n in PARTS["gates"] else w for n, w in policy.weights().items()}
    return with_weights(policy, weights)


def spread(logs: Sequence[float], digits: int = 2) -> str:
    """The factor whose logarithm is the mean, and the standard deviation in the same unit."""
    mean, deviation = math.exp(statistics.fmean(logs)), statistics.stdev(logs)
    return f"{mean:.{digits}f} ± {mean * deviation:.{digits}f}"


def efforts(measured: Sequence[Mapping[str, Any]], name: str) -> dict[str, str]:
    """Rows of a table: mean inner steps and minutes of the runs of that name."""

    def mean(value: str) -> float:
        return statistics.fmean(m[value] for m in measured if m["run"] == name)

    return {"inner steps": f"{round(mean('inner_steps'), -3):,.0f}", "minutes": f"{mean('minutes'):.0f}"}
