"""The scale suite's rivals: how their learning rates are found, and where a larger model's search begins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest

from helpers.scale_cells import cell, result
from learned_optim.bench.scale.cells import Result
from learned_optim.bench.scale.config import MODELS
from learned_optim.bench.scale.plan import Tuned, tuned
from learned_optim.bench.scale.rivals import Setting, tuning

ADAMW = Setting("adamw", 2)


def tuned_to_the_end(
    optimizer: str, loss: Callable[[Setting], float], smaller: Setting | None = None
) -> dict[Setting, float]:
    losses: dict[Setting, float] = {}
    while left := tuning(optimizer, losses, smaller)[0]:  # pyright: ignore[reportArgumentType]
        losses[left[0]] = loss(left[0])
    return losses


@pytest.mark.parametrize("right", [-3, 0, 2, 3, 6])
def test_learning_rates_are_tried_until_the_best_lies_within(right: int) -> None:
    losses = tuned_to_the_end("adamw", lambda s: (s.exponent - right) ** 2)
    best = min(losses, key=lambda s: losses[s])
    assert best.exponent == right
    assert len(losses) >= 4
    assert {right - 1, right + 1} <= {s.exponent for s in losses}


@pytest.mark.parametrize(("right", "auxiliary"), [(3, 0), (1, -2), (7, 2)])
def test_muons_auxiliary_rate_is_tuned_too(right: int, auxiliary: int) -> None:
    losses = tuned_to_the_end("muon", lambda s: (s.exponent - right) ** 2 + 0.3 * (s.auxiliary - auxiliary) ** 2)
    best = min(losses, key=lambda s: losses[s])
    assert (best.exponent, best.auxiliary) == (right, auxiliary)


def test_rates_that_diverge_are_an_edge_and_tuning_ends_where_all_do() -> None:
    losses = tuned_to_the_end("adamw", lambda s: math.inf if s.exponent > 2 else -float(s.exponent))
    assert min(losses, key=lambda s: losses[s]).exponent == 2
    assert len(tuned_to_the_end("muon", lambda s: math.inf)) == 4
    assert len(tuned_to_the_end("muon", lambda s: 1.0)) < 12


def test_a_larger_model_begins_around_the_best_of_the_smaller() -> None:
    models = [MODELS["text-0.3M"], MODELS["text-1M"], MODELS["images-0.1M"]]
    losses = tuned_to_the_end("adamw", lambda s: (s.exponent - 5) ** 2)
    results = [result(cell(s), 10.0 - loss) for s, loss in losses.items() if loss < 10]
    states = tuned("adamw", models, results)
    assert states["text-0.3M"].best == Setting("adamw", 5)
    assert [s.exponent for s in states["text-1M"].missing] == [5, 4, 6, 3]
    assert states["images-0.1M"] == tuned("adamw", models, [])["images-0.1M"]


def rivals_of(best: int, rates: int, *, device: str, data: str) -> list[Result]:
    """AdamW on the smallest language model with so many rates, of which one ends lowest."""
    cells = [cell(Setting("adamw", e), device=device) for e in range(best, best + rates)]
    return [result(dataclasses.replace(c, data=data), 10.0 - c.setting.exponent) for c in cells]


def test_a_smaller_model_that_was_measured_elsewhere_says_where_to_begin() -> None:
    models = [MODELS["text-0.3M"], MODELS["text-1M"]]
    most = rivals_of(5, 3, device="cpu", data="another")
    elsewhere = [*rivals_of(1, 2, device="cuda", data="third"), *most]
    states = tuned("adamw", models, [], elsewhere)
    assert states["text-0.3M"] == tuned("adamw", models, [])["text-0.3M"]  # whose losses are not mixed in
    assert [s.exponent for s in states["text-1M"].missing] == [5, 4, 6, 3]
    here = rivals_of(2, 4, device="cuda", data="text")
    assert [s.exponent for s in tuned("adamw", models, here, [*elsewhere, *here])["text-1M"].missing] == [2, 1, 3, 0]


def test_a_state_says_whether_it_is_done() -> None:
    assert Tuned(ADAMW, (ADAMW,), ()).done
    assert not Tuned(ADAMW, (), (ADAMW,)).done
