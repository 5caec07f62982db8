"""Targets that change: when, by how much, and which one is held out."""

from __future__ import annotations

import itertools

import pytest
import torch

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.changing import permuted_labels, permuted_pixels, start_steps

BOTH = pytest.mark.parametrize("name", ["switching_targets", "drifting_targets"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def concepts(task, seed: int) -> list[int]:
    """The number of the concept at each step."""
    return [int(batch[2]) for batch in itertools.islice(task.batches(seeded(seed)), task.length)]


def test_concepts_begin_in_order_at_random_steps_that_fill_the_run():
    starts = start_steps(seeded(), 6, 600)
    stretches = [b - a for a, b in itertools.pairwise([*starts, 600])]
    assert starts[0] == 0
    assert 0.9 * max(stretches) <= 3 * min(stretches)
    assert starts == start_steps(seeded(), 6, 600) != start_steps(seeded(1), 6, 600)


def test_three_to_six_switches_at_steps_that_the_seed_of_the_batches_determines():
    for number in range(8):
        task = FAMILIES["switching_targets"].task(number)
        met = concepts(task, 1)
        assert met == sorted(met)
        assert set(met) == set(range(met[-1] + 1))
        assert 3 <= met[-1] <= 6
        assert met != concepts(task, 2)


@BOTH
def test_held_out_is_the_concept_of_the_last_batch(name):
    task = FAMILIES[name].task(3)
    params, buffers = task.init(seeded())
    batches = list(itertools.islice(task.batches(seeded(1)), task.length))
    losses = []
    for batch in (batches[0], batches[-1]):
        task.loss(params, buffers, batch)
        assert int(buffers["concept"]) == int(batch[2])
        losses.append(float(task.eval_loss(params, buffers)))  # type: ignore[attr-defined]
    assert losses[0] != losses[1]
    buffers["concept"].zero_()
    assert float(task.eval_loss(params, buffers)) == losses[0]  # type: ignore[attr-defined]


def held_out(task) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = task._eval_source()
    return inputs.double(), targets.double()


def change(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).square().mean())


@pytest.mark.parametrize("number", range(6))
def test_drift_is_small_from_stage_to_stage_and_large_over_the_run(number):
    inputs, targets = held_out(FAMILIES["drifting_targets"].task(number))
    series = inputs if change(inputs[0], inputs[-1]) > 0 else targets
    steps = [change(a, b) for a, b in itertools.pairwise(series)]
    assert max(steps) < 0.25 * change(series[0], series[-1])


def test_a_switch_leaves_nothing_as_it_was():
    for number in range(8):
        inputs, targets = held_out(FAMILIES["switching_targets"].task(number))
        for k in range(len(targets) - 1):
            assert change(inputs[k], inputs[k + 1]) > 0.3 or change(targets[k], targets[k + 1]) > 0.3


def test_permutations_of_pixels_keep_labels_and_those_of_labels_keep_pixels():
    raw = torch.arange(6.0).view(2, 3), torch.tensor([0, 2])
    order = torch.tensor([2, 0, 1])
    inputs, labels = permuted_pixels([order])(0, raw)
    assert inputs.tolist() == [[2.0, 0.0, 1.0], [5.0, 3.0, 4.0]]
    assert labels is raw[1]
    inputs, labels = permuted_labels([order])(0, raw)
    assert inputs is raw[0]
    assert labels.tolist() == [2, 1]
