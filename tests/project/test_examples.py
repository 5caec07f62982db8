"""Every script in examples/ and tools/ runs, shortened where it can be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from helpers import ROOT, TESTS
from helpers.scripts import RUN_AND_LEAVE, assert_learned_is_ahead, load_script, run_script

TESTED = {"demo.py", "replace_adam.py", "char_lm.py", "fsdp2.py", "expert_parallel.py"}


def test_every_example_is_run_by_a_test() -> None:
    # Examples that come with a test of their own elsewhere are named there.
    tests = (path for path in TESTS.rglob("test_*.py") if path != Path(__file__))
    others = "".join(path.read_text(encoding="utf-8") for path in tests)
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in TESTED or path.name in others, f"no test runs examples/{path.name}"


def test_the_demo_prints_its_table_and_draws_its_curves(tmp_path: Path) -> None:
    printed = run_script("examples/demo.py", "--steps", 2, "--seeds", 2, "--json", tmp_path / "demo.json", cwd=tmp_path)
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
    table = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["table"]
    default, tuned, ours = table
    assert default == "AdamW (default, lr 1e-3)"
    assert re.fullmatch(r"AdamW, lr [13]e-[23] (constant|cosine) \(best of 8\)", tuned)
    assert ours == "LearnedOptimizer (default)"
    assert tuned.partition(" (")[0] == min(ends := tried(printed), key=lambda name: ends[name])
    for figures in table.values():
        for name, value in figures.items():
            assert name in printed
            assert value in printed


def tried(printed: str) -> dict[str, float]:
    """Held-out losses that the demo printed for AdamW's settings, to three digits."""
    return {name: float(loss) for name, loss in re.findall(r"^(AdamW, .*?) +held-out loss ([\d.]+)", printed, re.M)}


def test_the_demo_counts_steps_and_seconds_to_where_tuned_adamw_ends() -> None:
    demo = load_script("examples/demo.py")

    def run(*losses: float, per_step: float = 0.1) -> dict[str, list[float]]:
        steps = [20.0 * i for i in range(len(losses))]
        return {"step": steps, "held_out": list(losses), "seconds": [per_step * step for step in steps]}

    tuned = [run(4.0, 3.0, 2.5, 2.6), run(4.0, 3.1, 2.7, 2.4)]
    ours = [run(4.0, 2.6, 2.0, 1.9, per_step=0.2), run(4.0, 2.4, 2.2, 2.0, per_step=0.2)]
    figures = demo.summary(ours[:1], tuned[:1])
    assert figures == {
        "held-out loss": "1.900", "steps to tuned AdamW's": "20", "seconds to it": "4.0", "seconds, all steps": "12.0",
    }  # fmt: skip
    assert demo.summary(tuned, tuned)["steps to tuned AdamW's"] == "50 ± 14"  # the first is there at 40, before its end
    assert demo.summary([run(4.0, 3.0, 3.0, float("nan"))], tuned[:1])["seconds to it"] == "not reached"
    assert demo.summary([ours[0], run(4.0, 3.0, 3.0, 3.0)], tuned)["steps to tuned AdamW's"] == "not reached"


def test_a_stopped_run_resumes_to_the_same_loss(tmp_path: Path) -> None:
    whole, resumed = run_script("examples/replace_adam.py", cwd=tmp_path).splitlines()
    assert whole.split()[-1] == resumed.split()[-1]


def test_the_character_model_is_compared_with_adamw(tmp_path: Path) -> None:
    printed = run_script("examples/char_lm.py", "--steps", 60, cwd=tmp_path).splitlines()
    assert_learned_is_ahead(printed)


def test_experts_spread_over_processes_learn_as_in_one_and_resume_to_the_last_bit(tmp_path: Path) -> None:
    def losses(processes: int, folder: str, *options: object) -> list[float]:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        arguments = ("--folder", folder, "--steps", 12, *options)
        printed = run_script(
            "examples/expert_parallel.py", *arguments, cwd=tmp_path, program=(*torchrun, str(RUN_AND_LEAVE))
        )
        return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", printed, re.M)]

    straight = losses(2, "straight")
    assert len(straight) == 12
    assert straight[-1] < straight[0] - 1.0
    stopped = losses(2, "stopped", "--stop", 5)
    shutil.copytree(tmp_path / "stopped", tmp_path / "alone")
    assert [*stopped, *losses(2, "stopped")] == straight
    assert losses(1, "alone") == pytest.approx(straight[5:], rel=1e-4)


def test_sharded_training_under_torchrun_is_compared_with_adamw(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(RUN_AND_LEAVE))
    printed = run_script("examples/fsdp2.py", "--steps", 60, cwd=tmp_path, program=torchrun)
    assert_learned_is_ahead([line for line in printed.splitlines() if "loss" in line])
