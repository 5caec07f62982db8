"""Plain, aligned lines where nobody reads; tables drawn by rich where somebody does."""

from __future__ import annotations

import builtins
import re
import sys
import time
from typing import Any

import pytest

from learned_optim.bench.pool import Progress
from learned_optim.cli import display, main
from learned_optim.cli.bench import _Bar
from learned_optim.cli.display import print_card, print_items, print_markdown, print_table, unescaped
from learned_optim.cli.errors import with_flags
from learned_optim.meta_train import progress
from learned_optim.policy import markdown

CARD = [
    "- name: a\\_b", "- a sentence", "", "| task | what | loss |", "| --- | ---: | ---: |",
    "| a\\|b | **0.5** (loses) | 1 |", "| c | 22 | 0.125 |", "", "```text", "a |██", "```",
]  # fmt: skip


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(display, "_somebody_reads", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")


def test_plain_lines_are_aligned_and_never_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("a", "1", "x" * 300), ("long", "22", "y")])
    assert capsys.readouterr().out == f"a     1   {'x' * 300}\nlong  22  y\n"
    print_card(CARD)
    assert capsys.readouterr().out == (
        "name  a_b\n      a sentence\n\n"
        "task         what   loss\na|b   0.5 (loses)      1\nc              22  0.125\n\na |██\n"
    )


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_words_are_wrapped_and_figures_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("name", "word " * 20)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 40
    print_table([["t" * 30, "0.123456", "1234567.5"]], ["task", "held-out loss", "loss"], numbers=True)
    printed = capsys.readouterr().out
    assert re.search(r"t{30} +0\.123456 +1234567\.5", printed)


@pytest.mark.usefixtures("terminal")
def test_what_others_wrote_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_items(["[bold]x[/bold] [link=https://example.org]y[/link]"])
    assert "[bold]x[/bold]" in capsys.readouterr().out


@pytest.mark.usefixtures("terminal")
def test_a_page_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    print_markdown("| a | b |\n|---|---|\n| x\\_y | 2 |\n")
    printed = capsys.readouterr().out
    assert "|---|" not in printed
    assert "x_y" in printed


@pytest.mark.usefixtures("terminal")
def test_without_rich_the_lines_are_plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    print_markdown("| a |")
    print_table([("a", "b")])
    assert capsys.readouterr().out == "| a |\na  b\n"


def test_help_and_plain_lines_load_no_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def checked(name: str, *arguments: Any) -> Any:
        assert not name.startswith("rich")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", checked)
    assert main(["--help"]) == 0
    assert main(["info", "--tasks"]) == 0


@pytest.mark.parametrize("text", ["a_b [c](d) | `e` <f> & *g* \\ h", "plain", "&amp;"])
def test_what_is_escaped_for_a_card_is_shown_as_it_was(text: str) -> None:
    assert unescaped(markdown.text(text)) == text


def test_settings_have_the_names_of_options() -> None:
    text = "QualityConfig.max_length must be 0 or more, found -1"
    assert with_flags(text) == "--max-length must be 0 or more, found -1"
    assert with_flags("see AdamW.step") == "see AdamW.step"


def test_a_suite_says_now_and_then_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    bar = _Bar()
    time.sleep(0.05)
    bar(Progress(1, 4, 2.0, 8.0, "a task", True))
    bar(Progress(2, 4, 4.0, 8.0, "another", False))
    time.sleep(0.05)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "no runs in 00:00"
    assert re.fullmatch(r"2 of 4 runs in 00:00, about 00:00 left; last: another", lines[-1])
    monkeypatch.setattr(progress, "LINE_EVERY", 30.0)
    _Bar().close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", ["tune-lr", "bundled", "model"])
def test_a_flag_that_leaves_something_out_does_not_call_itself_the_default(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--help"]) == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    _, _, rest = text.partition(f"--no-{flag} ")
    assert rest.partition(" --")[0].endswith("(done unless this is given)")
