"""The command line: quick help, one line for every mistake, the right exit code."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import failure, run_command
from learned_optim import Policy, __version__, cli
from learned_optim.cli import COMMANDS, Command, main


def test_help_is_quick() -> None:
    took = []
    for _ in range(5):
        start = time.perf_counter()
        done = run_command("--help")
        took.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert command.summary in done.stdout
    assert min(took) < 0.6


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_needs_no_torch(command: str) -> None:
    code = (
        "import sys; from learned_optim.cli import main; status = main([sys.argv[1], '--help'])\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules; sys.exit(status)"
    )
    done = run_command(command, code=code)
    assert done.returncode == 0, done.stderr
    assert f"usage: learned-optim {command}" in done.stdout


def test_no_arguments_show_the_help_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: learned-optim COMMAND")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"learned-optim {__version__}\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["pul"], r"unknown command 'pul', did you mean 'pull'\?"),
    (["xyzzy"], "unknown command 'xyzzy'"),
    (["--verison"], r"unknown option '--verison', did you mean '--version'\?"),
    (["pull", "a/b", "--revsion", "x"], r"pull: unknown option '--revsion', did you mean '--revision'\?; see .*"),
    (["push", "d", "a/b", "--privat=1"], r"push: unknown option '--privat', did you mean '--private'\?; see .*"),
    (["info", "default", "--zzz"], "info: unknown option '--zzz'; see `learned-optim info --help`"),
    (["pull", "a/b", "c/d"], "pull: one argument too many, 'c/d'; see `learned-optim pull --help`"),
    (["pull"], r"pull: missing: REPO \(Hub repository: owner/name, or .*\); see `learned-optim pull --help`"),
    (["push"], r"push: missing: DIR \(.*\), REPO \(.*\); see `learned-optim push --help`"),
    (["plot"], r"plot: missing: DIR \(Folder of the run\); see `learned-optim plot --help`"),
    (["bench", "--suite", "step", "--repeats", "0"], "bench: --repeats must be 1 or more, found 0"),
    (["pull", "a/b", "--revision"], "pull: .*--revision.*; see `learned-optim pull --help`"),
])  # fmt: skip
def test_wrong_arguments_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.fullmatch(f"learned-optim: {message}\n", failure(capsys, *arguments, status=2))


@pytest.mark.parametrize(("arguments", "message"), [
    (["info", "nope"], "unknown policy 'nope': bundled policies are .*"),
    (["info", "./nope"], r"\./nope does not exist: .*"),
    (["info", "default", "--revision", "v1"], "revision='v1' was given, but bundled:default is no Hub repository: .*"),
    (["pull", "default"], "'default' is not a Hub repository: give owner/name, or owner/name@revision"),
    (["push", "./nope", "a/b", "--dry-run"], "nope does not exist: .*"),
    (["push", "./nope", "a/b"], "nope does not exist: .*"),
])  # fmt: skip
def test_errors_of_the_library_are_one_line_and_status_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.fullmatch(f"learned-optim: {message}\n", failure(capsys, *arguments, status=1))


def test_a_process_ends_with_the_status_and_without_a_traceback() -> None:
    done = run_command("pull", "nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    done = run_command("pull", "--nope")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_an_interrupted_bench_says_that_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("learned_optim.bench.quality.run_quality", interrupted)
    assert main(["bench", "--suite", "quality", "--quick", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == ("interrupted: finished runs are kept, and the same command goes on from there\n")


@pytest.mark.parametrize("place", ["results.txt", "results.txt/inside"])
def test_a_bench_whose_folder_is_a_file_does_not_begin(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.txt").write_text("mine")
    monkeypatch.setattr("learned_optim.bench.quality.run_quality", None)  # not to be called
    out = str(tmp_path / place)
    message = failure(capsys, "bench", "--suite", "quality", "--quick", "--out", out, status=2)
    assert message == (
        f"learned-optim: bench: results are written into the folder {out}, but {tmp_path / 'results.txt'} is a file: "
        "give --out a folder\n"
    )
    assert (tmp_path / "results.txt").read_text() == "mine"


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("learned_optim.cli.policies.info", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("learned_optim.cli.policies.info", broken)
    with pytest.raises(KeyError):
        main(["info"])


def test_a_command_is_a_dataclass_and_a_function(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "new", Command("s", "learned_optim.cli.policies:Info", f"{__name__}:shout"))
    assert main(["new", "loud", "--tasks"]) == 0
    assert capsys.readouterr().out == "LOUD True\n"
    monkeypatch.setitem(COMMANDS, "new", Command("s", "learned_optim.cli.policies:Info", f"{__name__}:refuse"))
    assert failure(capsys, "new", status=2) == "learned-optim: not these two together\n"


def shout(config: Any) -> None:
    sys.stdout.write(f"{config.policy.upper()} {config.tasks}\n")


def refuse(config: Any) -> None:
    raise cli.UsageError("not these two\ntogether")


def test_info_shows_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {
        "training": {"method": "ES"}, "notes": ["a note"],
        "evaluation": {"tasks": [{"task": "lost", "speedup": 0.5}, {"task": "won_2", "speedup": 2.0}]},
    }  # fmt: skip
    Policy().save_pretrained(tmp_path, results)
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in (str(tmp_path), "cell +gated", Policy().fingerprint(), "method +ES", "won_2 + 2",
                 r"lost +0\.50 \(loses\)", "-  a note"):  # fmt: skip
        assert re.search(f"^{text}", printed, re.MULTILINE) or text in printed, text
    assert "\\" not in printed
    assert "`" not in printed
    assert main(["info"]) == 0
    assert capsys.readouterr().out.startswith("bundled:default\n")


def test_info_lists_the_task_families(capsys: pytest.CaptureFixture[str]) -> None:
    from learned_optim.tasks import FAMILIES

    assert main(["info", "--tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(FAMILIES)
    for name, split, description in ((f.name, f.split, f.description) for f in FAMILIES.values()):
        assert f"{name.ljust(max(map(len, FAMILIES)))}  {split.ljust(len('validation'))}  {description}" in lines


def test_a_dry_run_prints_files_and_card_and_sends_nothing(tmp_path: Path) -> None:
    Policy().save_pretrained(tmp_path, {"notes": ["a note"]})
    # Offline and without a token: whatever it sent would fail.
    done = run_command(
        "push", str(tmp_path), "me/rule", "--dry-run", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home")
    )
    assert done.returncode == 0, done.stderr
    for text in ("model.safetensors", "results.json", "config.json", "README.md", 'policy="me/rule"', "- a note"):
        assert text in done.stdout
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "README.md", "config.json", "model.safetensors", "results.json"
    ]  # fmt: skip


def test_a_reader_that_stops_reading_is_no_error() -> None:
    code = (
        "import os, sys; from learned_optim.cli import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1); sys.exit(main(['--help']))"
    )
    done = run_command(code=code)
    assert (done.returncode, done.stderr) == (1, "")
