"""``torchrun ... -m learned_optim meta-train``: as many processes as one likes, the same run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import ROOT
from learned_optim.cli import main
from learned_optim.meta_train.checkpoint import read_metrics

SMALL = (
    "--tasks", "noisy_quadratic", "tiny_mlp", "--max-length", "8", "--unroll-length", "4", "--meta-batch", "3",
    "--validate-every", "2", "--validation-tasks", "tiny_mlp", "--validation-seeds", "3", "--validation-length", "6",
    "--inner-lr", "0.01", "--save-every", "1",
)  # fmt: skip


def in_one_process(out: Path, *arguments: str) -> None:
    assert main(["meta-train", "--out", str(out), *SMALL, *arguments]) == 0


def in_two_processes(out: Path, *arguments: str) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "learned_optim", "meta-train", "--out", str(out), *SMALL, *arguments], capture_output=True,
        text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_run(folder: Path, other: Path) -> None:
    for which in ("final", "best"):
        actual, expected = (load_file(f / which / "model.safetensors") for f in (folder, other))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert max(float(w.abs().max()) for w in load_file(folder / "final" / "model.safetensors").values()) > 0
    lines, expected_lines = read_metrics(folder), read_metrics(other)
    assert len(lines) == len(expected_lines)
    for line, wanted in zip(lines, expected_lines, strict=True):
        assert figures(line) == pytest.approx(figures(wanted), rel=1e-4, abs=1e-6)


def figures(metrics: dict) -> dict[str, float]:
    """A line of the metrics without its time."""
    return {k: v for k, v in (metrics | metrics["families"]).items() if k not in ("seconds", "families")}


@pytest.mark.parametrize("estimator", ["es", "backprop"])
def test_two_processes_make_the_run_of_one_and_either_continues_the_others(estimator: str, tmp_path: Path) -> None:
    options = ("--estimator", estimator)
    in_one_process(tmp_path / "one", *options, "--outer-steps", "4")
    printed = in_two_processes(tmp_path / "two", *options, "--outer-steps", "2")
    assert printed.count("outer steps") == 1  # one process speaks for both
    if estimator == "es":
        in_one_process(tmp_path / "two", *options, "--outer-steps", "4", "--resume")
    else:
        in_two_processes(tmp_path / "two", *options, "--outer-steps", "4", "--resume")
    assert_same_run(tmp_path / "two", tmp_path / "one")
