"""``learned-optim`` in a process of its own, and what it says in this one when it fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers import ROOT
from learned_optim.cli import main


def run_command(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    how = ["-c", code] if code else ["-m", "learned_optim"]
    return subprocess.run(
        [sys.executable, "-W", "error", *how, *arguments], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def failure(capsys: pytest.CaptureFixture[str], *arguments: str, status: int) -> str:
    """The one line that the command prints when it fails."""
    assert main(list(arguments)) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err
