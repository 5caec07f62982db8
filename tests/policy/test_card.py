"""The card says what the files hold, losses included, and nothing they do not hold."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from learned_optim import Policy, PolicyConfig
from learned_optim.policy.card import model_card, validate_results

RESULTS: dict[str, Any] = {
    "license": "mit",
    "datasets": ["owner/data"],
    "training": {
        "method": "ES, then unrolled back-propagation", "tasks": ["mlp", "conv"], "outer_steps": 300,
        "core_hours": 1.75, "seeds": [0, 1], "command": "learned-optim meta-train --config x",
    },
    "evaluation": {
        "suite": "unlike tasks", "command": "learned-optim bench", "seeds": 3, "reference": "AdamW, best of 14",
        "tasks": [
            {"task": "lost", "speedup": 0.8, "spread": 0.05, "loss": 0.4, "reference_loss": 0.31},
            {"task": "won", "speedup": 1.6, "spread": 0.1, "loss": 0.2, "reference_loss": 0.3},
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


def test_everything_that_was_recorded_is_shown() -> None:
    card = card_of(Policy(), RESULTS, repo_id="me/rule")
    for text in (
        "# rule", 'policy="me/rule"', "- method: ES, then unrolled back-propagation", "- tasks: mlp, conv",
        "- outer steps: 300", "- compute: 1.75 core hours", "- seeds: 0, 1", "`learned-optim meta-train --config x`",
        "- suite: unlike tasks", "- reference: AdamW, best of 14", "`learned-optim bench`",
        "- mean log-speedup: 0.123", "- remark: three seeds", "- not tried on GANs", Policy().fingerprint(),
    ):  # fmt: skip
        assert text in card, text
    assert metadata(card) == {
        "library_name": "learned-optim", "license": "mit", "datasets": ["owner/data"], "metrics": ["speedup", "loss"],
        "tags": ["learned-optim", "learned-optimizer", "meta-learning", "optimizer", "pytorch"],
    }  # fmt: skip


def test_losses_are_counted_named_and_marked() -> None:
    card = card_of(Policy(), RESULTS)
    assert "- it loses against the reference on 3 of 4 tasks: lost, lost badly, blown" in card
    assert "geometric mean over the 3 tasks that have one: 0.862, worst: 0.5" in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| task", "| ---", "| won", "| lost", "| lost badly", "| blown"]
    assert "| lost | **0.8** (loses) | 0.05 | 0.4 | 0.31 | no |" in rows
    assert "| blown | – | – | – | – | **yes** |" in rows


def test_the_plot_starts_at_one_and_goes_both_ways() -> None:
    lines = card_of(Policy(), RESULTS).splitlines()
    top = next(line for line in lines if line.startswith("speedup "))
    bars = {line.split("  ")[0].strip(): line for line in lines if "█" in line}
    middle = bars["won"].index("|")
    assert top[middle] == "1"
    assert bars["lost badly"] == "lost badly  " + 20 * "█" + "|"
    assert bars["won"].count("█") == bars["won"][middle:].count("█") == 14  # 20 log 1.6 / log 2, rounded


@pytest.mark.parametrize("results", [None, {}, {"training": {}}, {"evaluation": {}}, {"evaluation": {"tasks": []}}])
def test_a_policy_without_results_is_not_evaluated(results: dict[str, Any] | None) -> None:
    card = card_of(Policy(), results)
    assert "## Results\n\nNot evaluated." in card
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
        validate_results(results)


def test_unknown_keys_are_kept_and_not_shown() -> None:
    validate_results({"more": {"deep": [1, None]}, "training": {"lr": 3}})
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
    assert sum(line.startswith("| ") for line in card.splitlines()) == (len(tasks) + 2 if tasks else 0)
