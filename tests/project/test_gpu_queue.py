"""The queue for minutes with a GPU: what is run, stopped, kept and gone on with."""

from __future__ import annotations

import json
import sys
import tarfile

import pytest

from helpers.scripts import load_script, run_script

#: Counts its runs in its folder; ``forever`` then waits to be stopped, saves, and ends.
COUNTS = """
import pathlib, signal, sys, time
work = pathlib.Path({work!r})
file = work / "count"
file.write_text(str(int(file.read_text()) + 1 if file.exists() else 1))
"""
FOREVER = """
def stop(*_):
    (work / "saved").write_text("yes")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(work / "ready").touch()
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def queue_of(tmp_path, monkeypatch):
    """A queue whose jobs are ``(name, code, again)``."""
    module = load_script("tools/gpu_queue.py")
    monkeypatch.setattr(module, "GRACE", 5.0)
    monkeypatch.setattr(module, "PACKING", 0.0)

    def make(*jobs, limit=30.0):
        out = tmp_path / "out"
        made = []
        for name, code, again in jobs:
            code = code.replace("{work!r}", repr(str(tmp_path / "out-work" / name)))
            made.append(module.Job(name, "counts", 1, limit, 0, (f"{name}.tar.gz",), ("-c", code), again))
        return module.Queue(out, made)

    make.module, make.out = module, tmp_path / "out"
    return make


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Dataclasses of a script that is loaded by path look their module up."""
    monkeypatch.setitem(sys.modules, "gpu_queue", sys.modules[__name__])


def packed(out, job, name):
    with tarfile.open(out / f"{job}.tar.gz") as tar:
        return tar.extractfile(name).read().decode()


def test_jobs_are_run_in_order_and_what_is_done_is_not_done_again(queue_of, capfd):
    jobs = ("first", COUNTS, False), ("second", COUNTS, True)
    queue_of(*jobs).run(1.0)
    assert [line.partition(":")[0] for line in capfd.readouterr().out.splitlines()] == ["first"] * 2 + ["second"] * 2
    queue_of(*jobs).run(1.0)
    assert (packed(queue_of.out, "first", "count"), packed(queue_of.out, "second", "count")) == ("1", "2")
    state = json.loads((queue_of.out / "queue.json").read_text())
    assert {name: (row["ended"], row["runs"]) for name, row in state.items()} == {
        "first": ("done", 1),
        "second": ("done", 2),
    }


def test_a_job_that_fails_says_why_and_the_next_one_is_run(queue_of, capfd):
    queue_of(("broken", "raise OSError('no card')", False), ("next", COUNTS, False)).run(1.0)
    assert "no card" in capfd.readouterr().out
    state = json.loads((queue_of.out / "queue.json").read_text())
    assert (state["broken"]["ended"], state["next"]["ended"]) == ("failed", "done")


def test_a_job_out_of_time_is_stopped_after_it_has_saved(queue_of):
    queue_of(("endless", COUNTS + FOREVER, True), limit=2.0).run(1.0)
    state = json.loads((queue_of.out / "queue.json").read_text())["endless"]
    assert (state["ended"], state["status"]) == ("stopped", 143)
    assert packed(queue_of.out, "endless", "saved") == "yes"


def test_another_machine_goes_on_from_the_archives(queue_of, tmp_path):
    queue_of(("leg", COUNTS, True)).run(1.0)
    (tmp_path / "out-work").rename(tmp_path / "gone")
    queue_of(("leg", COUNTS, True)).run(1.0)
    assert packed(queue_of.out, "leg", "count") == "2"


def test_without_time_nothing_is_begun(queue_of, capfd):
    queue_of(("first", COUNTS, False)).run(0.01)
    assert "not begun" in capfd.readouterr().out
    assert not (queue_of.out / "queue.json").exists()


def test_a_dry_run_lists_time_and_files_of_every_job(tmp_path):
    printed = run_script("tools/gpu_queue.py", "--dry-run", "--out", "gpu-out", cwd=tmp_path)
    for what in ("measure", "meta_train", "scale", "90 s expected", "gpu.json", "meta_train.tar.gz", "scale.tar.gz"):
        assert what in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_queue_in_small_on_a_cpu(tmp_path):
    run_script("tools/gpu_queue.py", "--device", "cpu", "--tiny", "--minutes", "10", "--out", "gpu-out", cwd=tmp_path)
    out = tmp_path / "gpu-out"
    state = json.loads((out / "queue.json").read_text())
    assert {name: row["ended"] for name, row in state.items()} == dict.fromkeys(
        ["measure", "meta_train", "scale"], "done"
    )
    assert not [title for title, section in json.loads((out / "gpu.json").read_text()).items() if "error" in section]
    with tarfile.open(out / "meta_train.tar.gz") as tar:
        assert "run/checkpoint.pt" in tar.getnames()
    with tarfile.open(out / "scale.tar.gz") as tar:
        assert [name for name in tar.getnames() if name.startswith("cells/")]
