"""The notebook runs from top to bottom, says what came out, and is stored without outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import ROOT

NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"


def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_stored_without_outputs() -> None:
    nbformat.validate(stored())
    for cell in stored().cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook with its outputs; a cell that raises fails the test."""
    notebook = stored()
    folder = tmp_path_factory.mktemp("notebook")
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(folder))
    assert list(Path(folder).iterdir()) == [], "it leaves nothing behind"
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_it_prints_losses_steps_and_seconds_and_what_fine_tuning_brought(run: Any) -> None:
    printed = "".join(output["text"] for output in outputs(run) if output.get("name") == "stdout")
    ends = {name.strip(): float(loss) for name, loss in re.findall(r"^(.+?) +ends at ([\d.]+)", printed, re.MULTILINE)}
    assert len(ends) == 4
    assert min(ends, key=lambda name: ends[name]) == "LearnedOptimizer"
    assert re.search(r"^LearnedOptimizer +ends .* at its end after \d+ steps, [\d.]+ s$", printed, re.MULTILINE)
    assert "layers.0.linear1.weight" in printed
    assert re.search(r"^fine-tuned +loss [\d.]+ ± [\d.]+ over 10 seeds$", printed, re.MULTILINE)
    kept = "no improvement on validation; best is the start" in printed
    assert kept == ("no improvement: the best rule is the one that it began with" in printed)
    assert kept or re.search(r"fine-tuned is better on \d+ of 10 unseen seeds", printed)


def test_it_draws_curves_and_diagnostics_and_warns_of_nothing(run: Any) -> None:
    pictures = [output for output in outputs(run) if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert [output["text"] for output in outputs(run) if output.get("name") == "stderr"] == []
