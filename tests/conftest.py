"""One thread (the machine's cores are shared by parallel tests) and settings of hypothesis that leave no files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

pytest.register_assert_rewrite("helpers")
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "learned-optim-hypothesis")
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=20)
hypothesis.settings.load_profile("tests")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
