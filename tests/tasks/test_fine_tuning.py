"""Fine-tuning families: what is trained, what stays, and where a run begins."""

from __future__ import annotations

import pytest
import torch

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.fine_tuning import (
    CONTEXT,
    IMAGE_NETWORKS,
    IMAGE_RECIPES,
    MANUAL,
    TEXT_NETWORKS,
    Tuning,
    mislabelled,
    tuned_network,
)
from learned_optim.tasks.families.fine_tuning_tables import CAUSES, drawn_world, table_rows, turned
from learned_optim.tasks.pretrained import TUNED, pretrained_state

NAMES = ("finetune_images", "finetune_text", "finetune_tables")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tuned", TUNED)
def test_a_tuned_network_holds_the_pretrained_tensors_and_a_new_head(tuned):
    name, rank = "mlp_blobs", 3
    state, network = pretrained_state(IMAGE_RECIPES[name]), IMAGE_NETWORKS[name]
    module = tuned_network(IMAGE_RECIPES[name], lambda: network.make(1, 16), Tuning(tuned, 0.5, rank, 1.0), 5)
    body = {k.replace(".frozen", ""): t for k, t in module.get_submodule("body").state_dict().items()}
    kept = {k: t for k, t in body.items() if ".down." not in k and ".up." not in k}
    assert len(kept) == len(state) - 2
    assert all(torch.equal(state[k], t) for k, t in kept.items())
    assert module.get_submodule("head").weight.shape == (5, 96)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_initialisations_share_the_body_and_nothing_frozen_is_a_parameter(name):
    sizes = set()
    for seed in range(9):
        task = FAMILIES[name].task(seed)
        (one, frozen), (two, frozen_too) = task.init(seeded(0)), task.init(seeded(1))
        assert all(torch.equal(one[k], two[k]) for k in one if "head" not in k and ".down." not in k)
        assert all(torch.equal(t, frozen_too[k]) for k, t in frozen.items())
        assert {"head.weight", "head.bias"} <= one.keys()
        sizes.add(len(one) > 2)
    assert sizes == {True, False}  # with and without layers of the body


def test_old_classes_begin_better_than_new_ones():
    """The old head is of use for the pictures it knew, seen anew; not many seeds draw such a task."""
    starts = []
    for seed in range(60):
        task = FAMILIES["finetune_images"].task(seed)
        params, buffers = task.init(seeded(0))
        other, _ = task.init(seeded(1))
        if torch.equal(params["head.weight"], other["head.weight"]):
            starts.append(float(task.eval_loss(params, buffers)))  # type: ignore[attr-defined]
        if len(starts) == 4:
            break
    assert min(starts) < 2.0  # a guess among 16 classes costs 2.8


@pytest.mark.parametrize("name", NAMES)
def test_held_out_examples_are_not_trained_on(name):
    for seed in range(3):
        task = FAMILIES[name].task(seed)
        held_out = {row.numpy().tobytes() for row in task._eval_source()[0]}  # type: ignore[attr-defined]
        batches = task.batches(seeded(0))
        seen = {row.numpy().tobytes() for _ in range(20) for row in next(batches)[0]}
        assert len(held_out) > 100
        # A few lines of code are said twice.
        assert len(held_out & seen) <= (0.02 * len(seen) if name == "finetune_text" else 0)


def test_mislabelling_moves_about_that_share_and_keeps_the_counts():
    labels = torch.arange(1000) % 10
    _, wrong = mislabelled((labels, labels), 0.4, seeded(0))
    assert torch.equal(wrong.bincount(), labels.bincount())
    assert 0.3 < float((wrong != labels).float().mean()) < 0.4  # a tenth of the chosen ones keep theirs
    assert torch.equal(mislabelled((labels, labels), 0.0, seeded(0))[1], labels)


def test_related_tables_are_between_the_old_one_and_another():
    old, new = drawn_world(seeded(0), 20, 3), drawn_world(seeded(1), 20, 3)
    assert torch.equal(turned(old.first, new.first, 0.0), old.first)
    torch.testing.assert_close(turned(old.first, new.first, 0.7).std(), old.first.std(), rtol=0.1, atol=0.0)
    columns, scores = table_rows(old, False, 4000, seeded(2), noise=0.0)
    torch.testing.assert_close(scores.std(0), torch.ones(3), rtol=1e-3, atol=0.0)
    spectrum = torch.linalg.svdvals(columns - columns.mean(0))
    assert spectrum[CAUSES - 1] > 1.5 * spectrum[CAUSES]  # the causes show


def test_pre_training_reads_the_manual_only():
    from learned_optim.tasks.data_text import characters
    from learned_optim.tasks.families.fine_tuning import TEXT_RECIPES

    assert set(TEXT_RECIPES) == set(TEXT_NETWORKS)
    (tokens,) = next(TEXT_RECIPES["gru"].make_task().batches(seeded(0)))
    assert tokens.shape[1] == CONTEXT + 1
    text = bytes(characters("train", False)[:MANUAL].tolist())
    assert all(bytes(row.tolist()) in text for row in tokens)
