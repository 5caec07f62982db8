"""Contrastive families: the losses against loops over pairs, and the views."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.contrastive import (
    CELLS,
    COLOURS,
    TwoTowers,
    captioned,
    info_nce,
    nt_xent,
)
from learned_optim.tasks.image_views import Augmentation

NAMES = ("contrastive_images", "contrastive_tables", "contrastive_captions")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosine(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_nt_xent_is_a_loop_over_all_views():
    module = TwoTowers(nn.Linear(5, 4), None, 0.3)
    one, two = torch.randn(2, 1, 6, 5)
    with torch.no_grad():
        views = module.first(torch.cat([one[0], two[0]]))
        loss = nt_xent(module, (one, two))
    terms = []
    for i in range(12):
        scores = {j: cosine(views[i], views[j]) / 0.3 for j in range(12) if j != i}
        terms.append(math.log(sum(math.exp(s) for s in scores.values())) - scores[(i + 6) % 12])
    assert float(loss) == pytest.approx(sum(terms) / 12, rel=1e-5)


def test_info_nce_is_a_loop_over_both_directions():
    module = TwoTowers(nn.Linear(5, 4), nn.Linear(3, 4), None)
    one, two = torch.randn(1, 6, 5), torch.randn(1, 6, 3)
    with torch.no_grad():
        a, b, loss = module.first(one[0]), module.second(two[0]), info_nce(module, (one, two))  # type: ignore[misc]
    scores = [[cosine(a[i], b[j]) / 0.07 for j in range(6)] for i in range(6)]
    terms = []
    for i in range(6):
        for others in (scores[i], [row[i] for row in scores]):
            terms.append(math.log(sum(math.exp(s) for s in others)) - scores[i][i])
    assert float(loss) == pytest.approx(sum(terms) / 12, rel=1e-4)


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_groups_do_not_see_each_other(loss):
    module, (one, two) = TwoTowers(nn.Linear(5, 4), None, 0.3), torch.randn(2, 3, 8, 5)
    alone = torch.stack([loss(module, (one[i : i + 1], two[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(loss(module, (one, two)), alone.mean())


def test_the_temperature_is_learned_or_fixed_and_bounded():
    learned, fixed = TwoTowers(nn.Linear(2, 2), None, None), TwoTowers(nn.Linear(2, 2), None, 0.2)
    assert "log_scale" in dict(learned.named_parameters())
    assert "log_scale" not in dict(fixed.named_parameters())
    torch.testing.assert_close(torch.stack([learned.scale(), fixed.scale()]), torch.tensor([1 / 0.07, 5.0]))
    nn.init.constant_(learned.log_scale, 50.0)
    assert float(learned.scale().detach()) == pytest.approx(100.0)


def test_views_are_crops_and_mirror_images():
    images = torch.rand(40, 2, 8, 8, generator=seeded(0))
    assert torch.equal(Augmentation()(images, seeded(1)), images)
    views = Augmentation(shift=2, flip=True)(images, seeded(1))
    padded = torch.nn.functional.pad(images, (2,) * 4, mode="reflect")
    mirrored = 0
    for image, view in zip(padded, views, strict=True):
        crops = [image[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        plain = any(torch.equal(view, crop) for crop in crops)
        mirrored += not plain
        assert plain or any(torch.equal(view, crop.flip(2)) for crop in crops)
    assert 10 <= mirrored <= 30


def test_holes_jitter_and_noise_are_each_images_own():
    images = torch.ones(200, 1, 10, 10)
    holes = Augmentation(hole=4)(images, seeded(0))
    sizes = (holes == 0).sum((1, 2, 3))
    assert int(sizes.max()) == 16  # smaller ones at the border
    assert bool((sizes >= 4).all())
    jittered = Augmentation(jitter=0.5)(images, seeded(0))
    assert jittered.var((1, 2, 3)).max() < 1e-9
    assert jittered.mean((1, 2, 3)).std() > 0.3
    noisy = Augmentation(noise=0.3)(images, seeded(0))
    assert float(noisy.std()) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_views_are_fresh_and_held_out_batches_have_the_size_of_the_others(name):
    fresh = 0
    for seed in range(3):
        task = FAMILIES[name].task(seed)
        batch = next(task.batches(seeded(0)))
        held_out = task._eval_source()  # type: ignore[attr-defined]
        assert [t.shape[0] for t in batch] == [1, 1]
        assert [t.shape[0] for t in held_out] == [4, 4]
        assert [t.shape[1:] for t in batch] == [t.shape[1:] for t in held_out]
        fresh += batch[0].shape != batch[1].shape or not torch.equal(*batch)
    assert fresh == 3


def test_a_caption_says_what_is_in_the_picture():
    images, words = captioned(seeded(0), 300, 16, 1, blank=0.0)
    assert int(words.min()) >= 1
    assert int(words[:, 0].max()) <= COLOURS < int(words[:, 1].min())
    row, column = (words[:, 1] - 1 - COLOURS) // CELLS, (words[:, 1] - 1 - COLOURS) % CELLS
    brightest = images.square().sum(1).flatten(1).argmax(1)
    near = ((brightest // 16 // 4 - row).abs() <= 1) & ((brightest % 16 // 4 - column).abs() <= 1)
    assert float(near.float().mean()) > 0.9
    _, blanks = captioned(seeded(0), 300, 16, 3, blank=0.3)
    assert 0.25 < float((blanks == 0).float().mean()) < 0.35
