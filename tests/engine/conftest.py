"""One folder of compiled kernels for all modules of this folder."""

from __future__ import annotations

import fcntl
import os

import pytest

from helpers.support import leaves, make, run
from learned_optim.engine.kernels import WIDTH


@pytest.fixture(scope="module")
def kernel_cache(tmp_path_factory):
    """One cold compilation, shared by all processes of this test run; or the folder that the environment names."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "inductor"))
        with open(shared / "inductor.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for policy in ("random", "orthogonal"):
                params = leaves((WIDTH,))
                run(make(params, policy, backend="compiled"), params, 1)
        yield os.environ["TORCHINDUCTOR_CACHE_DIR"]
