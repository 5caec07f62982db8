"""What happens to a run from outside and from within: second runs, clocks, tasks that raise, gradients that are NaN."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from helpers.small_runs import assert_whole, final_bytes, settings, train
from helpers.small_tasks import Quadratic
from helpers.support import assert_same_bits, copies, give_gradients, leaves, make
from learned_optim.meta_train import meta_train, outer_loop
from learned_optim.meta_train.checkpoint import CURRENT, read_metrics

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a second run is forked")
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_child(function, *arguments) -> int:
    """Start ``function`` in a forked process; returns its id. The process ends with 0 if nothing was raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- two runs ------------------------------------------------------------------------------------------------------


@needs_fork
@forks
def test_a_second_process_on_the_folder_is_refused_and_the_first_is_not_disturbed(tmp_path):
    folder, held = tmp_path / "run", tmp_path / "held"

    class Holding(Quadratic):
        def loss(self, params, buffers, batch):
            if (folder / CURRENT).exists():
                held.touch()
                end = time.monotonic() + 30
                while not (tmp_path / "go").exists() and time.monotonic() < end:
                    time.sleep(0.01)
            return super().loss(params, buffers, batch)

    child = in_child(lambda: meta_train(settings(), tasks=[Holding()], out=folder, show_progress=False))
    try:
        end = time.monotonic() + 30
        while not held.exists() and time.monotonic() < end:
            time.sleep(0.01)
        for resume in (False, True):
            with pytest.raises(BlockingIOError, match=f"another process is meta-training in {folder}"):
                meta_train(settings(seed=2), tasks=[Quadratic()], out=folder, resume=resume, show_progress=False)
    finally:
        (tmp_path / "go").touch()
        assert status_of(child) == 0
    meta_train(settings(), tasks=[Quadratic()], out=tmp_path / "undisturbed", show_progress=False)
    assert final_bytes(folder) == final_bytes(tmp_path / "undisturbed")


# --- clocks --------------------------------------------------------------------------------------------------------


def test_clocks_that_jump_change_nothing_but_the_times(tmp_path, monkeypatch):
    train(settings(), tmp_path / "quiet")
    for name in ("time", "perf_counter", "monotonic"):
        jumps = itertools.cycle([0.0, 3e7, -3e7, -1e9, 1e9])  # a year to either side, and the other end of the epoch
        original = getattr(time, name)
        monkeypatch.setattr(time, name, lambda original=original, jumps=jumps: original() + next(jumps))
    train(settings(outer_steps=4), tmp_path / "jumping")
    train(settings(), tmp_path / "jumping", resume=True)
    monkeypatch.undo()
    assert final_bytes(tmp_path / "quiet") == final_bytes(tmp_path / "jumping")
    assert [m["outer_step"] for m in read_metrics(tmp_path / "jumping")] == list(range(6))
    seconds = [m["seconds"] for m in read_metrics(tmp_path / "jumping")]
    assert all(0.0 <= a <= b for a, b in itertools.pairwise(seconds))
    assert json.loads((tmp_path / "jumping" / "final" / "results.json").read_text())["training"]["core_hours"] >= 0.0


# --- tasks that raise ----------------------------------------------------------------------------------------------

LONG = {"outer_steps": 40, "save_every": 10, "validate_every": 0, "max_length": 2, "meta_batch": 2}


@pytest.fixture
def outer_step(monkeypatch):
    """The number of the outer step under way."""
    now = [-1]
    original = outer_loop._Run._outer_step

    def noted(self, estimator):
        now[0] = self.outer_step
        return original(self, estimator)

    monkeypatch.setattr(outer_loop._Run, "_outer_step", noted)
    return now


class Bad(Quadratic):
    name = "bad"

    def __init__(self, outer_step, when):
        super().__init__()
        self.outer_step, self.when = outer_step, when

    def loss(self, params, buffers, batch):
        if self.outer_step[0] in self.when:
            raise ZeroDivisionError("once in a while")
        return super().loss(params, buffers, batch)


def test_a_task_that_raises_at_outer_step_37_is_named_and_the_mended_run_ends_with_the_same_bytes(outer_step, tmp_path):
    config = settings(**LONG | {"meta_batch": 1})
    with pytest.raises(RuntimeError, match="task 'bad' raised at outer step 37: ZeroDivisionError: once in a while"):
        meta_train(config, tasks=[Bad(outer_step, [37])], out=tmp_path / "run", show_progress=False)
    assert_whole(tmp_path / "run")
    assert torch.load(tmp_path / "run" / CURRENT, weights_only=True)["outer_step"] == 30
    meta_train(config, tasks=[Bad(outer_step, [])], out=tmp_path / "run", resume=True, show_progress=False)
    meta_train(config, tasks=[Bad(outer_step, [])], out=tmp_path / "mended", show_progress=False)
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "mended")


def test_with_keep_going_it_is_left_out_and_counted_and_the_others_go_on(outer_step, tmp_path):
    config = settings(**LONG, keep_going=True)
    result = meta_train(config, tasks=[Bad(outer_step, range(37, 40)), Quadratic()], out=tmp_path, show_progress=False)
    assert len(result.history) == 40
    assert all("failures" not in m for m in result.history[:37])
    failed = result.history[-1]["failures"]
    assert set(failed) == {"bad"}
    assert failed["bad"] >= 1
    assert any("quadratic" in m["families"] for m in result.history[37:])
    assert all(bool(w.isfinite().all()) for w in result.last.weights().values())


def test_an_outer_step_in_which_every_task_raises_leaves_the_weights_finite(outer_step):
    config = settings(**LONG | {"outer_steps": 8}, keep_going=True)
    result = meta_train(config, tasks=[Bad(outer_step, [5])], show_progress=False)
    assert result.history[-1]["failures"] == {"bad": 2}
    assert result.history[5]["families"] == {}
    assert all(bool(w.isfinite().all()) for w in result.last.weights().values())


# --- gradients that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "steps"), [(float("nan"), 1000), (float("inf"), 100)])
def test_a_nan_in_one_step_of_a_thousand_reaches_no_other_tensor(bad, steps):
    ours = leaves((5,), (3, 4), ())
    theirs = copies(ours)
    optimizer, undisturbed = make(ours), make(theirs)
    for step in range(steps):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        if step == steps // 2:
            assert ours[1].grad is not None
            ours[1].grad[1, 2] = bad
        optimizer.step()
        undisturbed.step()
    assert_same_bits([ours[0], ours[2]], [theirs[0], theirs[2]])
    for i in (0, 2):
        values, others = optimizer.state[ours[i]], undisturbed.state[theirs[i]]
        assert_same_bits(list(values.values()), list(others.values()))
    assert not bool(ours[1].isfinite().all()), "nothing is hidden: the tensor shows what happened to it"


@pytest.mark.parametrize("skip", ["no gradient", "no step"])
def test_a_loop_that_leaves_out_gradients_that_are_not_finite_trains_on(skip):
    params = leaves((6,), seed=3)
    optimizer = make(params, lr=1e-2)
    for step in range(400):
        optimizer.zero_grad()
        loss = params[0].square().sum() * (float("nan") if step % 100 == 7 else 1.0)
        loss.backward()
        if not bool(params[0].grad.isfinite().all()):
            if skip == "no step":  # as torch.amp.GradScaler does
                continue
            params[0].grad = None
        optimizer.step()
    assert float(params[0].detach().abs().max()) < 0.1
    assert float(optimizer.state[params[0]]["step"]) == 396


@pytest.mark.parametrize("estimator", ["es", "backprop", "pes"])
def test_a_nan_in_an_inner_step_is_dropped_from_the_meta_gradient_and_counted(estimator, tmp_path):
    class Spoiled(Quadratic):
        name, calls = "spoiled", 0

        def loss(self, params, buffers, batch):
            self.calls += 1
            return super().loss(params, buffers, batch) * (float("nan") if self.calls == 40 else 1.0)

    config = settings(estimator=estimator, outer_steps=12, validate_every=0, unroll_length=3)
    result = meta_train(config, tasks=[Spoiled(), Quadratic()], out=tmp_path, show_progress=False)
    assert len(result.history) == 12
    assert all(bool(w.isfinite().all()) for w in result.last.weights().values())
    assert any(float(w.detach().abs().max()) > 0 for w in result.last.weights().values())


# --- kills ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_fork
@forks
def test_a_hundred_sigkills_or_more_at_random_moments_change_nothing_and_leave_whole_files(tmp_path):
    config = settings(outer_steps=12, save_every=1, validate_every=4, max_length=12)
    train(config, tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    rng = random.Random(1)
    kills = 0
    wanted = max(100, int(10 * float(os.environ.get("SOAK_MINUTES", "10"))))
    while kills < wanted:
        child = in_child(lambda: train(config, folder, resume=True))
        time.sleep(rng.uniform(0.0, 0.5))
        os.kill(child, signal.SIGKILL)
        status = status_of(child)
        kills += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
        if folder.exists():
            assert_whole(folder)
        if status == 0:
            assert final_bytes(tmp_path / "undisturbed") == final_bytes(folder)
            shutil.rmtree(folder)
    assert status_of(in_child(lambda: train(config, folder, resume=True))) == 0
    assert final_bytes(tmp_path / "undisturbed") == final_bytes(folder)
    assert [m["outer_step"] for m in read_metrics(folder)] == list(range(12))
    assert not [path for path in folder.rglob("*") if path.name.endswith((".writing", ".tmp"))]
