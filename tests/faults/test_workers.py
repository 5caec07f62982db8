"""Workers of torchrun that run out of memory or are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, TESTS
from helpers.small_runs import assert_whole, final_bytes
from learned_optim.meta_train.checkpoint import read_metrics

#: A run of two processes, whose second does as it is told at outer step 3, once.
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from helpers.small_tasks import Quadratic
from learned_optim.meta_train import MetaTrainConfig, distributed, meta_train, outer_loop

out, what = Path(sys.argv[1]), sys.argv[2]
original = outer_loop._Run._outer_step

def outer_step(self, estimator):
    done = out.with_suffix(".done")
    if self.outer_step == 3 and distributed.rank() == 1 and not done.exists():
        done.touch()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.source.families[0].what = what
    return original(self, estimator)

outer_loop._Run._outer_step = outer_step

class Greedy(Quadratic):
    what = ""
    def loss(self, params, buffers, batch):
        if self.what == "memory":
            bytearray(2**62)
        if self.what == "allocator":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4398046511104 bytes")
        return super().loss(params, buffers, batch)

config = MetaTrainConfig(outer_steps=6, meta_batch=2, max_length=4, validate_every=0, save_every=1, seed=1)
meta_train(config, tasks=[Greedy()], out=out, resume=True, show_progress=False)
"""


def torchrun(folder: Path, out: Path, what: str, restarts: int) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(TESTS)))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--max-restarts", str(restarts), str(script), str(out), what],
        capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("what", "said"), [("memory", "MemoryError"), ("allocator", "can't allocate memory")])
def test_a_worker_out_of_memory_ends_the_run_names_the_task_and_leaves_it_to_be_resumed(what, said, tmp_path):
    failed = torchrun(tmp_path, tmp_path / "run", what, restarts=0)
    assert failed.returncode != 0
    assert "task 'quadratic' raised at outer step 3" in failed.stderr
    assert said in failed.stderr
    assert_whole(tmp_path / "run")
    assert torchrun(tmp_path, tmp_path / "run", "nothing", restarts=0).returncode == 0
    assert torchrun(tmp_path, tmp_path / "undisturbed", "nothing", restarts=0).returncode == 0
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_killed_worker_is_restarted_by_torchrun_and_the_run_ends_with_the_same_bytes(tmp_path):
    killed = torchrun(tmp_path, tmp_path / "run", "kill", restarts=1)
    assert killed.returncode == 0, killed.stderr
    assert (tmp_path / "run.done").exists()
    undisturbed = torchrun(tmp_path, tmp_path / "undisturbed", "nothing", restarts=0)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert_whole(tmp_path / "run")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "undisturbed")
    assert [m["outer_step"] for m in read_metrics(tmp_path / "run")] == list(range(6))
