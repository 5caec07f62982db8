"""The scale suite as it is run: interrupted, limited in time, from the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.scale_cells import result, write_corpus
from learned_optim import Policy
from learned_optim.bench.scale import cells, images, plan, suite, text, train
from learned_optim.bench.scale.cells import Cell, Result
from learned_optim.bench.scale.config import MODELS, ScaleConfig, quick
from learned_optim.bench.scale.figures import by_model
from learned_optim.bench.scale.plots import draw
from learned_optim.bench.scale.report import MISSING, markdown
from learned_optim.bench.scale.rivals import Setting, ours
from learned_optim.bench.scale.suite import Scale
from learned_optim.cli import main

POLICIES = {"default": Policy.from_pretrained("default")}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    few = images.data(200, 60)
    monkeypatch.setattr(images, "HELD_OUT", 60)
    monkeypatch.setattr(images, "data", lambda: few)
    monkeypatch.setattr(train, "HELD_OUT", {"text": {"cpu": 512}, "images": {"cpu": 16}})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["text-0.3M", "images-0.1M"])
@pytest.mark.parametrize("setting", [ours("default")[1], Setting("adamw", 2), Setting("muon", 3, -1)], ids=str)
def test_a_run_goes_on_where_it_was_stopped(cache: Path, tmp_path: Path, name: str, setting: Setting) -> None:
    model = quick(MODELS[name])
    problem = train.problem(model, "cpu", text.load(cache))
    cell, checkpoint = Cell(model, setting, 0, "cpu"), tmp_path / "checkpoints" / "run.pt"
    policy = POLICIES.get(setting.policy)
    whole = train.train(cell, problem, policy, checkpoint)
    assert whole is not None
    stops = 0
    while (pieces := train.train(cell, problem, policy, checkpoint, deadline=0.0)) is None:
        assert checkpoint.is_file()
        stops += 1
    assert stops
    assert not checkpoint.exists()
    np.testing.assert_array_equal(pieces.held_out, whole.held_out)
    np.testing.assert_array_equal(pieces.losses, whole.losses)
    assert 0.0 < whole.update_seconds < whole.step_seconds


def test_a_shorter_run_ends_sooner_and_decays_sooner(cache: Path, tmp_path: Path) -> None:
    model = quick(MODELS["text-0.3M"])
    problem = train.problem(model, "cpu", text.load(cache))
    short = dataclasses.replace(ours("default")[1], part=0.5)
    by_part = Cell(model, short, 0, "cpu")
    by_model_ = Cell(dataclasses.replace(model, steps=model.steps // 2), ours("default")[1], 0, "cpu")
    one, other = (train.train(c, problem, POLICIES["default"], tmp_path / "run.pt") for c in (by_part, by_model_))
    assert one is not None
    assert other is not None
    assert one.evaluated_at[-1] == one.cell.steps == model.steps // 2
    np.testing.assert_array_equal(one.held_out, other.held_out)


def test_settings_share_their_first_parameters_and_seeds_do_not(cache: Path, tmp_path: Path) -> None:
    model = quick(MODELS["text-0.3M"])
    problem = train.problem(model, "cpu", text.load(cache))
    runs = [
        train.train(Cell(model, setting, seed, "cpu"), problem, None, tmp_path / "run.pt")
        for setting, seed in ((Setting("adamw", 2), 0), (Setting("muon", 2), 0), (Setting("adamw", 2), 1))
    ]
    first = [run.held_out[0] for run in runs if run is not None]
    assert first[0] == first[1] != first[2]


def test_a_run_that_diverges_ends_early_and_says_so(cache: Path, tmp_path: Path) -> None:
    model = quick(MODELS["text-0.3M"])
    problem = train.problem(model, "cpu", text.load(cache))
    run = train.train(Cell(model, Setting("adamw", 60), 0, "cpu"), problem, None, tmp_path / "run.pt")
    assert run is not None
    assert run.diverged


def test_rates_grow_over_the_first_steps_and_fall_over_the_last_fifth() -> None:
    rival, (constant, decays) = Setting("adamw"), ours("default")
    assert [round(rival.factor(x), 3) for x in (0.024, 0.05, 0.5, 0.8, 0.9, 0.99)] == [0.5, 1.0, 1.0, 1.0, 0.5, 0.05]
    assert [decays.factor(x) for x in (0.0, 0.5, 0.8)] == [1.0, 1.0, pytest.approx(1.0)]
    assert decays.factor(0.95) == pytest.approx(0.25)
    assert {constant.factor(x) for x in (0.0, 0.5, 0.99)} == {1.0}
    assert constant.lr == 1e-3


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Runs that take no time; the list of those that were made."""
    made: list[Cell] = []

    def run(cell: Cell, *rest: Any) -> Result:
        made.append(cell)
        return result(cell, 3.0 if cell.setting.optimizer == "learned" else 2.0 ** -abs(cell.setting.exponent - 2))

    monkeypatch.setattr(suite, "train", run)
    return made


def test_the_suite_ends_complete_and_does_nothing_the_next_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, config = pretend(monkeypatch), ScaleConfig(models=("*0.?M", "text-124M"), quick=True, cache=cache)
    scale = Scale(config, POLICIES, tmp_path)
    empty = markdown(by_model(scale.results, scale.models, config.rivals))
    assert all(f"| {name} | {MISSING} | {MISSING} |" in empty for name in (m.name for m in config.chosen()))
    assert scale.run()
    assert len(made) == len(list((tmp_path / "cells").glob("*.json"))) > 40
    again = Scale(config, POLICIES, tmp_path)
    assert again.queue() == []
    rows = by_model(again.results, again.models, config.rivals)
    assert MISSING not in markdown(rows)
    pytest.importorskip("matplotlib")
    assert draw(rows, tmp_path / "full.png").stat().st_size > 5000
    assert draw(by_model([], again.models, config.rivals), tmp_path / "empty.png").stat().st_size > 5000


def test_no_run_begins_that_would_not_end_in_time(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pretend(monkeypatch)
    monkeypatch.setattr(plan, "seconds", lambda cell, results: 30.0 if cell.setting.optimizer == "muon" else 3000.0)
    config = ScaleConfig(models=("text-1M",), quick=True, minutes=1.0, cache=cache)
    assert not Scale(config, POLICIES, tmp_path).run()
    assert {cell.setting.optimizer for cell in made} == {"muon"}


def test_one_that_was_begun_goes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, config = pretend(monkeypatch), ScaleConfig(models=("text-1M",), quick=True, minutes=1.0, cache=cache)
    scale = Scale(config, POLICIES, tmp_path)
    last = scale.queue()[-1].cell
    last.path(tmp_path / "checkpoints").with_suffix(".pt").parent.mkdir()
    last.path(tmp_path / "checkpoints").with_suffix(".pt").touch()
    monkeypatch.setattr(suite, "store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        scale.run()
    assert made == [last]


def test_from_the_command_line(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        "bench",
        "--suite",
        "scale",
        "--quick",
        "--models",
        "text-0.3M",
        "--out",
        str(out),
        "--cache",
        str(cache),
    ]
    assert main([*command, "--dry-run"]) == 0
    assert "text-0.3M.default.constant.s0" in capsys.readouterr().out
    assert not (out / "cells").exists()
    assert main([*command, "--cells", "nosuch*"]) == 0
    assert "no missing cell is called nosuch*; without --cells" in capsys.readouterr().err
    assert main([*command, "--cells", "*default*s0", "*adamw.lr0.008*", "--minutes", "2"]) == 0
    names = {path.name.rpartition(".cpu")[0] for path in (out / "cells").glob("*.json")}
    assert names == {
        "text-0.3M.default.constant.s0", "text-0.3M.default.decay.s0", "text-0.3M.adamw.lr0.008.s0",
    }  # fmt: skip
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "default, constant lr" in table
    assert "3 or more missing" in table
    assert not list((out / "checkpoints").glob("*"))


def test_a_gpu_that_is_not_there_and_a_damaged_cell_are_said(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["bench", "--suite", "scale", "--quick", "--out", str(tmp_path), "--cache", str(cache)]
    assert main([*command, "--device", "cuda"]) == 1
    assert "finds no GPU" in capsys.readouterr().err
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "mine.json").write_text("{}", encoding="utf-8")
    assert main(command) == 1
    assert "mine.json" in capsys.readouterr().err
    assert (tmp_path / "cells" / "mine.json").read_text(encoding="utf-8") == "{}"
    assert cells.FORMAT == 1
