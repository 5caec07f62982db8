"""The script for GPUs, run on the CPU in small: plain operations stand in for the compiled kernels."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.scripts import load_script
from learned_optim import LearnedOptimizer
from learned_optim.bench import step


@pytest.fixture
def gpu(monkeypatch):
    module = load_script("tools/measure_gpu.py")
    contenders = step.contenders([torch.empty(8, 8)])
    contenders = {name: make for name, make in contenders.items() if name.startswith("AdamW") or name == "ours, eager"}
    contenders["ours, compiled"] = lambda params: LearnedOptimizer(params, backend="eager")
    monkeypatch.setattr(step, "contenders", lambda params: contenders)
    monkeypatch.setattr(module, "SHAPES", [(), (0,), (3,), (512,), (40, 5), (8, 3, 3, 3)])
    monkeypatch.setattr(module, "WAYS", dict.fromkeys(module.WAYS, "eager"))
    monkeypatch.setattr(module, "FIRST_STEP", module.FIRST_STEP.replace('"compiled"', '"eager"'))
    return module


@pytest.mark.slow
def test_every_section_is_measured_and_written(gpu, tmp_path, capfd):
    out = tmp_path / "made" / "gpu.json"
    gpu.main(["--device", "cpu", "--repeats", "1", "--out", str(out)])
    results = json.loads(out.read_text())
    assert not {title: section["error"] for title, section in results.items() if "error" in section}
    assert len(results) == 14
    assert "Not measured yet" not in out.with_suffix(".md").read_text()
    agreement = results["agreement"]["result"]
    assert agreement["eager on the GPU: NaN in one tensor, it is hurt"] is True
    assert {value for key, value in agreement.items() if "straight" in key or "differ" in key} == {0.0}
    table = out.with_suffix(".md").read_text()
    assert all(title in table for title in results)


def test_a_section_that_fails_is_recorded_and_the_next_one_goes_on(gpu, tmp_path, monkeypatch, capfd):
    def fail(run):
        raise OSError("no card | in here")

    monkeypatch.setattr(gpu, "environment", fail)
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--repeats", "1", "--out", str(out), "--only", "environment", "memory"])
    results = json.loads(out.read_text())
    assert "no card" in results["environment"]["error"]
    assert "result" in results["memory"]
    assert "no card / in here" in out.with_suffix(".md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes where there is a GPU")
def test_without_a_gpu_it_says_and_writes_nothing(gpu, tmp_path, capfd):
    gpu.main(["--out", str(tmp_path / "gpu.json")])
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
