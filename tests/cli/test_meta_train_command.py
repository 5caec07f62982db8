"""``learned-optim meta-train`` and ``learned-optim plot``: help, mistakes, resuming, signals, the picture."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.command_line import failure, run_command
from learned_optim import LearnedOptimizer, Policy
from learned_optim.cli import main
from learned_optim.meta_train import MetaTrainConfig
from learned_optim.meta_train.checkpoint import read_metrics
from learned_optim.tasks import FAMILIES

SMALL = (
    "--tasks", "noisy_quadratic", "--max-length", "6", "--meta-batch", "1", "--validate-every", "0",
    "--backend", "eager",
)  # fmt: skip


def meta_train(*arguments: object) -> int:
    return main(["meta-train", *SMALL, *map(str, arguments)])


def weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("command", ["meta-train", "plot"])
def test_help_is_quick(command: str) -> None:
    took = []
    for _ in range(3):
        before = children_seconds()
        done = run_command(command, "--help")
        took.append(children_seconds() - before)
        assert done.returncode == 0, done.stderr
    assert f"usage: learned-optim {command}" in done.stdout
    assert min(took) < 0.6


def children_seconds() -> float:
    """Processor time of finished child processes: what they take on a free core, however busy this one is."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_names_every_setting() -> None:
    shown = run_command("meta-train", "--help").stdout
    for name in MetaTrainConfig().to_dict():
        assert "--" + name.replace("_", "-") in shown, name


@pytest.mark.parametrize(("arguments", "message"), [
    (["--sigm", "1"], r"meta-train: unknown option '--sigm', did you mean '--sigma'\?; see .*"),
    (["--estimator", "backprob"], "meta-train: .*backprob.*'backprop'.*"),
    (["--outer-steps", "many"], "meta-train: --outer-steps must be a whole number, found 'many'; see .*"),
    (["--sigma", "little"], "meta-train: --sigma must be a number, found 'little'; see .*"),
    (["--sigma", "0"], r"meta-train: --sigma must be positive, found 0\.0"),
    (["--outer-steps", "0"], "meta-train: --outer-steps must be 1 or more, found 0"),
    (["--from", "default"], "meta-train: unknown option '--from', it is called '--start'"),
    (["--tasks", "noisy_quadratics"], r"meta-train: unknown task family 'noisy_quadratics'; "
                                      r"did you mean 'noisy_quadratic'\?"),
    (["--validation-tasks", "val_vae_leters"], r"meta-train: .*did you mean 'val_vae_letters'\?"),
])  # fmt: skip
def test_a_misspelt_option_or_task_is_one_line_with_the_nearest_match(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = failure(capsys, "meta-train", "--out", str(tmp_path / "run"), *arguments, status=2)
    assert re.fullmatch(f"learned-optim: {message}\n", printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--start", "nope"], "unknown policy 'nope': .*"),
    (["--meta-optimizer", "Adom"], "unknown meta_optimizer 'Adom'; known are .*"),
    (["--settings", "missing.toml"], "no such settings file: missing.toml"),
])  # fmt: skip
def test_settings_that_do_not_work_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = failure(capsys, "meta-train", "--out", str(tmp_path / "run"), *SMALL, *arguments, status=1)
    assert re.fullmatch(f"learned-optim: {message}\n", printed)
    assert not (tmp_path / "run").exists()


def test_a_run_is_refused_without_resume_and_continued_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert meta_train("--out", tmp_path / "a", "--outer-steps", 2) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 outer steps" in printed
    LearnedOptimizer([Policy().head], policy=str(tmp_path / "a" / "best"))  # as the last line says
    assert f'policy="{tmp_path / "a" / "best"}"' in printed
    before = weights(tmp_path / "a")
    assert meta_train("--out", tmp_path / "a", "--outer-steps", 4) == 1
    assert "already holds a run: continue it with --resume" in capsys.readouterr().err
    assert weights(tmp_path / "a") == before
    assert meta_train("--out", tmp_path / "a", "--outer-steps", 4, "--resume") == 0
    assert [m["outer_step"] for m in read_metrics(tmp_path / "a")] == [0, 1, 2, 3]
    # Nothing to resume: it begins.
    assert meta_train("--out", tmp_path / "b", "--outer-steps", 4, "--resume") == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_run_starts_at_another_policy(tmp_path: Path) -> None:
    assert meta_train("--out", tmp_path / "a", "--outer-steps", 2) == 0
    start = tmp_path / "a" / "final"
    assert meta_train("--out", tmp_path / "b", "--outer-steps", 1, "--meta-lr", 0, "--start", start) == 0
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


@pytest.mark.parametrize("form", ["toml", "json"])
def test_settings_come_from_a_file_and_options_win_over_it(form: str, tmp_path: Path) -> None:
    config = MetaTrainConfig(
        tasks=("noisy_quadratic",), max_length=6, meta_batch=1, validate_every=0, outer_steps=5, estimator="pes",
        parts=("tensor_head",), meta_lr=0.01,
    )  # fmt: skip
    file = tmp_path / f"settings.{form}"
    file.write_text(config.to_toml() if form == "toml" else json.dumps(config.to_dict()))
    options = ["--outer-steps", "2", "--parts", "amplitude", "--meta-lr", str(MetaTrainConfig.meta_lr)]
    assert main(["meta-train", "--out", str(tmp_path / "run"), "--settings", str(file), *options]) == 0
    used = MetaTrainConfig.from_file(tmp_path / "run" / "config.toml")
    # An option wins where it is the default, too.
    assert sorted(config.differences(used)) == [
        "meta_lr: 0.01 -> 0.03", "outer_steps: 5 -> 2", "parts: ['tensor_head'] -> ['amplitude']",
    ]  # fmt: skip


def test_a_run_is_resumed_with_its_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert meta_train("--out", tmp_path / "run", "--outer-steps", 2) == 0
    before = MetaTrainConfig.from_file(tmp_path / "run" / "config.toml")
    assert main(["meta-train", "--out", str(tmp_path / "run"), "--resume", "--outer-steps", "3"]) == 0
    after = MetaTrainConfig.from_file(tmp_path / "run" / "config.toml")
    assert before.differences(after) == ["outer_steps: 2 -> 3"]
    capsys.readouterr()
    printed = failure(capsys, "meta-train", "--out", str(tmp_path / "run"), "--resume", "--sigma", "0.5", status=1)
    assert "sigma: 0.1 -> 0.5" in printed


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_place_of_the_folder_is_said_before_any_work(
    below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learned_optim.meta_train.preflight.check_tasks", lambda *_: pytest.fail("work"))
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    printed = failure(capsys, "meta-train", "--out", str(out), *SMALL, status=1)
    assert f"written into the folder {out}, but {tmp_path / 'file'} is a file" in printed
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_its_status_and_a_folder_to_resume(
    number: int, status: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-W", "error", "-m", "learned_optim", "meta-train", "--out", str(tmp_path / "a"), *SMALL]
    process = subprocess.Popen(
        [*command, "--outer-steps", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    metrics = tmp_path / "a" / "metrics.jsonl"
    for _ in range(600):
        if process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0):
            break
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert re.fullmatch(r"finishing this outer step( \(about \d+ s\))?; again to stop now\n", err)
    assert re.search(r"\d+ of 100000 outer steps, no validation.*\nstopped by a signal; continue with --resume\n$", out)
    done = len(read_metrics(tmp_path / "a"))
    assert done > 0
    assert meta_train("--out", tmp_path / "a", "--outer-steps", done + 1, "--resume") == 0
    assert meta_train("--out", tmp_path / "b", "--outer-steps", done + 1) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_outer_step_ends_the_command_at_once(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with monkeypatch.context() as patch:
        patch.setattr("learned_optim.meta_train.outer_loop.validate", lambda *_: signal.raise_signal(number))
        arguments = ("--out", tmp_path / "run", "--tasks", "tiny_mlp", "--validate-every", 2)
        arguments += ("--validation-tasks", "tiny_mlp", "--validation-length", 5)
        assert meta_train(*arguments, "--outer-steps", 2) == status
    assert "stopped by a signal before anything was saved; begin again with --resume" in capsys.readouterr().out
    signal.signal(signal.SIGINT, ctrl_c)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert meta_train(*arguments, "--outer-steps", 2, "--resume") == 0


def test_a_run_that_improves_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--validate-every", 2, "--validation-tasks", "tiny_mlp", "--validation-length", 5, "--meta-lr", 0)
    assert meta_train("--out", tmp_path / "run", "--outer-steps", 2, *options) == 0
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path / 'run'}: 2 of 2 outer steps, no improvement on validation; best is the start\n"


def test_a_start_that_fails_leaves_its_folder_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ("meta-train", "--out", str(tmp_path / "run"), *SMALL, "--outer-steps", "1")
    printed = failure(capsys, *arguments, "--device", "cuda", status=1)
    assert re.fullmatch("learned-optim: device 'cuda' cannot be used: .*; take device 'cpu'\n", printed)
    assert not (tmp_path / "run").exists()
    assert main(list(arguments)) == 0


def test_all_names_of_the_zoo_are_in_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["meta-train", "--out", str(tmp_path / "run"), "--tasks", "zzzzzzzz"]) == 2
    first, *columns = capsys.readouterr().err.splitlines()
    assert first == "learned-optim: meta-train: unknown task family 'zzzzzzzz'; known names:"
    assert max(map(len, columns)) <= 120
    assert set(" ".join(columns).split()) == {*FAMILIES, "train", "validation", "all"}


def test_plot_draws_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    options = ("--validate-every", "2", "--validation-tasks", "tiny_mlp", "--validation-length", "5")
    assert meta_train("--out", folder, "--outer-steps", 4, *options) == 0
    capsys.readouterr()
    assert main(["plot", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'curves.png'}\n"
    assert main(["plot", str(folder), "--out", str(tmp_path / "other.png")]) == 0
    for picture in (folder / "curves.png", tmp_path / "other.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000


def test_a_picture_without_an_ending_is_a_png_and_its_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert meta_train("--out", tmp_path / "run", "--outer-steps", 1) == 0
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "new" / "picture")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'picture.png'}\n"
    assert (tmp_path / "new" / "picture.png").is_file()


def test_the_folder_of_a_run_is_no_policy_but_holds_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert meta_train("--out", tmp_path / "run", "--outer-steps", 1) == 0
    capsys.readouterr()
    printed = failure(capsys, "info", str(tmp_path / "run"), status=1)
    assert f"is the folder of a meta-training run: give {tmp_path / 'run' / 'best'}" in printed


def test_plot_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run" in failure(capsys, "plot", str(tmp_path), status=1)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "nothing to draw" in failure(capsys, "plot", str(tmp_path), status=1)


def test_a_misspelt_required_option_is_called_misspelt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = failure(capsys, "meta-train", "--otu", str(tmp_path), status=2)
    assert printed.startswith("learned-optim: meta-train: unknown option '--otu', did you mean '--out'?; see")
