"""The examples that need a client: hf_trainer.py and lightning_trainer.py."""

from __future__ import annotations

import pytest

from helpers.scripts import assert_learned_is_ahead, run_script


@pytest.mark.parametrize(
    ("script", "client"), [("hf_trainer.py", "transformers"), ("lightning_trainer.py", "lightning")]
)
def test_a_run_is_compared_with_adamw(tmp_path, script, client):
    pytest.importorskip(client)
    printed = run_script(f"examples/{script}", "--steps", 40, cwd=tmp_path, program=())
    assert_learned_is_ahead([line for line in printed.splitlines() if " steps" in line and ": training loss" in line])
