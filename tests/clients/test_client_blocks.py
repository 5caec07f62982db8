"""The blocks for clients in README.md and docs/, each a whole script."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers import ROOT
from helpers.scripts import client_block


@pytest.mark.parametrize("client", ["transformers", "accelerate", "lightning"])
def test_the_documents_block_runs(client, tmp_path):
    pytest.importorskip(client)
    (tmp_path / "script.py").write_text(client_block(client), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "learned_optim" in line]
