"""The card says what the files hold, losses included, and nothing they do not hold."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from helpers.scripts import load_script
from learned_optim import Policy, PolicyConfig
from learned_optim.policy import markdown
from learned_optim.policy.card import model_card
from learned_optim.policy.filenames import CARD, WEIGHTS
from learned_optim.policy.resolve import bundled
from learned_optim.policy.results import validate

BUNDLED = bundled()
RESULTS: dict[str, Any] = {
    "license": "mit",
    "purpose": "For transformers.",
    "datasets": ["owner/data"],
    "training": {
        "method": "ES, then unrolled back-propagation", "tasks": ["mlp", "conv"], "outer_steps": 300,
        "core_hours": 1.75, "seeds": [0, 1], "command": "learned-optim meta-train --config x",
    },
    "evaluation": {
        "suite": "unlike tasks", "command": "learned-optim bench", "seeds": 3, "reference": "AdamW, best of 14",
        "tasks": [
            {"task": "lost", "speedup": 0.8, "loss": 0.4, "held_out_loss": 0.6, "reference_held_out_loss": 0.4},
            {"task": "won_1", "title": "won", "speedup": 1.6, "time_ratio": 2.0, "loss": 0.2, "held_out_loss": 0.2,
             "reference_held_out_loss": 0.4},
            {"task": "blown", "speedup": None, "diverged": True},
            {"task": "lost badly", "speedup": 0.5},
        ],
        "summary": {"mean log-speedup": 0.123, "remark": "three seeds"},
    },
    "notes": ["not tried on GANs"],
}  # fmt: skip


def card_of(policy: Policy, results: dict[str, Any] | None = None, **options: str) -> str:
    return model_card(policy.config, policy.weights(), results, **options)


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("\n---\n")[0])


def rows_of(card: str) -> dict[str, list[str]]:
    """The rows of the card's tables by their first cells."""
    lines = [line[2:-2].split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def test_what_was_recorded_is_shown() -> None:
    card = card_of(Policy(), RESULTS, repo_id="me/rule")
    for text in (
        "# rule", 'policy="me/rule"', "For transformers.", "- method: ES, then unrolled back-propagation",
        "- tasks: mlp, conv", "- effort: 300 outer steps, 1.75 core hours, seeds 0, 1",
        "`learned-optim meta-train --config x`", "- suite: unlike tasks", "- reference: AdamW, best of 14",
        "Over AdamW, best of 14. Speedup in steps: ", "`learned-optim bench`", "- not tried on GANs",
        Policy().fingerprint(), "[results.json](results.json)",
    ):  # fmt: skip
        assert text in card, text
    assert metadata(card) == {
        "library_name": "learned-optim", "license": "mit", "datasets": ["owner/data"],
        "metrics": ["speedup", "loss", "held_out_loss"],
        "tags": ["learned-optim", "learned-optimizer", "meta-learning", "optimizer", "pytorch"],
    }  # fmt: skip


def test_losses_are_counted_named_and_marked() -> None:
    card = card_of(Policy(), RESULTS)
    assert "- in steps it loses against the reference on 3 of 4 tasks: lost; lost badly; blown" in card
    assert list(rows_of(card).items()) == [
        ("task", ["speedup in steps", "speedup in time", "held-out loss"]),
        ("---", ["---:", "---:", "---:"]),
        ("won", ["1.60", "**0.80** (loses)", "0.50"]),
        ("lost", ["**0.80** (loses)", "–", "**1.50** (loses)"]),
        ("lost badly", ["**0.50** (loses)", "–", "–"]),
        ("blown: **diverged**", ["–", "–", "–"]),
        ("geometric mean", ["**0.86** (loses) of 3", "**0.80** (loses) of 1", "0.87 of 2"]),
    ]


def test_figures_over_all_tasks_are_shown_only_where_there_is_no_table_of_tasks() -> None:
    evaluation = RESULTS["evaluation"]
    assert "mean log-speedup" not in card_of(Policy(), RESULTS)
    rows = rows_of(card_of(Policy(), {"evaluation": {**evaluation, "tasks": []}}))
    assert rows["mean log-speedup"] == ["0.123"]
    assert rows["remark"] == ["three seeds"]


def test_habits_are_a_table() -> None:
    card = card_of(Policy(), {"habits": {"command": "bench", "figures": {"step on noise": "1.2 ± 0.1", "flips": 3}}})
    assert rows_of(card)["step on noise"] == ["1.2 ± 0.1"]
    assert rows_of(card)["flips"] == ["3"]
    assert "- command: `bench`" in card
    assert "## Habits" not in card_of(Policy(), RESULTS)


def test_of_many_families_their_number_is_said() -> None:
    training = {"tasks": [f"family_{i}" for i in range(7)]}
    assert "- tasks: 7 families" in card_of(Policy(), {"training": training})
    assert "- tasks: family_0, family_1" in card_of(Policy(), {"training": {"tasks": training["tasks"][:6]}})


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_a_bundled_card_is_one_to_read(name: str) -> None:
    card = (BUNDLED[name] / CARD).read_text(encoding="utf-8")
    assert "\\_" not in card
    assert max(map(len, re.findall(r"(?:^- .*\n)+", card, re.MULTILINE)), default=0) < 1200
    assert len(card) < 6000
    assert metadata(card)["license"] == "apache-2.0"


def test_the_bundled_cards_are_current_and_a_stale_one_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = load_script("tools/model_cards.py").main
    assert make(["--check"]) == 0, "run python tools/model_cards.py"
    folder = shutil.copytree(BUNDLED["default"], tmp_path / "default")
    policy = Policy.from_pretrained(folder)
    results = {k: v for k, v in (policy.results or {}).items() if k != "purpose"}
    policy.save_pretrained(folder, {**results, "notes": ["a note"]})
    weights = (folder / WEIGHTS).read_bytes()
    assert make(["--check", str(folder)]) == 1
    assert f"not current: {folder}" in capsys.readouterr().err
    assert make([str(folder)]) == 0
    assert make(["--check", str(folder)]) == 0
    card = (folder / CARD).read_text(encoding="utf-8")
    assert "For networks that are trained from scratch" in card
    assert "- a note" in card
    assert (folder / WEIGHTS).read_bytes() == weights


def test_the_plot_starts_at_one_and_goes_both_ways() -> None:
    lines = card_of(Policy(), RESULTS).splitlines()
    top = next(line for line in lines if line.startswith("speedup "))
    bars = {line.split("  ")[0].strip(): line for line in lines if "█" in line}
    middle = bars["won"].index("|")
    assert top[middle] == "1"
    assert bars["lost badly"] == "lost badly  " + 20 * "█" + "|"
    assert "won_1" not in bars
    assert bars["won"].count("█") == bars["won"][middle:].count("█") == 14  # 20 log 1.6 / log 2, rounded


@pytest.mark.parametrize("results", [None, {}, {"training": {}}, {"evaluation": {}}, {"evaluation": {"tasks": []}}])
def test_a_policy_without_results_is_not_evaluated(results: dict[str, Any] | None) -> None:
    card = card_of(Policy(), results)
    assert "## What it gains\n\nNot evaluated." in card
    assert "## How it was made\n\nNot recorded." in card
    assert "nothing was measured" in card
    assert set(metadata(card)) == {"library_name", "tags"}
    for word in ("speedup", "license", "loses", "| task"):
        assert word not in card


def test_a_summary_without_a_table_of_tasks_counts_as_measured() -> None:
    card = card_of(Policy(), {"evaluation": {"summary": {"perplexity": 2.0}}})
    assert "- measured as said above only" in card
    assert "nothing was measured" not in card


@pytest.mark.parametrize("key", ["license", "datasets", "training", "notes"])
def test_what_is_not_in_the_results_is_not_in_the_card(key: str) -> None:
    less = {k: v for k, v in RESULTS.items() if k != key}
    texts = {"license": "license: mit", "datasets": "owner/data", "training": "300", "notes": "GANs"}
    assert texts[key] in card_of(Policy(), RESULTS)
    assert texts[key] not in card_of(Policy(), less)


def test_the_card_says_whether_anything_was_learned() -> None:
    learned = Policy()
    with torch.no_grad():
        learned.head[0, 0] = 0.1
    assert "all of them zero: the rule is its base mixture" in card_of(Policy())
    assert "zero" not in card_of(learned)
    assert "cell: gru, 3 hidden units" in card_of(Policy(PolicyConfig.gru(hidden_size=3)))
    assert "cell: gru, 1 hidden unit per" in card_of(Policy(PolicyConfig.gru(hidden_size=1)))
    assert "in blocks of at most 64 rows" in card_of(Policy(PolicyConfig(orthogonal=1.0, orthogonal_block=64)))


def test_a_card_without_repository_names_the_bundled_policy_or_a_folder() -> None:
    assert 'policy="path/to/this/folder"' in card_of(Policy())
    assert 'policy="fast"' in card_of(Policy(), {"bundled_as": "fast"})
    assert 'policy="me/rule"' in card_of(Policy(), {"bundled_as": "fast"}, repo_id="me/rule")


@pytest.mark.parametrize(("where", "value", "message"), [
    ("notes", "text", "results.notes must be a list of texts, found 'text'"),
    ("training", [], r"results.training must be an object, found \[\]"),
    ("training.outer_steps", -1, "outer_steps must be a whole number"),
    ("training.outer_steps", True, "outer_steps must be a whole number"),
    ("training.seeds", ["a"], "seeds must be a whole number or a list"),
    ("training.core_hours", float("nan"), "core_hours must be a finite number"),
    ("evaluation.tasks", {}, "tasks must be a list of objects"),
    ("evaluation.tasks", [{"speedup": 1.0}], r"tasks\[0\].task is missing"),
    ("evaluation.tasks", [{"task": "a", "speedup": "1"}], r"tasks\[0\].speedup must be a finite number"),
    ("evaluation.tasks", [{"task": "a", "loss": 10**400}], r"tasks\[0\].loss must be a finite number"),
    ("evaluation.summary", {"a": []}, "summary must be an object of numbers and texts"),
    ("more", {1, 2}, "not plain JSON"),
    ("more", float("inf"), "not plain JSON"),
])  # fmt: skip
def test_results_that_cannot_be_shown_are_refused(where: str, value: Any, message: str) -> None:
    results = copy.deepcopy(RESULTS)
    *path, key = where.split(".")
    target = results
    for name in path:
        target = target[name]
    target[key] = value
    with pytest.raises(ValueError, match=message):
        validate(results)


def test_unknown_keys_are_kept_and_not_shown() -> None:
    validate({"more": {"deep": [1, None]}, "training": {"lr": 3}})
    assert "deep" not in card_of(Policy(), {"more": {"deep": [1]}})


def test_text_from_a_stranger_cannot_break_out_of_its_place() -> None:
    evil = "a|b\n---\n# big\x1b[2J <script>`x` [l](http://e) \u202e"
    card = card_of(Policy(), {
        "license": evil, "datasets": [evil], "bundled_as": evil, "notes": [evil],
        "training": {"method": evil, "command": evil},
        "evaluation": {"tasks": [{"task": evil, "speedup": 1.0}], "summary": {evil: evil}},
    })  # fmt: skip
    assert "\x1b" not in card
    text = re.sub(r"```.*?```|`[^`\n]*`", "", card.split("\n---\n")[1], flags=re.DOTALL)  # without its code
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert card.count("\n---\n") == 1
    assert card.count("\n# ") == 1
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert all(row.replace("\\|", "").count("|") == 3 for row in rows)
    assert metadata(card)["datasets"] == ["a|b --- # big [2J <script>`x` [l](http://e)"]


@given(st.one_of(st.text(), st.text("a_*`[]()<>&|\\\\ ")))
def test_markdown_shows_text_as_it_was(text: str) -> None:
    shown = MarkdownIt("commonmark").renderInline(markdown.text(text))
    assert html.unescape(shown) == markdown.plain(text)


def test_underscores_within_words_stay_readable() -> None:
    assert markdown.text("val_vit_letters/0, h_1") == "val_vit_letters/0, h_1"
    assert markdown.text("_a_ b__c") == r"\_a\_ b\_\_c"


figures = st.one_of(st.none(), st.floats(1e-3, 1e3), st.integers(1, 10**6))
tasks = st.lists(
    st.fixed_dictionaries(
        {"task": st.text(min_size=1)},
        optional={
            "speedup": figures,
            "spread": figures,
            "loss": figures,
            "diverged": st.booleans(),
            "split": st.text(),
        },
    ),
    max_size=5,
)


@given(tasks=tasks, notes=st.lists(st.text(), max_size=3), seeds=st.one_of(st.none(), st.lists(st.integers(0))))
def test_any_valid_results_give_a_card(tasks: list[dict[str, Any]], notes: list[str], seeds: list[int] | None) -> None:
    results = {"evaluation": {"tasks": tasks, "seeds": seeds}, "notes": notes}
    card = card_of(Policy(), results)
    assert card == card_of(Policy(), json.loads(json.dumps(results)))
    assert set(metadata(card)) >= {"library_name", "tags"}
    assert sum(line.startswith("| ") for line in card.splitlines()) in (
        (0,) if not tasks else range(len(tasks) + 2, len(tasks) + 4)
    )
