"""Optimizers, single runs and the cache."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.bench_tasks import Line, normed
from learned_optim import Policy, PolicyConfig
from learned_optim.bench.ablations import ablations, random_weights, with_parts
from learned_optim.bench.baselines import ADAMW_1E3, Driver, OptimizerName, Setting, grid, hidden_matrices, missing
from learned_optim.bench.cache import RunCache, log_look, read_looks
from learned_optim.bench.runs import RunSpec, behaviour, evaluation_steps, find_task, seconds_per_step, train
from learned_optim.tasks import ModuleTask

EVERY: list[OptimizerName] = ["adamw", "schedule-free", "muon", "soap", "sgd", "learned"]
OPTIMIZERS = [name for name in EVERY if missing(name) is None]


def spec(setting: Setting = ADAMW_1E3, policy: Policy | None = None, task: Any = None, **changes: Any) -> RunSpec:
    return dataclasses.replace(RunSpec(task or Line(), 40, 0, setting, policy, 5, "b", 1.0), **changes)


def trained_policy() -> Policy:
    policy = Policy()
    for weight in policy.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return policy


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_the_same_way_twice(optimizer: OptimizerName) -> None:
    rate = 3e-3 if optimizer == "learned" else 3e-2
    setting = next(s for s in grid(optimizer) if s.lr == rate)
    policy = Policy() if optimizer == "learned" else None
    first, second = (train(spec(setting, policy)) for _ in range(2))
    assert first.losses.tolist() == second.losses.tolist()
    assert first.held_out.tolist() == second.held_out.tolist()
    assert first.held_out[-1] < 0.9 * first.held_out[0]
    assert first.parameters == 30
    assert first.step_seconds >= first.update_seconds >= 0.0


def test_settings_of_one_seed_start_alike_and_seeds_do_not() -> None:
    one, other, seed = train(spec()), train(spec(Setting("sgd", 0.1))), train(spec(seed=1))
    assert one.first_loss == other.first_loss != seed.first_loss


def test_grids_are_those_that_are_documented() -> None:
    assert len(grid("adamw")) == 14
    assert {s.lr for s in grid("adamw")} == {1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1}
    assert {s.schedule for s in grid("adamw")} == {"constant", "cosine"}
    assert ADAMW_1E3 in grid("adamw")
    assert {(s.lr, s.schedule) for s in grid("learned")} == {
        (lr, schedule) for lr in (3e-4, 1e-3, 3e-3) for schedule in ("constant", "cosine")
    }
    assert {s.warmup for s in grid("schedule-free")} == {0.0, 0.05}
    assert [(s.lr, s.schedule) for s in grid("soap")] == [(s.lr, s.schedule) for s in grid("muon")]


def test_muon_takes_hidden_matrices_only() -> None:
    def named(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    assert hidden_matrices(named(embed=(9, 4), first=(4, 4), bias=(4,), output=(9, 4))) == ["first"]
    assert hidden_matrices(named(conv=(4, 3, 3, 3), a=(4, 4), b=(4, 4))) == ["a"]
    assert hidden_matrices(named(bias=(4,))) == []
    params = {k: v.requires_grad_() for k, v in named(a=(4, 4), b=(4, 4), c=(4,)).items()}
    if hasattr(torch.optim, "Muon"):  # since torch 2.9
        driver = Driver(grid("muon")[0], params, 10, None)
        assert [type(o).__name__ for o in driver.optimizers] == ["AdamW", "Muon"]


def test_soap_steps_along_the_eigenbasis_of_its_preconditioner() -> None:
    """Its steps turn with the problem: that is what tells it from Adam."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    grads = [torch.randn(5, 5, dtype=torch.float64) for _ in range(5)]

    def moved(optimizer: OptimizerName, by: torch.Tensor) -> torch.Tensor:
        params = {"w": torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)}
        driver = Driver(Setting(optimizer, 0.1, weight_decay=0.0), params, 10, None)
        for grad in grads:
            params["w"].grad = by @ grad
            driver.step(0.0)
        return params["w"].detach()

    still = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(moved("soap", turn), turn @ moved("soap", still), atol=1e-6)
    assert not torch.allclose(moved("adamw", turn), turn @ moved("adamw", still), atol=1e-2)


@pytest.mark.parametrize("optimizer", ["schedule-free", "soap"])
def test_optimizers_of_other_libraries_are_left_out_with_a_note_where_they_are_missing(
    optimizer: OptimizerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing(optimizer) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "left out: pip install" in (missing(optimizer) or "")
    assert missing("adamw") is None


@pytest.mark.skipif(missing("muon") is not None, reason="Muon is in torch since 2.9")
def test_the_cosine_schedule_ends_near_zero_and_applies_to_every_optimizer() -> None:
    params = {k: torch.zeros(4, 4, requires_grad=True) for k in "ab"}
    driver = Driver(Setting("muon", 0.1, "cosine"), params, 10, None)
    for p in params.values():
        p.grad = torch.ones(4, 4)
    driver.step(0.5)
    assert [o.param_groups[0]["lr"] for o in driver.optimizers] == pytest.approx([0.05, 0.05])


def test_schedule_free_is_evaluated_at_its_averaged_weights_and_trained_on_at_the_others() -> None:
    params = {"w": torch.ones(3, requires_grad=True)}
    driver = Driver(Setting("schedule-free", 0.1), params, 10, None)
    for _ in range(5):
        params["w"].grad = torch.ones(3)
        driver.step(0.0)
    before = params["w"].detach().clone()
    assert driver.evaluation_mode(True)
    assert not torch.equal(before, params["w"])
    driver.evaluation_mode(False)
    assert params["w"].detach() == pytest.approx(before)
    assert not Driver(ADAMW_1E3, params, 10, None).evaluation_mode(True)


def test_schedule_free_with_batch_norm_is_evaluated_with_averages_of_its_own() -> None:
    run = train(spec(Setting("schedule-free", 0.03), task=normed(), steps=20))
    assert run.held_out[-1] < run.held_out[0]


def test_memory_none_makes_the_hidden_state_the_present_gradient() -> None:
    params = {"w": torch.randn(50, requires_grad=True)}
    setting = Setting("learned", 1e-3, memory="none")
    driver = Driver(setting, params, 10, Policy())
    for _ in range(4):
        params["w"].grad = torch.randn(50)
        driver.step(0.0)
    state = driver.optimizers[0].state[params["w"]]
    v_hat = state["exp_avg_sq"] / (1.0 - 0.999**4)
    u = params["w"].grad / v_hat.sqrt()  # pyright: ignore[reportOptionalOperand]
    for j in range(4):
        assert torch.allclose(state[f"hidden_{j}"], u, atol=1e-4)


def test_evaluations_include_the_start_and_the_end() -> None:
    assert evaluation_steps(1000, 16)[0] == 0
    assert evaluation_steps(1000, 16)[-1] == 1000
    assert len(evaluation_steps(1000, 16)) == 17
    assert evaluation_steps(2, 16) == [0, 1, 2]


def test_seconds_per_step_hold_what_happens_every_tenth_step_and_no_interruption() -> None:
    times = np.ones((203, 2))
    times[5::10, 1] = 11.0
    times[0] = times[100] = 1000.0
    assert seconds_per_step(times).tolist() == [1.0, 2.0]
    assert seconds_per_step(np.ones((1, 2))).tolist() == [1.0, 1.0]


def test_a_task_without_held_out_data_has_no_held_out_losses() -> None:
    task = ModuleTask(
        lambda: torch.nn.Linear(3, 1), lambda rng: iter(lambda: torch.randn(8, 3, generator=rng), None),
        lambda module, x: (module(x) - x.sum(1, keepdim=True)).square().mean(),
    )  # fmt: skip
    run = train(spec(task=task))
    assert len(run.held_out) == 0
    assert run.final_held_out is None


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    run = train(spec(Setting("sgd", 1e30, momentum=0.9)))
    assert run.diverged
    assert math.isinf(run.losses[-1])
    assert math.isinf(run.held_out[-1])


def test_the_behaviour_of_a_task_is_the_same_twice_and_changes_with_the_task() -> None:
    class Steeper(Line):
        def loss(self, *arguments: Any) -> torch.Tensor:
            return 1.01 * super().loss(*arguments)

    assert behaviour(Line())[0] == behaviour(Line("renamed"))[0]
    assert behaviour(Line())[0] != behaviour(Steeper())[0]


def test_tasks_of_the_zoo_are_found_by_name() -> None:
    assert find_task("val_generated_tables/0").name == "val_generated_tables/0"
    with pytest.raises(ValueError, match="unknown task 'nothing/0'"):
        find_task("nothing/0")


def test_a_cached_run_comes_back_to_single_precision(tmp_path: Path) -> None:
    cache, key, run = RunCache(tmp_path), spec().key(), train(spec())
    assert cache.get(key) is None
    cache.put(key, run)
    back = cache.get(key)
    assert back is not None
    assert back.losses.tolist() == run.losses.tolist()
    assert back.held_out == pytest.approx(run.held_out, rel=1e-6)
    assert back.step_seconds == run.step_seconds
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".npz"]


def test_a_diverged_run_comes_back_diverged(tmp_path: Path) -> None:
    cache, setting = RunCache(tmp_path), Setting("sgd", 1e30)
    cache.put(spec(setting).key(), train(spec(setting)))
    back = cache.get(spec(setting).key())
    assert back is not None
    assert back.diverged


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"nonsense",
    lambda data: data[:100] + bytes([data[100] ^ 255]) + data[101:], lambda data: data[:-200] + bytes(200),
])  # fmt: skip
def test_a_damaged_file_counts_as_none_and_is_replaced(tmp_path: Path, damage: Any) -> None:
    cache, key, run = RunCache(tmp_path), spec().key(), train(spec())
    cache.put(key, run)
    path = cache.path(key)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get(key) is None
    assert cache.damaged == [path.name]
    cache.put(key, run)
    assert cache.get(key) is not None


def test_another_runs_file_under_the_name_is_not_taken(tmp_path: Path) -> None:
    cache = RunCache(tmp_path)
    cache.put(spec().key(), train(spec()))
    other = spec(seed=1).key()
    cache.path(other).parent.mkdir(parents=True, exist_ok=True)
    cache.path(other).write_bytes(cache.path(spec().key()).read_bytes())
    assert cache.get(other) is None


def test_everything_that_shapes_a_run_is_in_its_key() -> None:
    policy = Policy()
    learned = Setting("learned", 1e-3, policy=policy.fingerprint())
    specs = [
        spec(), spec(seed=1), spec(steps=41), spec(evaluations=6), spec(behaviour="c"), spec(task=Line("other")),
        spec(Setting("adamw", 1e-3, "cosine")), spec(Setting("adamw", 3e-3)),
        spec(Setting("adamw", 1e-3, weight_decay=0.0)),
        spec(learned, policy), spec(dataclasses.replace(learned, memory="reset"), policy),
        spec(dataclasses.replace(learned, policy="sha256:0"), policy),
    ]  # fmt: skip
    keys = [json.dumps(j.key(), sort_keys=True) for j in specs]
    assert len(set(keys)) == len(keys)
    assert "torch" in specs[0].key()
    assert "rule" in specs[-1].key()
    assert "rule" not in specs[0].key()


def test_looks_are_recorded_one_by_one_and_damaged_lines_left_out(tmp_path: Path) -> None:
    assert read_looks(tmp_path / "nowhere") == []
    log_look(tmp_path, {"default": "sha256:1"}, ["a/0"], 3, 7)
    with open(tmp_path / "looks.jsonl", "a") as file:
        file.write("{half a li\n")
    log_look(tmp_path, {"default": "sha256:2"}, ["a/0"], 3, 0)
    looks = read_looks(tmp_path)
    assert [look["policies"]["default"] for look in looks] == ["sha256:1", "sha256:2"]
    assert looks[0]["new_runs"] == 7
    assert looks[0]["date"].startswith("20")


def test_ablations_take_parts_away_and_leave_the_policy_alone() -> None:
    policy = trained_policy()
    before = policy.fingerprint()
    rows, notes = ablations(policy)
    assert policy.fingerprint() == before
    by_name = {row.name: row for row in rows}
    assert not notes
    assert by_name["mixture alone"].policy.fingerprint() == Policy(policy.config).fingerprint()
    head = by_name["+ tensor head"].policy.weights()
    assert torch.equal(head["head"], policy.weights()["head"])
    assert not head["amplitude"].any()
    assert not head["pace"].any()
    pace = by_name["+ learned pace"].policy.weights()
    assert torch.equal(pace["pace"], policy.weights()["pace"])
    assert not pace["gate_features"].any()
    without = by_name["without pace"].policy
    assert without.config.pace_gain == without.config.pace_rate == 0.0
    assert torch.equal(without.weights()["amplitude"], policy.weights()["amplitude"])
    gates = by_name["+ learned gates"].policy.weights()
    assert torch.equal(gates["gate_features"], policy.weights()["gate_features"])
    assert not gates["amplitude"].any()
    assert by_name["+ amplitude"].policy is policy
    assert by_name["hidden state reset"].memory == "reset"
    assert by_name["hidden state without memory"].memory == "none"
    assert by_name["GRU cell, untrained"].policy.config.cell == "gru"


def test_random_weights_have_the_size_of_the_learned_ones() -> None:
    policy = trained_policy()
    drawn = random_weights(policy).weights()
    for name, weight in policy.weights().items():
        assert not torch.equal(drawn[name], weight)
        ours, its = (float(w.detach().square().mean().sqrt()) for w in (drawn[name], weight))
        assert ours == pytest.approx(its, rel=0.7)


def test_ablations_say_what_cannot_be_told_apart() -> None:
    _, notes = ablations(Policy())
    assert notes == ["the policy's weights are all zero, so most ablations are the policy itself"]
    with pytest.raises(ValueError, match="cell='gated'"):
        ablations(Policy(), Policy())
    with pytest.raises(ValueError, match="unknown parts"):
        with_parts(Policy(), ["tail"])
    rows, _ = ablations(Policy(PolicyConfig.gru()), Policy(PolicyConfig.gru()))
    assert [row.name for row in rows][2:] == ["+ GRU", "hidden state reset", "random weights", "GRU cell"]


def test_numbers_of_a_run_are_plain() -> None:
    assert type(train(spec()).step_seconds) is float
    assert train(spec()).losses.dtype == np.float64
