"""Disks that fill up, refuse or lie: a run says so, leaves whole files behind, and continues when it can."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from helpers.disks import fill, mounted, remount_read_only
from helpers.small_runs import assert_whole, final_bytes, settings, train
from helpers.small_tasks import Quadratic
from learned_optim import Policy
from learned_optim.meta_train import meta_train
from learned_optim.meta_train.checkpoint import CURRENT, DAMAGED, PREVIOUS, RunFolder
from learned_optim.policy.files import TEMPORARY


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", 4) as disk:
        yield disk


class Then(Quadratic):
    """Does something once, when the run has saved its first checkpoint."""

    def __init__(self, folder: Path, what: Callable[[], object]) -> None:
        super().__init__()
        self.folder, self.what, self.done = folder, what, False

    def loss(self, params, buffers, batch):
        if not self.done and (self.folder / CURRENT).exists():
            self.done = True
            self.what()
        return super().loss(params, buffers, batch)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    meta_train(settings(), tasks=[Quadratic()], out=folder, show_progress=False)
    return final_bytes(folder)


def test_a_disk_that_fills_up_ends_the_run_and_with_room_again_it_ends_with_the_same_bytes(small_disk, undisturbed):
    run = small_disk / "run"
    with pytest.raises(OSError, match=r"No space left on device.*run/") as caught:
        meta_train(settings(), tasks=[Then(run, lambda: fill(small_disk))], out=run, show_progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert_whole(run)
    (small_disk / "filler").unlink()
    meta_train(settings(), tasks=[Quadratic()], out=run, resume=True, show_progress=False)
    assert final_bytes(run) == undisturbed


def test_a_disk_that_is_full_from_the_start_is_said_before_work_begins(small_disk):
    fill(small_disk)
    with pytest.raises(OSError, match="No space left on device"):
        train(settings(), small_disk / "run")
    assert not (small_disk / "run" / CURRENT).exists()


def test_a_run_leaves_what_it_is_said_to_leave_and_nothing_else(tmp_path):
    train(settings(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"tensorboard"} == {
        ".lock", "config.toml", CURRENT, PREVIOUS, "metrics.jsonl", "best", "final",
    }  # fmt: skip


@pytest.mark.parametrize(("call", "after"), [("fsync", 5), ("fsync", 8), ("fsync", 17), ("replace", 4), ("replace", 9)])
def test_whichever_call_finds_the_disk_full_nothing_is_lost(call, after, tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(os, call, fails_after(getattr(os, call), after))
    run = tmp_path / "run"
    config = settings(save_every=1)
    with pytest.raises(OSError, match=rf"No space left on device: '{run}") as caught:
        meta_train(config, tasks=[Quadratic()], out=run, show_progress=False)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert_whole(run)
    assert not list(run.rglob(TEMPORARY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meta_train(config, tasks=[Quadratic()], out=run, resume=True, show_progress=False)
    assert final_bytes(run) == undisturbed


def fails_after(call: Callable, count: int, reason: int = errno.ENOSPC) -> Callable:
    """``call``, which fails from then on; with the path it was given, if any, in the error."""
    left = [count]

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            path = arguments[0] if isinstance(arguments[0], str | os.PathLike) else None
            raise OSError(reason, os.strerror(reason), *([] if path is None else [str(path)]))
        return call(*arguments, **options)

    return failing


def test_a_policy_saved_on_a_full_disk_leaves_the_old_one_or_none_that_loads(small_disk):
    folder = small_disk / "policy"
    Policy().save_pretrained(folder)
    old = Policy.from_pretrained(folder).fingerprint()
    fill(small_disk)
    changed = Policy()
    with torch.no_grad():
        changed.weights()["head"].fill_(0.5)
    with pytest.raises(OSError, match="No space left"):
        changed.save_pretrained(folder)
    assert Policy.from_pretrained(folder).fingerprint() == old
    assert not list(folder.glob(TEMPORARY))


def test_a_read_only_folder_is_said_before_work_begins(small_disk):
    (small_disk / "run").mkdir()
    remount_read_only(small_disk)
    for resume in (False, True):
        with pytest.raises(OSError, match=r"Read-only file system: '.*run"):
            train(settings(), small_disk / "run", resume=resume)
    with pytest.raises(OSError, match="Read-only file system"):
        Policy().save_pretrained(small_disk / "run" / "policy")


def test_a_file_system_without_links_keeps_the_checkpoint_before_all_the_same(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(os, "link", fails_after(os.link, 0, errno.EPERM))
    meta_train(settings(save_every=1), tasks=[Quadratic()], out=tmp_path, show_progress=False)
    assert final_bytes(tmp_path) == undisturbed
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["outer_step"] == settings().outer_steps - 1


# --- damaged checkpoints -------------------------------------------------------------------------------------------


def test_cut_anywhere_the_checkpoint_before_is_taken_and_the_damaged_one_is_named(tmp_path):
    config = settings(save_every=1)
    train(config, tmp_path)
    whole = (tmp_path / CURRENT).read_bytes()
    before = torch.load(tmp_path / PREVIOUS, weights_only=True)["outer_step"]
    folder = RunFolder(tmp_path, resume=True)
    for percent in range(100):
        (tmp_path / CURRENT).write_bytes(whole[: len(whole) * percent // 100])
        with pytest.warns(RuntimeWarning, match=r"checkpoint\.pt \(\w+\) is damaged; continuing from .*previous"):
            state = folder.load(config)
        assert state is not None
        assert state["outer_step"] == before == config.outer_steps - 1
        assert (tmp_path / DAMAGED).stat().st_size == len(whole) * percent // 100
    folder.close()


def test_a_run_with_a_cut_checkpoint_still_ends_with_the_same_bytes(tmp_path, undisturbed):
    meta_train(settings(outer_steps=4), tasks=[Quadratic()], out=tmp_path, show_progress=False)
    path = tmp_path / CURRENT
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 99 // 100])
    with pytest.warns(RuntimeWarning, match="damaged; continuing from"):
        meta_train(settings(), tasks=[Quadratic()], out=tmp_path, resume=True, show_progress=False)
    assert final_bytes(tmp_path) == undisturbed


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    config = settings(outer_steps=2)
    train(config, tmp_path)
    whole = (tmp_path / CURRENT).read_bytes()
    (tmp_path / PREVIOUS).unlink(missing_ok=True)
    folder = RunFolder(tmp_path, resume=True)
    expected = str(folder.load(config))
    refused = 0
    for i in range(0, len(whole), max(1, len(whole) // 60)):
        spoiled = bytearray(whole)
        spoiled[i] ^= 1 << i % 8
        (tmp_path / CURRENT).write_bytes(bytes(spoiled))
        try:
            state = folder.load(config)
        except ValueError:
            refused += 1
        else:  # padding and dates between the records mean nothing: where nothing is refused, nothing has changed
            assert str(state) == expected
    folder.close()
    assert refused > 30


def test_a_save_after_a_fallback_does_not_put_the_damaged_checkpoint_in_place_of_the_good_one(tmp_path, monkeypatch):
    config = settings(save_every=1)
    train(config, tmp_path)
    (tmp_path / CURRENT).write_bytes(b"damaged")
    folder = RunFolder(tmp_path, resume=True)
    with pytest.warns(RuntimeWarning, match="damaged"):
        state = folder.load(config)
    assert state is not None
    monkeypatch.setattr(os, "fsync", fails_after(os.fsync, 0))
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoint\.pt'"):
        folder.save(state)  # whatever ends it here
    monkeypatch.undo()
    again = folder.load(config)
    folder.close()
    assert again is not None
    assert again["outer_step"] == state["outer_step"]


def test_a_full_or_refused_folder_is_not_left_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fails_after(os.fsync, 0))
    with pytest.raises(OSError, match="No space left") as caught:
        RunFolder(tmp_path, resume=False)
    monkeypatch.undo()
    RunFolder(tmp_path, resume=False).close()  # while the error, and all that it refers to, is still there
    assert caught.value.filename
