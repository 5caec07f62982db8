"""The habits suite: its measurements against what is known of Adam, and what becomes of them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from learned_optim import Policy, PolicyConfig
from learned_optim.bench import habits
from learned_optim.bench.habits import MEASUREMENTS, SAME, Contender, run_habits
from learned_optim.bench.habits_config import HabitsConfig, Lengths
from learned_optim.bench.habits_plots import draw_habits, together
from learned_optim.bench.habits_report import card_block, cell, markdown, sections
from learned_optim.bench.quality import REFERENCE
from learned_optim.cli import main
from learned_optim.policy.card import model_card
from learned_optim.policy.results import validate

SHORT = Lengths(noise=30, target=20, window=10, good_start=30, flips=30, training=30)
ADAMW = Contender(SAME)
DEFAULT = Contender("default", policy=Policy.from_pretrained("default"))


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    policies = {
        "mine": Policy(PolicyConfig.adamw()),
        "bold": Policy(dataclasses.replace(PolicyConfig(), step_scale=1e6)),
    }
    return run_habits(HabitsConfig(quick=True), policies=policies)


def test_adams_steps_on_noise_are_those_of_an_average_of_independent_gradients() -> None:
    figures = habits.noise(ADAMW, Lengths(noise=300), [0])
    for tensor in ("matrix", "vector"):
        assert figures[f"{tensor}, step 1"] == [pytest.approx(1.0, rel=1e-3)]
        assert figures[f"{tensor}, step 300"] == [pytest.approx(math.sqrt(0.1 / 1.9), rel=0.1)]


def test_adams_steps_under_a_turning_gradient_are_those_of_its_momentum() -> None:
    figures = habits.flips(ADAMW, Lengths(flips=200), [0])
    for tensor in ("matrix", "vector"):
        assert figures[f"{tensor}, last step"] == [pytest.approx(0.1 / 1.9, rel=1e-3)]
        assert figures[f"{tensor}, way in the second half"][0] < 0.01


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_adamw_made_of_a_policy_has_adamws_habits(name: str) -> None:
    rule = Contender("adamw", policy=Policy(PolicyConfig.adamw()))
    ours, its = (MEASUREMENTS[name](contender, SHORT, [0, 1]) for contender in (rule, ADAMW))
    assert list(ours) == list(its)
    for figure, values in ours.items():
        assert values == pytest.approx(its[figure], rel=1e-2, abs=1e-4), figure
        assert len(values) == (1 if "learning rate" in figure else 2)


def test_steps_that_grow_on_noise_show_and_those_of_the_default_shrink() -> None:
    growing = Policy()
    with torch.no_grad():
        growing.weights()["head"][0, growing.config.context.index("log_age")] = 2.0
    for contender, is_larger in ((Contender("growing", policy=growing, backend="eager"), True), (DEFAULT, False)):
        steps = habits.noise(contender, Lengths(noise=100), [0])
        for tensor in ("matrix", "vector"):
            ratio = steps[f"{tensor}, step 100"][0] / steps[f"{tensor}, step 1"][0]
            assert ratio > 2.0 if is_larger else ratio < 0.8


def test_a_good_start_that_the_default_leaves_shows() -> None:
    leaving, staying = (habits.good_start(c, Lengths(good_start=60), [0])["lr 0.001"][0] for c in (DEFAULT, ADAMW))
    assert leaving > 10.0 * staying


def test_without_its_age_the_bundled_rule_adapts_worse_after_changes_than_one_made_anew() -> None:
    with_age = Policy.from_pretrained("default")
    without = Policy(dataclasses.replace(with_age.config, age_rate=0.0))
    without.load_state_dict({name: w for name, w in with_age.state_dict().items() if name != "age"})
    kept, anew = {}, {}
    for name, policy in (("with", with_age), ("without", without)):
        after = habits.changes(Contender(name, policy=policy, backend="eager"), Lengths(target=60, window=30), [0])
        kept[name], anew[name] = after["mean"][0], after["made anew, mean"][0]
    assert kept["without"] > 1.2 * anew["without"]
    assert kept["with"] < 1.1 * anew["with"]


def test_the_best_learning_rate_is_that_with_the_lowest_figure() -> None:
    tuned = Contender(REFERENCE, (1e-3, 1e-2, 1e-6))
    alone = {lr: habits.changes(Contender("", (lr,)), SHORT, [0])["mean"] for lr in tuned.rates}
    best = min(alone, key=lambda lr: alone[lr])
    figures = habits.changes(tuned, SHORT, [0])
    assert (figures["learning rate"], figures["mean"]) == ([best], alone[best])


def test_ten_times_the_rate_is_what_it_says_and_a_cosine_is_no_constant_rate() -> None:
    one, ten = (habits.rates(Contender("", (lr,)), SHORT, [0]) for lr in (1e-3, 1e-2))
    assert one["ten times lr"] == ten["right lr"] != one["right lr"]
    assert one["cosine"] != one["right lr"]


def test_a_run_that_diverged_is_said_to_have(measured: dict[str, Any]) -> None:
    bold = Contender("bold", policy=Policy(dataclasses.replace(PolicyConfig(), step_scale=1e6)))
    assert habits.rates(bold, SHORT, [0])["right lr"] == [math.inf]
    assert measured["figures"]["rates"]["bold"]["right lr"] == [None]
    assert "diverged, 1 of 1" in markdown(measured)
    assert cell([1.0, None, 3.0]) == "diverged, 1 of 3"
    assert cell([1.0, 3.0]) == "2 ± 1.4"
    assert cell([2.0, 2.0]) == "2"
    assert cell([]) == "–"


def test_every_contender_and_measurement_is_in_the_tables(measured: dict[str, Any]) -> None:
    assert list(measured["figures"]) == list(MEASUREMENTS)
    json.dumps(measured, allow_nan=False)
    text = markdown(measured, level=3)
    assert text.count("### ") == len(sections(measured)) == len(MEASUREMENTS)
    assert text.count(f"|  | mine | bold | {SAME} | {REFERENCE} |") == 2
    assert text.count(f"|  | mine | bold | {SAME} |\n") == 3
    rows = {label: row for section in sections(measured) for label, row in section.rows}
    assert rows["lr 0.001: over AdamW's at the same lr"][SAME] == [1.0]
    assert rows["lr 0.001: over AdamW's at the same lr"]["mine"] == [pytest.approx(1.0, rel=1e-2)]
    assert rows["mean over tuned AdamW's"][REFERENCE] == [1.0]
    assert not any(math.isnan(v) for row in rows.values() for values in row.values() for v in values if v is not None)


def test_the_picture_is_drawn_where_runs_diverged_too(measured: dict[str, Any], tmp_path: Path) -> None:
    assert draw_habits(measured, tmp_path / "habits.png").read_bytes().startswith(b"\x89PNG")


def test_rules_that_do_the_same_are_drawn_as_one(measured: dict[str, Any]) -> None:
    figures = {name: {**rows, "twin": rows["mine"]} for name, rows in measured["figures"].items()}
    values = {**measured, "figures": figures, "policies": {**measured["policies"], "twin": ""}}
    drawn = together(values)
    assert list(drawn["policies"]) == ["mine, twin", "bold"]
    for name, rows in drawn["figures"].items():
        assert rows["mine, twin"] == measured["figures"][name]["mine"]
        assert list(rows)[:2] == ["mine, twin", "bold"]
        assert "twin" not in rows
    figures["noise"] = {**figures["noise"], "twin": measured["figures"]["noise"]["bold"]}
    assert together(values) == values


def test_the_card_shows_the_habits_and_nothing_where_there_are_none(measured: dict[str, Any]) -> None:
    policy = Policy()
    block = card_block(measured, "mine", "learned-optim bench --suite habits")
    card = model_card(policy.config, policy.weights(), {"habits": block})
    shown = card.partition("## Habits")[2].partition("## How it was made")[0]
    assert "- command: `learned-optim bench --suite habits`" in shown
    assert shown.count("\n| ") == len(block["figures"]) + 2
    assert "## Habits" not in model_card(policy.config, policy.weights(), {})
    with pytest.raises(ValueError, match=r"results\.habits\.figures must be"):
        validate({"habits": {"figures": [1.0]}})


def test_the_command_prints_the_tables_and_writes_the_rest(
    measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learned_optim.bench.habits.run_habits", lambda *_, policies, **__: {
        **measured, "policies": {"reader": "", **measured["policies"]},
        "figures": {name: {"reader": by["mine"], **by} for name, by in measured["figures"].items()},
    })  # fmt: skip
    options = ["--suite", "habits", "--no-bundled", "--policies", "reader", "--quick", "--out", str(tmp_path)]
    assert main(["bench", *options]) == 0
    printed = capsys.readouterr()
    assert "## Steps on pure noise" in printed.out
    assert printed.out.rstrip().endswith(str(tmp_path))
    written = json.loads((tmp_path / "habits.json").read_text())
    command = "learned-optim bench --suite habits --policies reader --quick --no-bundled"
    assert sorted(written["command"].split()) == sorted(command.split())
    own = json.loads((tmp_path / "policies" / "reader" / "results.json").read_text())
    assert own["habits"]["command"] == written["command"]
    assert own["license"] == "apache-2.0"
    assert (tmp_path / "table.md").is_file()
    assert (tmp_path / "habits.png").is_file()


def test_bundled_policies_come_first_and_none_twice() -> None:
    names = ["default", "pretraining", "reader", "recurrent"]
    assert habits.policy_names(HabitsConfig()) == names
    assert habits.policy_names(HabitsConfig(policies=("a/b", "reader"))) == [*names, "a/b"]
    assert habits.policy_names(HabitsConfig(policies=("reader",), bundled=False)) == ["reader"]


@pytest.mark.parametrize(("wrong", "message"), [
    ({"seeds": 0}, "seeds must be 1 or more"), ({"backend": "gpu"}, "backend must be"),
    ({"policies": (), "bundled": False}, "policies must be at least one"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HabitsConfig(**wrong)
