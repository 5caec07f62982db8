"""The quality suite as a whole, on tasks that take milliseconds."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.bench_tasks import Cliff, Line, normed
from learned_optim import Policy, PolicyConfig
from learned_optim.bench import QualityConfig, compare, draw_all, markdown, read_looks, results, run_quality, summarise
from learned_optim.bench.curves import final_loss
from learned_optim.bench.figures import compare_all, share_at_least
from learned_optim.bench.pool import Progress
from learned_optim.bench.quality import CHOSEN_BY, FIXED, HELD_OUT, REFERENCE, QualityResult, load_policies
from learned_optim.cli import main


def config(cache: Path, **changes: Any) -> QualityConfig:
    return dataclasses.replace(QualityConfig(cache=cache, seeds=2, evaluations=4, quick=False), **changes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> QualityResult:
    cache = tmp_path_factory.mktemp("cache")
    return run_quality(config(cache, ablations=True), tasks=[Line(length=20), Line("longer", 30), normed(10)])


def test_everything_is_measured_on_every_task_and_seed(measured: QualityResult) -> None:
    names = [c.name for c in measured.contenders]
    assert {"learned: default", "learned: default, lr tuned", REFERENCE, FIXED} <= set(names)
    assert ("Muon, tuned" in names) == hasattr(torch.optim, "Muon")  # since torch 2.9
    assert "schedule-free AdamW, tuned" in names
    assert {"SGD with momentum, tuned", "SOAP, tuned"} <= set(names)
    for task in measured.tasks:
        assert list(task.choices) == names
        assert all(len(choice.runs) == 2 for choice in task.choices.values())
    assert [task.steps for task in measured.tasks] == [20, 30, 10]


def test_the_reference_against_itself_is_1_and_no_baseline_setting_beats_its_choice(measured: QualityResult) -> None:
    summary = summarise(compare_all(measured, REFERENCE, REFERENCE))
    assert summary.speedup == 1.0
    assert summary.held_out_ratio == pytest.approx(1.0)
    assert summary.losses == 0
    for task in measured.tasks:
        tuned, fixed = task.choices[REFERENCE], task.choices[FIXED]
        assert sum(map(final_loss, tuned.runs)) <= sum(map(final_loss, fixed.runs))


def test_held_out_figures_are_compared_with_the_reference_chosen_by_the_same_figure(tmp_path: Path) -> None:
    class Overfitting(Line):
        """What is held out wants the weights to stay small, so the settings that train fastest are the worst."""

        def eval_loss(self, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return 1.0 + params["output"].square().sum()

    task = run_quality(config(tmp_path, baselines=("adamw",)), tasks=[Overfitting()]).tasks[0]
    assert task.choices[REFERENCE].setting.lr >= 1e-2
    assert task.chosen_by["held-out loss at the end"][REFERENCE].setting.lr == 1e-4
    ours, itself = compare(task, "learned: default", REFERENCE), compare(task, REFERENCE, REFERENCE)
    end, lowest = (ours.held_out[figure] for figure in HELD_OUT)
    assert end.reference_setting.startswith("lr 0.0001 ")
    assert end.reference_loss is not None
    assert 1.0 < end.reference_loss < 1.001
    assert end.loss == ours.held_out_loss
    assert ours.held_out_ratio is not None
    assert end.ratio is not None
    assert max(1.0, ours.held_out_ratio) < end.ratio
    assert lowest.ratio == 1.0  # that of the start
    assert [itself.held_out[figure].ratio for figure in HELD_OUT] == [1.0, 1.0]
    assert summarise([ours]).held_out_ratios == {figure: ours.held_out[figure].ratio for figure in HELD_OUT}


def test_no_setting_has_a_lower_figure_than_the_one_chosen_by_it(measured: QualityResult) -> None:
    for task in measured.tasks:
        for figure, choices in task.chosen_by.items():
            values = [CHOSEN_BY[figure](run) for run in choices[REFERENCE].runs]
            for other in (choices[FIXED], *(by[REFERENCE] for by in task.chosen_by.values())):
                assert sum(values) <= sum(CHOSEN_BY[figure](run) for run in other.runs)  # pyright: ignore


def test_adamw_made_of_a_policy_has_speedup_1_over_adamw(tmp_path: Path) -> None:
    result = run_quality(
        config(tmp_path, baselines=("adamw",), tune_lr=False), tasks=[Line()],
        policies={"adamw": Policy(PolicyConfig.adamw())},
    )  # fmt: skip
    comparison = compare(result.tasks[0], "learned: adamw", FIXED)
    assert comparison.speedup == pytest.approx(1.0, abs=1e-3)
    assert comparison.loss == pytest.approx(comparison.reference_loss, rel=1e-4)
    assert comparison.held_out_ratio == pytest.approx(1.0, rel=1e-4)


def test_results_are_what_the_card_takes(measured: QualityResult, tmp_path: Path) -> None:
    values = results(measured, command="learned-optim bench --suite quality")
    json.dumps(values, allow_nan=False)
    assert len(values["evaluation"]["tasks"]) == 3
    assert values["evaluation"]["reference"] == "AdamW, best of 14 settings per task"
    assert values["license"] == "apache-2.0"
    Policy().save_pretrained(tmp_path, results=values)
    card = (tmp_path / "README.md").read_text()
    assert "longer" in card
    assert "speedup in time" in card
    assert {
        "speedup over AdamW, tuned, geometric mean",
        "speedup over AdamW, tuned, hidden state reset",
        "lowest held-out loss, over that of AdamW chosen by it, geometric mean",
    } <= values["evaluation"]["summary"].keys()
    rows = values["quality"]["contenders"][0]["tasks"]
    assert {"loss", "reference_loss", "reference_setting"} == set(rows[0]["held_out"]["lowest held-out loss"])
    assert str(Path.home()) not in json.dumps(values)


def test_tables_hold_every_contender_and_ablation(measured: QualityResult) -> None:
    text = markdown(measured, looks=3)
    for contender in measured.contenders:
        assert f"| {contender.name} |" in text
    assert "Policies were compared on validation tasks 3 times" in text
    assert "## Ablations" in text
    assert "| | held-out loss at the end | lowest held-out loss |" in " ".join(text.replace("|  |", "| |").split())
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_pictures_are_drawn_for_all_tasks(measured: QualityResult, tmp_path: Path) -> None:
    files = draw_all(measured, tmp_path / "plots")
    assert [f.name for f in files] == [
        "speedup.png", "profile.png", "curves.png", "line.png", "longer.png", "normed.png"
    ]  # fmt: skip
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_a_second_time_makes_no_run_and_gives_the_same(tmp_path: Path) -> None:
    first = run_quality(config(tmp_path, baselines=("adamw",)), tasks=[Line()])
    second = run_quality(config(tmp_path, baselines=("adamw",)), tasks=[Line()])
    assert first.new_runs > 0
    assert second.new_runs == 0
    assert results(first) == results(second)


def test_an_interrupted_bench_goes_on_where_it_was(tmp_path: Path) -> None:
    seen: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        seen.append(progress)
        if progress.done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_quality(config(tmp_path), tasks=[Line()], progress=interrupt)
    result = run_quality(config(tmp_path), tasks=[Line()])
    assert result.new_runs == seen[-1].total - 10
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_files_are_made_again_and_mentioned(tmp_path: Path) -> None:
    first = run_quality(config(tmp_path, baselines=("adamw",)), tasks=[Line()])
    next(iter(tmp_path.rglob("*.npz"))).write_bytes(b"damage")
    second = run_quality(config(tmp_path, baselines=("adamw",)), tasks=[Line()])
    assert second.new_runs == 1
    assert "1 damaged files in the cache were made again" in second.notes
    assert [c.setting for c in first.tasks[0].choices.values()] == [
        c.setting for c in second.tasks[0].choices.values()
    ]  # fmt: skip


def test_keep_runs_the_best_settings_only_on_further_seeds(tmp_path: Path) -> None:
    everything = run_quality(config(tmp_path / "all", baselines=("adamw",)), tasks=[Line()])
    some = run_quality(config(tmp_path / "some", baselines=("adamw",), keep=2), tasks=[Line()])
    # 14 of AdamW and 6 of ours on two seeds, against one seed of all and another of 2 + 2 by each of three figures,
    # most of them the same (and of those not tuned).
    assert everything.new_runs == 40
    assert 24 <= some.new_runs <= 34


def test_a_diverged_run_never_wins_and_is_counted(tmp_path: Path) -> None:
    result = run_quality(config(tmp_path, tune_lr=True), tasks=[Cliff()])
    task = result.tasks[0]
    assert not task.choices[REFERENCE].diverged
    bold = Policy(dataclasses.replace(PolicyConfig(), step_scale=1e6))
    result = run_quality(config(tmp_path), tasks=[Cliff()], policies={"bold": bold})
    summary = summarise(compare_all(result, "learned: bold", REFERENCE))
    assert summary.diverged == 2
    assert summary.speedup == pytest.approx(0.01)
    task_row = results(result)["evaluation"]["tasks"][0]
    assert task_row["diverged"]
    assert task_row["speedup"] is None
    assert "diverged" in markdown(result)
    draw_all(result, tmp_path / "plots")


def test_several_processes_give_the_same_figures_as_one(tmp_path: Path) -> None:
    one = run_quality(config(tmp_path / "one", baselines=("adamw",), tune_lr=False, seeds=1), tasks=[Line()])
    two = run_quality(
        config(tmp_path / "two", baselines=("adamw",), tune_lr=False, seeds=1, processes=2), tasks=[Line()]
    )  # fmt: skip
    for name, choice in one.tasks[0].choices.items():
        other = two.tasks[0].choices[name]
        assert choice.setting == other.setting
        assert choice.runs[0].losses.tolist() == other.runs[0].losses.tolist()


def test_a_task_that_cannot_be_sent_to_a_process_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 'normed' cannot be sent to another process"):
        run_quality(config(tmp_path, processes=2), tasks=[normed()])


def test_several_policies_stand_side_by_side(tmp_path: Path) -> None:
    Policy().save_pretrained(tmp_path / "a" / "best")
    Policy(PolicyConfig.adamw()).save_pretrained(tmp_path / "b" / "best")
    names = [str(tmp_path / "a" / "best"), str(tmp_path / "b" / "best"), "default"]
    assert list(load_policies(names)) == ["a/best", "b/best", "default"]
    with pytest.raises(ValueError, match="named twice"):
        load_policies(["default", "default"])


def test_the_profile_counts_tasks() -> None:
    assert share_at_least([0.5, 1.0, 2.0, None], 1.0) == 0.5
    assert math.isnan(share_at_least([], 1.0))


@pytest.mark.parametrize(("changes", "message"), [
    ({"seeds": 0}, "seeds must be 1 or more"), ({"keep": -1}, "keep must be 0 or more"),
    ({"baselines": ("muon",)}, "adamw"), ({"baselines": ("adamw", "lion")}, "names out of"),
    ({"policies": ()}, "at least one"), ({"backend": "gpu"}, "backend"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QualityConfig(**changes)


def test_the_cache_honours_the_xdg_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert QualityConfig().cache_folder() == tmp_path / "learned_optim" / "bench"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert QualityConfig().cache_folder() == Path.home() / ".cache" / "learned_optim" / "bench"


def test_the_command_prints_the_table_and_writes_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--max-length", "5", "--tasks", "val_generated_tables", "--baselines", "adamw", "--cache",
               str(tmp_path / "cache"), "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(["bench", "--suite", "quality", *options]) == 0
    printed = capsys.readouterr()
    assert "| learned: default |" in printed.out
    assert printed.out.rstrip().endswith(str(tmp_path / "out"))
    assert printed.err == ""
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["evaluation"]["command"] == (
        "learned-optim bench --suite quality --tasks val_generated_tables --max-length 5 --baselines adamw --quick"
    )
    assert (tmp_path / "out" / "table.md").is_file()
    assert (tmp_path / "out" / "plots" / "profile.png").is_file()
    assert len(read_looks(tmp_path / "cache")) == 1


@pytest.mark.parametrize(("options", "message"), [
    (["--tasks", "val_mlp_leters"], "did you mean 'val_mlp_letters'"),
    (["--seeds", "0"], "seeds must be 1 or more"),
    (["--policies", "no_such_policy"], "no_such_policy"),
    (["--repeats", "3"], "--repeats is no option of the suite quality"),
])  # fmt: skip
def test_mistakes_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "quality", *options]) in (1, 2)
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
