"""One thread (the machine's cores are shared by parallel tests), settings of hypothesis that leave no files, and one
folder of compiled kernels for all tests, their processes and later runs: what has not changed is compiled once.
"""

from __future__ import annotations

import os
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
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels of GPUs run here
if "XDG_CACHE_HOME" not in os.environ:
    cache = Path(tempfile.gettempdir()) / f"learned-optim-tests-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(cache)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
