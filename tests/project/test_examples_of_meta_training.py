"""Examples, documentation and benchmark of meta-training run, in a small setting."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers.scripts import run_script


def test_a_task_of_ones_own_is_compared_on_unseen_seeds(tmp_path: Path) -> None:
    printed = run_script(
        "examples/meta_train_own_task.py", "--outer-steps", 2, "--seeds", 2, "--out", "run", cwd=tmp_path
    )
    assert re.search(r"default: loss [\d.]+ ± [\d.]+ over 2 unseen seeds", printed)
    assert "meta-trained: loss" in printed
    assert "better on " in printed
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_tasks_of_ones_own_are_compared_on_unseen_seeds(tmp_path: Path) -> None:
    printed = run_script(
        "examples/meta_train_two_tasks.py", "--outer-steps", 1, "--seeds", 1, "--out", "run", cwd=tmp_path
    )
    line = r"{}: [\d.]+ times as fast as before \(faster on [01] of 1 unseen seeds\), held-out loss [\d.]+ of"
    assert re.search(line.format("sensors"), printed)
    assert re.search(line.format("strokes"), printed)
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


def test_learned_initial_parameters_beat_the_usual_ones(tmp_path: Path) -> None:
    # The full example reaches more than five times less; see its docstring.
    printed = run_script("examples/learn_init.py", "--outer-steps", 60, "--tasks", 60, cwd=tmp_path)
    times_less = re.search(r"([\d.]+) times less", printed)
    assert times_less, printed
    assert float(times_less[1]) > 1.2


@pytest.mark.slow
def test_the_articles_experiments_print_final_losses_and_draw_curves(tmp_path: Path) -> None:
    printed = run_script("examples/article_experiments.py", "--outer-steps", 1, "--instances", 2, cwd=tmp_path)
    assert printed.count("final loss") == 6
    assert (tmp_path / "article" / "curves.png").stat().st_size > 10_000


def test_the_benchmark_of_speed_and_memory_runs(tmp_path: Path) -> None:
    pytest.importorskip("higher")
    options = ["--eager", "--repeats", 1, "--lengths", 2, "--memory-lengths", 2, 4, "--million-steps", 0]
    run_script("tools/measure_meta_train_speed.py", "--out", tmp_path, *options, cwd=tmp_path)
    results = json.loads((tmp_path / "meta_train_speed.json").read_text(encoding="utf-8"))
    assert {row["T"] for row in results["speed"]} == {2}
    assert (tmp_path / "meta_train_memory.png").stat().st_size > 10_000
