"""What a user sees of a run: lines where there is no terminal, notices, and what came of it."""

from __future__ import annotations

import io
import logging
import re
import sys
import time

import pytest

from helpers.small_runs import settings
from helpers.small_tasks import Quadratic
from learned_optim.meta_train import meta_train, progress
from learned_optim.meta_train.progress import Progress, TimedLines, how_far
from learned_optim.meta_train.result import verdict


class Slow(Quadratic):
    def loss(self, params, buffers, batch):
        time.sleep(0.002)
        return super().loss(params, buffers, batch)


def test_where_there_is_no_terminal_a_line_now_and_then_says_how_far_the_run_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.02)
    meta_train(settings(), tasks=[Slow()])
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"0 of 6 outer steps in 00:00; validating the start", lines[0])
    pattern = r"[1-6] of 6 outer steps in 00:\d\d, about 00:\d\d left; meta_loss \d\.\d{3}(; validation .*; best .*)?"
    later = [line for line in lines if not line.startswith("0 of 6")]
    assert later
    assert all(re.fullmatch(pattern, line.removesuffix("; this one validates")) for line in later), later


@pytest.mark.parametrize("show", [None, False])
def test_nothing_is_said_of_a_run_that_is_done_before_that_or_is_not_to_be_shown(show, monkeypatch, capsys):
    if show is False:
        monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    meta_train(settings(), tasks=[Slow()], show_progress=show)
    assert capsys.readouterr() == ("", "")


def test_a_thread_writes_even_if_nothing_ends_in_the_meantime(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    lines = TimedLines(lambda: "still here")
    time.sleep(0.1)
    lines.close()
    said = capsys.readouterr().err
    assert set(said.splitlines()) == {"still here"}
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_how_far():
    assert how_far(0, 10, 80) == "in 01:20"
    assert how_far(2, 6, 80) == "in 01:20, about 02:40 left"


def test_a_bar_says_that_the_start_is_the_best_so_far(capsys):
    for value, best, shown in ((0.25, 0.0, "0.250, best=the start"), (-0.25, -0.25, "-0.250, best=-0.250")):
        bar = Progress(settings(), 0, None, True, "")
        bar.update({"outer_step": 0, "meta_loss": 1.0, "validation": value}, best)
        bar.close()
        assert f"validation={shown}" in capsys.readouterr().err


def test_the_time_that_is_left_of_an_outer_step_is_that_of_the_last_one_of_its_kind(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = Progress(settings(validate_every=2), 0, None, True, "")
    capsys.readouterr()
    for outer_step, seconds in enumerate((5.0, 60.0, 7.0)):
        now[0] += seconds
        bar.update({"outer_step": outer_step, "meta_loss": 1.0, **({"validation": 0.0} if outer_step % 2 else {})}, 0.0)
    now[0] += 10.0
    bar.stopping()
    assert "finishing this outer step and its validation (about 50 s); again to stop now\n" in capsys.readouterr().err
    bar.update({"outer_step": 3, "meta_loss": 1.0, "validation": 0.0}, 0.0)
    now[0] += 3.0
    bar.stopping()
    assert "finishing this outer step (about 4 s); again to stop now\n" in capsys.readouterr().err
    bar.close()


def test_the_time_that_is_left_knows_that_validations_take_longer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = Progress(settings(outer_steps=6, validate_every=3), 0, None, False, "")
    bar.doing("validating the start")
    now[0] += 100.0
    bar.doing("")

    def step(number, seconds, **validation):
        now[0] += seconds
        bar.update({"outer_step": number, "meta_loss": 1.0, **validation}, 0.0)
        return bar._line()

    assert bar._line() == "0 of 6 outer steps in 01:40"
    assert step(0, 10.0).startswith("1 of 6 outer steps in 01:50, about 04:10 left;")  # five of 10 s, two of 100 s more
    now[0] += 4.0
    assert bar._line().startswith("1 of 6 outer steps in 01:54, about 04:06 left;")
    assert step(1, 6.0).endswith("; this one validates")
    assert step(2, 60.0, validation=0.0).startswith("3 of 6 outer steps in 03:00, about 01:20 left;")
    now[0] += 500.0
    assert "about 01:10 left" in bar._line()
    bar.close()


def test_what_is_not_to_be_shown_goes_to_the_log(caplog, capsys):
    caplog.set_level(logging.INFO)
    bar = Progress(settings(), 0, None, False, "")
    bar.stopping()
    bar.close()
    assert caplog.messages == ["finishing this outer step; again to stop now"]
    assert capsys.readouterr() == ("", "")


def test_a_notice_in_the_middle_of_another_write_comes_a_little_later(monkeypatch):
    class Busy(io.StringIO):
        busy = True

        def write(self, text):
            if self.busy:
                raise RuntimeError("reentrant call inside <_io.BufferedWriter>")
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Busy())
    bar = Progress(settings(), 0, None, None, "")
    bar.stopping()
    sys.stderr.busy = False
    bar.update({"outer_step": 0, "meta_loss": 1.0}, 0.0)
    bar.close()
    assert sys.stderr.getvalue() == "finishing this outer step; again to stop now\n"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "no validation; best is the last"),
        ([0.1, float("nan"), 0.0], "no improvement on validation; best is the start"),
        ([0.1, -0.25, -0.1], "best validation -0.250: 0.78 of the time that the start takes"),
    ],
)
def test_the_verdict_says_what_best_is(values, text):
    assert verdict([{"outer_step": 0}, *({"validation": value} for value in values)]) == text


def test_a_result_is_printed_in_one_line():
    result = meta_train(settings(meta_lr=0.0), tasks=[Quadratic()], show_progress=False)
    text = repr(result)
    assert len(text) < 300
    assert text.startswith(
        "MetaTrainResult(6 outer steps, no improvement on validation; best is the start; policy=sha256:"
    )
    policy, last, history, init, stopped_by = result
    assert (policy, last, len(history), init, stopped_by) == (result.policy, result.last, 6, None, None)
