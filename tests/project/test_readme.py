"""What README.md says works: its Python runs, its commands exist, its links lead somewhere, its tables are current."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.scripts import README, RUN_AND_LEAVE, readme_blocks


def test_every_python_block_runs_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    assert readme_blocks("python")
    for line, code in readme_blocks("python"):
        # Empty lines in front: a traceback then shows the README's own line numbers.
        exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), names)


def test_the_block_for_several_processes_runs_under_torchrun(tmp_path: Path) -> None:
    ((_, code),) = readme_blocks("python", needs="torchrun")
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(RUN_AND_LEAVE), "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [shlex.split(line, comments=True) for _, text in readme_blocks("sh") for line in text.splitlines()]
    assert commands
    for command in filter(None, commands):
        program, *rest = command
        if program == "make":
            assert set(rest) <= targets, f"no such target: {command}"
        elif program == "learned-optim":
            shown = [sys.executable, "-m", "learned_optim", rest[0], "--help"]
            done = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}: {done.stderr}"
        elif program == "python":
            assert (ROOT / rest[0]).is_file(), f"no such script: {command}"
        else:
            assert program in ("git", "cd", "pip", "torchrun"), f"unknown command: {command}"


def test_every_link_to_a_file_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), f"broken link: {link}"


def test_the_tables_are_those_of_the_results_files() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "readme_tables.py"), "--check"], check=False)
    assert done.returncode == 0, "run: python tools/readme_tables.py"
    for name in re.findall(r"<!-- results:(\w+) -->", README):
        assert name in ("quality", "step") or (ROOT / "docs" / "results" / f"{name}.json").is_file()
