"""Scripts of examples/ and tools/, run or imported, and the code in README.md and docs/."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from helpers import ROOT, TESTS

RUN_AND_LEAVE = TESTS / "helpers" / "run_and_leave.py"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"(?:^<!-- needs (?P<needs>\w+) -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run_script(script: str, *arguments: object, cwd: Path, program: tuple[str, ...] = ("-W", "error")) -> str:
    """What the script prints."""
    command = [sys.executable, *program, str(ROOT / script), *map(str, arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def load_script(script: str) -> ModuleType:
    """The script as a module."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_learned_is_ahead(printed: list[str]) -> None:
    """Of AdamW at the same learning rate and number of steps, on these small tasks."""
    losses = {line.split(":")[0]: float(re.findall(r"loss ([\d.]+)", line)[0]) for line in printed}
    assert list(losses) == ["AdamW", "LearnedOptimizer"]
    assert losses["LearnedOptimizer"] < losses["AdamW"]


def code_blocks(page: Path, language: str, needs: str | None = None) -> list[tuple[int, str]]:
    """Line number of the first line, and text, of the blocks in that language; of scripts, those that need a client."""
    text = page.read_text(encoding="utf-8")
    matches = [m for m in _BLOCK.finditer(text) if m[2] == language and m["needs"] == needs]
    return [(text.count("\n", 0, m.start(3)) + 1, m[3]) for m in matches]


def client_block(needs: str) -> str:
    """The one script of all pages that needs this client."""
    ((_, code),) = (block for page in PAGES for block in code_blocks(page, "python", needs=needs))
    return code
