"""The benchmark of a step."""

from __future__ import annotations

import pytest
import torch

from learned_optim.bench import step as bench
from learned_optim.bench.config import StepBenchConfig


def test_it_measures_all_optimizers_and_writes_a_table_and_a_picture(tmp_path, monkeypatch):
    contenders = bench.contenders([torch.empty(8, 8)])
    assert "ours, compiled" in contenders
    del contenders["ours, compiled"]  # which would take its time
    monkeypatch.setattr(bench, "contenders", lambda params: contenders)
    result = bench.run((64,), repeats=2, out=tmp_path, model=False)
    (case,) = result["devices"]["cpu"]["cases"]
    rows = case["optimizers"]
    assert {"AdamW", "AdamW (foreach)", "AdamW (fused)", "ours, eager"} <= set(rows)
    assert rows["AdamW"]["ratio"] == 1.0
    assert all(0.0 < row["low"] <= row["median"] <= row["high"] for row in rows.values())
    assert round(rows["AdamW"]["bytes"]) == 8
    assert round(rows["ours, eager"]["bytes"]) == 12
    assert "| ours, eager | 1 | 64 |" in (tmp_path / "table.md").read_text()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "plots" / "step_time.png").stat().st_size > 1000


def test_its_gpt_has_76_tensors_and_12_6_million_parameters():
    with torch.device("meta"):
        sizes = [p.numel() for p in bench.Gpt().parameters()]
    assert len(sizes) == 76
    assert round(sum(sizes) / 1e6, 1) == 12.6


@pytest.mark.parametrize("wrong", [{"sizes": (0,)}, {"repeats": 0}, {"threads": -1}])
def test_its_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StepBenchConfig(**wrong)
