"""SIGINT and SIGTERM: said at once, the outer step finished and saved, delivered again; a second one does not wait."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from helpers.small_runs import assert_whole, final_bytes, settings
from helpers.small_tasks import Quadratic
from learned_optim.meta_train import meta_train
from learned_optim.meta_train.checkpoint import CURRENT, read_metrics
from learned_optim.meta_train.signals import collected_signals

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


class Terminated(BaseException):
    """What this program's handler of SIGTERM raises."""


@pytest.fixture
def handler(number):
    """Of SIGTERM, in place of the one that ends the process; SIGINT keeps Python's."""

    def terminate(*_):
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    yield signal.getsignal(number)
    signal.signal(signal.SIGTERM, previous)


class Signalling(Quadratic):
    """Sends signals to its own process in the first loss after there is a checkpoint."""

    def __init__(self, folder: Path, *numbers: int) -> None:
        super().__init__()
        self.folder, self.numbers = folder, list(numbers)

    def loss(self, params, buffers, batch):
        if self.numbers and (self.folder / CURRENT).exists():
            signal.raise_signal(self.numbers.pop(0))
        return super().loss(params, buffers, batch)


@BOTH
def test_the_outer_step_is_finished_and_saved_and_the_signal_delivered(number, handler, tmp_path, capsys):
    config = settings(outer_steps=4)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
        meta_train(config, tasks=[Signalling(tmp_path, number)], out=tmp_path)
    said = capsys.readouterr().err
    assert re.search(r"finishing this outer step( and its validation)?.*; again to stop now\n", said)
    assert signal.getsignal(number) is handler
    assert len(read_metrics(tmp_path)) == torch.load(tmp_path / CURRENT, weights_only=True)["outer_step"] < 4
    meta_train(config, tasks=[Quadratic()], out=tmp_path, resume=True, show_progress=False)
    meta_train(config, tasks=[Quadratic()], out=tmp_path / "undisturbed", show_progress=False)
    assert final_bytes(tmp_path) == final_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_where_the_programs_handler_returns_the_result_says_which_signal_it_was(number, handler, tmp_path):
    noted = []
    signal.signal(number, lambda *_: noted.append(number))
    result = meta_train(settings(), tasks=[Signalling(tmp_path, number)], out=tmp_path, show_progress=False)
    assert noted == [number]
    assert result.stopped_by == number
    assert len(result.history) < 6


@BOTH
def test_a_second_signal_leaves_the_checkpoint_as_it_was(number, handler, tmp_path):
    config = settings(outer_steps=4)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
        meta_train(config, tasks=[Signalling(tmp_path, number, number)], out=tmp_path, show_progress=False)
    assert signal.getsignal(number) is handler
    assert_whole(tmp_path)
    assert len(read_metrics(tmp_path)) == torch.load(tmp_path / CURRENT, weights_only=True)["outer_step"]
    assert not (tmp_path / "final").exists()
    meta_train(config, tasks=[Quadratic()], out=tmp_path, resume=True, show_progress=False)
    meta_train(config, tasks=[Quadratic()], out=tmp_path / "undisturbed", show_progress=False)
    assert final_bytes(tmp_path) == final_bytes(tmp_path / "undisturbed")


@BOTH
def test_before_the_first_outer_step_there_is_nothing_to_finish(number, handler, tmp_path):
    class InValidation(Quadratic):
        def loss(self, params, buffers, batch):
            if (tmp_path / "run" / "config.toml").exists():
                signal.raise_signal(number)
            return super().loss(params, buffers, batch)

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
        meta_train(settings(), tasks=[InValidation()], out=tmp_path / "run", show_progress=False)
    meta_train(settings(), tasks=[Quadratic()], out=tmp_path / "run", show_progress=False)  # not "already holds a run"


def test_signals_that_come_together_count_as_one():
    said = []
    with collected_signals(lambda: said.append(1), together=60.0) as received:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert (received, said) == ([signal.SIGINT], [1])


SLOW = """
import sys, time, torch
from helpers.small_runs import settings
from helpers.small_tasks import Quadratic
from learned_optim.meta_train import meta_train

class Slow(Quadratic):
    calls = 0
    def loss(self, params, buffers, batch):
        self.calls += 1
        if self.calls > 30:
            print("slow", flush=True)
            time.sleep(60)
        return super().loss(params, buffers, batch)

try:
    meta_train(settings(validate_every=0, save_every=1, meta_batch=1), tasks=[Slow()], out=sys.argv[1])
    print("went on")
except KeyboardInterrupt:
    print("stopped", flush=True)
    raise
"""


@BOTH
def test_a_slow_outer_step_is_announced_at_once_and_left_within_a_second(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "slow\n"
    process.send_signal(number)
    start = time.monotonic()
    assert re.fullmatch(r"finishing this outer step \(about \d+ s\); again to stop now\n", process.stderr.readline())
    assert time.monotonic() - start < 1.0
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(number)
    assert process.stdout.readline() == ("stopped\n" if number == signal.SIGINT else "")
    assert time.monotonic() - start < 1.0
    process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGTERM if number == signal.SIGTERM else -signal.SIGINT)
    assert_whole(tmp_path / "run")
