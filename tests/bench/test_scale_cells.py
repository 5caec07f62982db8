"""Cells of the scale suite: what speedup is, what identifies a run, and which is made next.

How rivals are tuned is in ``test_scale_tuning.py``.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from helpers.scale_cells import SMALL, cell, judged, lengths, result
from learned_optim.bench.curves import FLOOR
from learned_optim.bench.scale import cells, plan
from learned_optim.bench.scale.cells import Cell, Result, read, read_all, store, time_ratio
from learned_optim.bench.scale.config import MODELS, ScaleConfig
from learned_optim.bench.scale.figures import by_model, compare
from learned_optim.bench.scale.plan import queue
from learned_optim.bench.scale.report import UNFINISHED, losses, speedups
from learned_optim.bench.scale.rivals import Setting, ours

(OURS, DECAYS), ADAMW = ours("default"), Setting("adamw", 2)


def speedup(ours: Result | list[Result], rival: Result | list[Result]) -> float | None:
    found = cells.speedup(*(runs if isinstance(runs, list) else [runs] for runs in (ours, rival)))
    return None if found is None else found.value


def curve(values: np.ndarray) -> Result:
    base = result(cell(OURS))
    return dataclasses.replace(base, held_out=values)


@pytest.mark.parametrize("quickness", [0.5, 0.8, 1.0, 1.25, 2.0, 4.0])
def test_a_curve_that_is_so_many_times_quicker_has_about_that_speedup(quickness: float) -> None:
    measured = speedup(result(cell(OURS), quickness), result(cell(ADAMW)))
    # Smoothing reaches back over two evaluations out of forty, for both.
    assert measured == pytest.approx(quickness, rel=0.12)
    assert measured is not None
    assert measured <= quickness * 1.001 or quickness < 1.0


def test_equal_curves_have_speedup_one_and_better_ones_more() -> None:
    rival, last = result(cell(ADAMW)), 1.0
    assert speedup(rival, rival) == 1.0
    for quickness in np.linspace(0.2, 3.0, 15):
        value = speedup(result(cell(OURS), float(quickness)), rival)
        assert value is not None
        assert (value - 1.0) * (quickness - 1.0) >= 0.0
        assert quickness <= 0.2 or value >= last
        last = value


def test_a_loss_that_is_low_once_by_chance_is_not_reached() -> None:
    rival, values = result(cell(ADAMW)), np.full(41, 1.5)
    values[10] = rival.final - 0.01
    assert speedup(curve(values), rival) == pytest.approx(speedup(curve(np.full(41, 1.5)), rival))
    values[10], values[40] = 1.5, rival.final - 0.01
    assert judged([curve(values)], [rival]) == (1.0, True)


def test_the_rivals_final_loss_is_not_smoothed_away() -> None:
    falling = np.concatenate([np.full(33, 2.0), np.linspace(2.0, 1.0, 8)])  # as with a decay over the last fifth
    for end in (1.001, 1.01, 1.05, 1.1):
        value = speedup(curve(np.full(41, end)), curve(falling))
        assert value is not None
        assert 0.9 < value < 1.0


@pytest.mark.parametrize("quickness", [1.1, 1.7, 3.0])
def test_with_a_schedule_speedup_is_found_by_the_length_of_the_run(quickness: float) -> None:
    rival, runs = result(cell(ADAMW)), [result(cell(s), quickness) for s in lengths(DECAYS)]
    assert {run.cell.steps for run in runs} == {round(SMALL.steps * s.part) for s in lengths(DECAYS)}
    for order in (runs, runs[::-1]):
        assert speedup(order, rival) == pytest.approx(quickness, rel=0.01)  # interpolated between lengths
    its = [result(cell(s), quickness) for s in lengths(ADAMW)]
    assert speedup(result(cell(DECAYS)), its) == pytest.approx(1.0 / quickness, rel=0.01)  # the rival ends lower
    assert speedup(result(cell(OURS)), its) == pytest.approx(1.0 / quickness, rel=0.01)


def test_a_run_that_only_its_decay_brings_down_is_not_held_to_its_whole_length() -> None:
    def falls(setting: Setting, end: float) -> Result:
        base = result(cell(setting))
        return dataclasses.replace(base, held_out=np.concatenate([np.full(36, 2.0), np.linspace(2.0, end, 5)]))

    whole, second, third = (falls(s, end) for s, end in zip(lengths(DECAYS), (1.3, 1.4, 1.6), strict=False))
    rival = falls(ADAMW, 1.5)
    alone = cells.speedup([whole], [rival])
    assert alone is not None
    assert not alone.is_final
    assert alone.value < 1.1
    assert judged([whole, second, third], [rival]) == (pytest.approx((0.8 * 0.64) ** -0.5, rel=0.01), True)
    assert judged([whole, second], [rival]) == (pytest.approx(1.25), False)  # no run ends above the rival
    broken = dataclasses.replace(third, held_out=np.full(41, math.inf))
    assert judged([whole, second, broken], [rival]) == (pytest.approx(1.25), True)
    shortest = [falls(s, 1.4) for s in lengths(DECAYS)]
    assert judged(shortest, [rival]) == (pytest.approx(1 / 0.21, rel=0.01), True)
    its = [falls(s, end) for s, end in zip(lengths(ADAMW), (1.5, 1.6, 1.8), strict=False)]
    for slower in (falls(DECAYS, 1.7), falls(OURS, 1.7)):
        assert judged([slower, second], its) == (pytest.approx((0.8 * 0.64) ** 0.5, rel=0.01), True)
    assert cells.speedup([whole], [broken]) is None


def test_shorter_runs_are_made_until_one_ends_above_every_rival() -> None:
    config = ScaleConfig(models=("text-0.3M",), policies=("default",))
    results: list[Result] = []
    while left := cells_of(config, results):
        setting = left[0].setting
        at, best = {"learned": (0, 1.5), "adamw": (2, 0.9), "muon": (3, 1.1)}[setting.optimizer]
        results.append(result(left[0], best * 0.9 ** (abs(setting.exponent - at) + abs(setting.auxiliary))))
    for seed in (0, 1):
        of_seed = [r.cell.setting for r in results if r.cell.seed == seed]
        # 0.64 of the steps end a little below AdamW at the best of its rates, the slower rival, and 0.51 above it.
        assert sorted(s.part for s in of_seed if s.schedule == "decay") == [0.51, 0.64, 0.8, 1.0]
    (row,) = by_model(results, config.chosen(), config.rivals)
    assert row.others == ()
    assert [len(runs.results) for runs in row.ours] == [2, 2]
    assert len(row.ours[1].shorter) == 6
    constant, decays = (compare(runs, row.rivals[0]) for runs in row.ours)
    assert constant is not None
    assert decays is not None
    assert decays.steps == pytest.approx(constant.steps, rel=0.1)
    assert constant.is_final
    assert decays.is_final
    assert UNFINISHED not in speedups([row])
    # Of another policy all of ours is missing again, and shorter runs wait for the whole one.
    anew = queue(config, {"default": "sha256:1"}, results, "text", config.chosen())
    assert {e.cell.setting.part for e in anew} == {1.0}
    begun = [r for r in results if r.cell.setting.part in (1.0, 0.8)]  # ours is not yet above either rival
    left = {(c.setting.part, c.seed) for c in cells_of(config, begun)}
    assert left == {(0.64, 0), (0.64, 1)}
    (row,) = by_model(begun, config.chosen(), config.rivals)
    assert f"{UNFINISHED} |" in speedups([row])
    old = [dataclasses.replace(r, cell=dataclasses.replace(r.cell, policy="older")) for r in begun
           if r.cell.setting.part == 0.8]  # fmt: skip
    whole = [r for r in results if r.cell.setting.part == 1.0]
    assert {c.setting.part for c in cells_of(config, [*whole, *old])} == {0.8}


def test_a_rival_that_ends_lower_is_trained_over_fewer_steps() -> None:
    config = ScaleConfig(models=("text-0.3M",), rivals=("adamw",))
    results: list[Result] = []
    while left := cells_of(config, results):
        setting, seed = left[0].setting, left[0].seed
        best = (0.7, 0.65)[seed] if setting.optimizer == "learned" else 1.0
        results.append(result(left[0], best * 0.9 ** abs(setting.exponent - 2 * (setting.optimizer == "adamw"))))
    parts = [sorted(r.cell.setting.part for r in results if r.cell.setting.optimizer == "adamw" and r.cell.seed == seed
                    and r.cell.setting.exponent == 2) for seed in (0, 1)]  # fmt: skip
    assert parts == [[0.64, 0.8, 1.0], [0.64, 0.8, 1.0]]
    (row,) = by_model(results, config.chosen(), config.rivals)
    for runs in row.ours:
        comparison = compare(runs, row.rivals[0])
        assert comparison is not None
        assert comparison.steps == pytest.approx((0.7 * 0.65) ** 0.5, rel=0.02)  # each seed by its own runs
        assert comparison.is_final
    assert row.rivals[0].tuning is not None
    assert {s.part for s in row.rivals[0].tuning.tried} == {1.0}


def test_no_shorter_run_is_made_against_a_rival_that_diverged() -> None:
    config = ScaleConfig(models=("text-0.3M",), rivals=("adamw",))
    results: list[Result] = []
    while left := cells_of(config, results):
        results.append(result(left[0], 0.0 if left[0].setting.optimizer == "adamw" else 2.0))
    assert {r.cell.setting.part for r in results} == {1.0}


def test_a_shorter_run_is_expected_to_take_its_part_of_the_time() -> None:
    short = cell(lengths(DECAYS)[1])
    known = [result(cell(DECAYS))]
    assert plan.seconds(short, known) == pytest.approx(0.8 * plan.seconds(cell(DECAYS), known))
    assert plan.seconds(short, []) == pytest.approx(0.8 * plan.seconds(cell(DECAYS), []))
    quick = [dataclasses.replace(c, device="cuda", model=MODELS["images-0.1M"]) for c in (short, cell(DECAYS))]
    first, second = (plan.seconds(c, []) - plan.COMPILATION for c in quick)
    assert first == pytest.approx(0.8 * second)


def test_whole_runs_are_called_what_they_were_before_there_were_shorter_ones() -> None:
    folder = Path(__file__).parents[2] / "docs" / "results" / "scale"
    paths = list(folder.glob("*.json"))
    assert paths
    for path in paths:
        assert read(path).cell.path(folder) == path
    assert cell(lengths(DECAYS)[1]).path(Path()).name.startswith("text-0.3M.default.decay.part0.8.s0")


def test_what_diverged() -> None:
    bad, good = result(cell(OURS), 0.0), result(cell(ADAMW))
    assert (bad.diverged, good.diverged) == (True, False)
    assert speedup(bad, good) == FLOOR
    assert speedup(good, bad) is None
    worse = curve(np.linspace(2.0, 3.2, 41))
    assert worse.diverged


def test_time_counts_the_gradient_once_for_both() -> None:
    quiet, busy = result(cell(OURS), update=0.5), result(cell(ADAMW), update=0.1)
    busy = dataclasses.replace(busy, step_seconds=3.1)  # a gradient of 3 s, where another process was in between
    assert time_ratio([quiet], [busy]) == pytest.approx(1.5 / 1.1)


@pytest.mark.parametrize("quickness", [1.0, 0.0])
def test_a_file_gives_back_what_was_put_in(tmp_path: Path, quickness: float) -> None:
    wanted = result(cell(Setting("muon", 3, -1), MODELS["images-0.1M"], 1, "cuda"), quickness)
    found = read(store(tmp_path, wanted))
    assert found.cell == wanted.cell
    np.testing.assert_allclose(found.held_out, wanted.held_out, rtol=1e-5)
    assert [r.cell for r in read_all(tmp_path)] == [wanted.cell]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = store(tmp_path, result(cell(OURS)))
    text = path.read_text(encoding="utf-8")
    for damaged in (text[:100], text.replace('"format": 1', '"format": 7'), text.replace('"seed"', '"sed"'), "[]"):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=path.name):
            read(path)


def test_runs_that_differ_have_different_files() -> None:
    base = cell(ADAMW)
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"seed": 1}, {"device": "cuda"}, {"data": "other"}, {"policy": "sha256:1"},
            {"setting": Setting("adamw", 3)}, {"model": dataclasses.replace(SMALL, steps=7)},
        )
    ]  # fmt: skip
    assert len({c.path(Path()) for c in (base, *others)}) == 1 + len(others)
    planned = dataclasses.replace(SMALL, seeds=5, device="cuda")  # what is done with a model is not what it is
    assert dataclasses.replace(base, model=planned).path(Path()) == base.path(Path())


def cells_of(config: ScaleConfig, results: list[Result]) -> list[Cell]:
    return [e.cell for e in queue(config, {"default": "sha256:0"}, results, "text", config.chosen())]


def test_seeds_come_after_tuning_and_nothing_is_made_twice() -> None:
    config = ScaleConfig(models=("text-0.3M",))
    results: list[Result] = []
    seen: list[str] = []
    while left := cells_of(config, results):
        quickness = 2.0 if left[0].setting.optimizer == "learned" else 2.0 ** -abs(left[0].setting.exponent - 2.6)
        results.append(result(left[0], quickness))
        seen.append(left[0].name)
    assert len(set(seen)) == len(seen)
    assert len([n for n in seen if ".s1" in n and ".part" not in n]) == 4  # two of ours, two rivals
    for name in ("adamw", "muon"):
        assert [n.endswith("s1") for n in seen if f".{name}." in n][-1:] == [True]
    (row,) = by_model(results, config.chosen(), config.rivals)
    comparison = compare(row.ours[0], row.rivals[0])
    assert comparison is not None
    assert comparison.seeds == 2
    assert comparison.steps == pytest.approx(2.0 / 2.0**-0.4, rel=0.15)


def test_the_queue_is_sorted_by_what_cells_tell_per_minute() -> None:
    config = ScaleConfig(models=("text-*",))
    entries = queue(config, {"default": ""}, [], "text", config.chosen())
    assert [e.value for e in entries] == sorted((e.value for e in entries), reverse=True)
    assert entries[0].cell.model.name == "text-0.3M"
    known = [dataclasses.replace(result(cell(ADAMW)), step_seconds=1e4)]
    later = queue(config, {"default": ""}, known, "text", config.chosen())
    assert later[0].cell.model.name == "text-1M"  # 0.3M was found to be slow
    only = queue(dataclasses.replace(config, cells=("*3M.muon.*",)), {"default": ""}, [], "text", config.chosen())
    assert {(e.cell.model.name, e.cell.setting.optimizer) for e in only} == {("text-0.3M", "muon"), ("text-3M", "muon")}


def test_ours_at_other_rates_is_shown_apart() -> None:
    config = ScaleConfig(models=("text-0.3M",), exponents=(1,))
    faster = ours("default", 1)[1]
    assert faster.lr == 2e-3
    assert {c.setting for c in cells_of(config, []) if c.setting.exponent == 1} >= set(ours("default", 1))
    results = [result(cell(OURS), 1.0), result(cell(faster), 5.0), result(cell(ADAMW))]
    (row,) = by_model(results, [SMALL], ["adamw"])
    assert [len(runs.results) for runs in row.ours] == [1, 0]
    assert [runs.name for runs in row.others] == ["default, with decay, lr 0.002"]
    assert "with decay, lr 0.002" in losses([row])
    assert "0.002" not in speedups([row])


def test_results_of_other_devices_texts_and_older_policies_are_not_mixed_in() -> None:
    here = [result(cell(s, seed=seed, policy="new" if s == OURS else ""), date="2026-02-01")
            for s in (OURS, ADAMW) for seed in (0, 1)]  # fmt: skip
    older = [result(cell(OURS, policy="old"), 9.0)]
    elsewhere = [result(cell(Setting("adamw", 4), device="cuda"), 9.0)]
    other = [result(dataclasses.replace(cell(Setting("adamw", 3)), data="another"), 9.0)]
    (row,) = by_model([*older, *here, *elsewhere, *other], [SMALL], ["adamw"])
    assert row.device == "cpu"
    assert [r.cell.policy for r in row.ours[0].results] == ["new", "new"]
    assert row.rivals[0].tuning is not None
    assert row.rivals[0].tuning.best == ADAMW
