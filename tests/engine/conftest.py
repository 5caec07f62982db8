"""Kernels of the policies that all modules of this folder use, compiled by the worker that comes first."""

from __future__ import annotations

import fcntl

import pytest

from helpers.support import leaves, make, run
from learned_optim.engine import native_library


@pytest.fixture(scope="module")
def kernel_cache():
    """The folder in which they are."""
    folder = native_library._cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for policy in ("random", "orthogonal"):
            params = leaves((3,))
            run(make(params, policy, backend="compiled"), params, 1)
    return folder
