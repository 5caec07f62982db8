"""The family of tables with categories."""

from __future__ import annotations

import pytest
import torch

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.categorical import Embedded, FeatureTransformer, Table, column_width
from learned_optim.tasks.nets import Style, mlp

SIZES = [2, 30, 400]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("classes", [0, 2, 5])
def test_a_table_has_the_columns_asked_for(classes):
    (categories, numbers, targets), held_out = Table(seeded(0), 4000, SIZES, 6, classes).load()
    assert categories.shape == (4000 - len(held_out[0]), 3)
    assert numbers.shape[1] == 6
    for column, size in zip(categories.unbind(1), SIZES, strict=True):
        assert int(column.min()) >= 0
        assert int(column.max()) < size
        assert len(column.unique()) > 0.5 * size
    assert bool(numbers.isfinite().all())
    if classes:
        assert targets.dtype == torch.int64
        assert targets.unique().tolist() == list(range(classes))
        assert float(torch.bincount(targets).max()) < 0.9 * len(targets)
    else:
        assert targets.shape == (len(categories), 1)


def test_categories_tell_about_the_target_and_part_of_it_is_noise():
    table = Table(seeded(1), 20000, [10, 10], 3, 0)
    (categories, _, targets), _ = table.load()
    cell = categories[:, 0] * 10 + categories[:, 1]
    counts = torch.bincount(cell, minlength=100).clamp(min=1)
    means = torch.zeros(100).index_add(0, cell, targets[:, 0]) / counts
    explained = 1 - (targets[:, 0] - means[cell]).var() / targets.var()
    assert float(explained) > 0.1
    noise, table.noise = table.noise, 0.0
    clean = table.load()[0][2]
    assert float((targets - clean).std()) == pytest.approx(noise, rel=0.05)


def test_held_out_rows_are_not_trained_on():
    task = FAMILIES["categorical_tables"].task(0)
    held_out = {row.numpy().tobytes() for row in task._eval_source()[1]}  # type: ignore[attr-defined]
    batches = task.batches(seeded(0))
    assert len(held_out) > 50
    assert not any(row.numpy().tobytes() in held_out for _ in range(20) for row in next(batches)[1])


def test_small_columns_get_narrow_embeddings():
    assert [column_width(size, 16) for size in (2, 5, 30, 31, 1000)] == [1, 3, 15, 16, 16]
    model = Embedded(SIZES, 16, 0.1, mlp([1 + 15 + 16 + 4, 8, 2], Style()))
    assert model(torch.tensor([[1, 29, 399]]), torch.zeros(1, 4)).shape == (1, 2)


def test_columns_of_the_transformer_share_a_table_and_no_row():
    model = FeatureTransformer(SIZES, 4, 16, 1, 2, 3, Style())
    rows = []
    for i, size in enumerate(SIZES):
        for category in (0, size - 1):
            row = torch.zeros(1, 3, dtype=torch.int64)
            row[0, i] = category
            rows.append(int((row + model.offsets)[0, i]))
    assert rows == [0, 1, 2, 31, 32, 431]
    assert len(model.embed.weight) == sum(SIZES)
