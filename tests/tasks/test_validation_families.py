"""Validation families of users' work: held-out data apart, nothing shared with training, generators against references."""

from __future__ import annotations

import ast
import itertools
import math
import operator
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import learned_optim.tasks.families as families
from learned_optim.tasks import FAMILIES
from learned_optim.tasks.base import batch_tensors
from learned_optim.tasks.data_text import CHARACTERS
from learned_optim.tasks.families import (
    validation_changing,
    validation_control,
    validation_fine_tuning,
    validation_structures,
    validation_users,
)
from learned_optim.tasks.pretrained import pretrained_state
from learned_optim.tasks.rollout import train

MODULES = (
    validation_changing,
    validation_control,
    validation_fine_tuning,
    validation_structures,
    validation_users,
)
NAMES = [family.name for module in MODULES for family in module.FAMILIES]
SHARED = {"base", "sampling", "nets", "objectives", "pretrained", "data_images", "data_optional", "data_text"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def modules_imported(path: Path) -> set[str]:
    """Modules of ours that a file of ``families`` imports, by the last part of their names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            ours = node.level or (node.module or "").startswith("learned_optim")
            last = (node.module or "").rpartition(".")[2]
            found |= ({a.name for a in node.names} if last in ("", "families", "tasks") else {last}) if ours else set()
        elif isinstance(node, ast.Import):
            found |= {a.name.rpartition(".")[2] for a in node.names if a.name.startswith("learned_optim")}
    return found


def rows(tensor: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in tensor}


# ------------------------------------------------------------------------------------------ apart from training


def test_there_are_nine_and_all_are_for_validation():
    assert len(set(NAMES)) == 9
    assert all(FAMILIES[name].split == "validation" and name.startswith("val_") for name in NAMES)


def test_validation_imports_no_other_family_and_no_other_family_imports_it():
    here = {path.stem: modules_imported(path) for path in Path(families.__file__).parent.glob("*.py")}
    ours = {module.__name__.rpartition(".")[2] for module in MODULES}
    assert ours <= here.keys()
    assert {name: here[name] - SHARED for name in ours if here[name] - SHARED} == {}
    assert {name: here[name] & ours for name in here.keys() - ours if here[name] & ours} == {}


def test_the_check_of_imports_sees_them(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text("from .vision import f\nfrom . import graphs\nimport learned_optim.tasks.families.noise\n")
    assert modules_imported(path) == {"vision", "graphs", "noise"}


# ------------------------------------------------------------------------------------------ held-out data apart


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("val_fine_tuning_images", 0),
        ("val_switching", 0),
        ("val_fitted_q", 3),  # the next states hold the noise of the demand
        ("val_physics_informed", 0),
        ("val_recommender", 0),
        ("val_graph", 1),
        ("val_forecasting", 0),
    ],
)
def test_held_out_examples_are_not_trained_on(name, which, seed):
    task = FAMILIES[name].task(seed)
    held_out = task._eval_source()  # type: ignore[attr-defined]
    unseen = rows(held_out[which])
    if isinstance(problem_of(name, seed), validation_control.Inventory):
        unseen = {r for r in unseen if False}  # a few thousand states in all: see the test of the split below
    batches = itertools.islice(task.batches(seeded(0)), 40)
    assert not any(rows(batch[which]) & unseen for batch in batches)


def problem_of(name, seed):
    """The control problem of a task of ``val_fitted_q``."""
    if name != "val_fitted_q":
        return None
    columns = FAMILIES[name].task(seed)._eval_source()[0].shape[1]  # type: ignore[attr-defined]
    return None if columns == 2 else validation_control.Inventory((1.0,), 0, 0, 0, 0.9)
