"""Every script in examples/ and tools/ runs, shortened where it can be."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import ROOT, TESTS
from helpers.scripts import RUN_AND_LEAVE, assert_learned_is_ahead, run_script

TESTED = {"demo.py", "replace_adam.py", "char_lm.py", "fsdp2.py"}


def test_every_example_is_run_by_a_test() -> None:
    # Examples that come with a test of their own elsewhere are named there.
    tests = (path for path in TESTS.rglob("test_*.py") if path != Path(__file__))
    others = "".join(path.read_text(encoding="utf-8") for path in tests)
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in TESTED or path.name in others, f"no test runs examples/{path.name}"


def test_the_demo_prints_its_table_and_draws_its_curves(tmp_path: Path) -> None:
    printed = run_script(
        "examples/demo.py", "--steps", 12, "--seeds", 2, "--json", tmp_path / "demo.json", cwd=tmp_path
    )
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
    table = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["table"]
    assert list(table) == ["AdamW (defaults)", "LearnedOptimizer (defaults)"]
    for figures in table.values():
        for name, value in figures.items():
            assert name in printed
            assert value in printed


def test_the_demo_finds_the_best_of_several_settings_of_adamw(tmp_path: Path) -> None:
    run_script("examples/demo.py", "--steps", 2, "--seeds", 1, "--tuned", "--json", "demo.json", cwd=tmp_path)
    names = list(json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["table"])
    assert len(names) == 3
    assert names[2].startswith("AdamW, lr ")


def test_a_stopped_run_resumes_to_the_same_loss(tmp_path: Path) -> None:
    whole, resumed = run_script("examples/replace_adam.py", cwd=tmp_path).splitlines()
    assert whole.split()[-1] == resumed.split()[-1]


def test_the_character_model_is_compared_with_adamw(tmp_path: Path) -> None:
    printed = run_script("examples/char_lm.py", "--steps", 60, cwd=tmp_path).splitlines()
    assert_learned_is_ahead(printed)


def test_sharded_training_under_torchrun_is_compared_with_adamw(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(RUN_AND_LEAVE))
    printed = run_script("examples/fsdp2.py", "--steps", 60, cwd=tmp_path, program=torchrun)
    assert_learned_is_ahead([line for line in printed.splitlines() if "loss" in line])
