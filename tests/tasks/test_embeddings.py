"""Families with large, rarely hit embeddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.embeddings import (
    BagOfWords,
    Corpus,
    Scorer,
    Shop,
    logistic_loss,
    pairwise_loss,
    softmax_loss,
    zipf_ranks,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.3])
def test_frequencies_fall_with_rank_as_asked(exponent):
    ranks = zipf_ranks(seeded(0), (200_000,), 1000, exponent)
    assert int(ranks.min()) >= 0
    assert int(ranks.max()) < 1000
    counts = torch.bincount(ranks, minlength=1000).double()
    # Away from the first ranks, where the sum and the integral differ.
    ratio = counts[20:40].sum() / counts[200:400].sum()
    expected = (torch.arange(21, 41) ** -exponent).sum() / (torch.arange(201, 401) ** -exponent).sum()
    assert float(ratio) == pytest.approx(float(expected), rel=0.08)


def test_ranking_losses_are_the_ones_of_torch():
    scores = torch.randn(5, 4, generator=seeded(0))
    batch = (scores, None)

    def module(context, _):
        return context

    first = torch.zeros(5, dtype=torch.int64)
    torch.testing.assert_close(softmax_loss(module, batch), F.cross_entropy(scores, first))  # type: ignore[arg-type]
    bce = F.binary_cross_entropy_with_logits
    taken, others = bce(scores[:, 0], torch.ones(5)), bce(scores[:, 1:], torch.zeros(5, 3))
    torch.testing.assert_close(logistic_loss(module, batch), (taken + others) / 2)  # type: ignore[arg-type]
    better = -F.logsigmoid(scores[:, :1] - scores[:, 1:]).mean()
    torch.testing.assert_close(pairwise_loss(module, batch), better)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dot", "mlp", "two_tower", "pooled", "gru"])
def test_only_rows_of_the_batch_get_a_gradient(kind):
    model = Scorer(kind, 50, 60, 8, 16, 0.1, own_table=True)
    context, candidates = torch.tensor([[3, 4], [5, 4]]), torch.tensor([[7, 8, 9], [9, 1, 2]])
    context = context if kind in ("pooled", "gru") else context[:, :1]
    softmax_loss(model, (context, candidates)).backward()
    for table, used in ((model.item, candidates), (model.context, context)):
        assert table.weight.grad is not None
        hit = table.weight.grad.abs().sum(1).nonzero().squeeze(1).tolist()
        assert hit == used.unique().tolist()


def test_what_is_taken_fits_the_taste_better_than_what_is_popular():
    shop = Shop(seeded(0), 500, 400)
    users = shop.draw_users(seeded(1), 4000)
    taste = shop.world[0][users]
    taken, shown = shop.take(seeded(2), taste), shop.draw_items(seeded(3), (4000,))
    liking = [(taste * shop.world[1][items]).sum(1).mean() for items in (taken, shown)]
    assert liking[0] > liking[1] + 0.5


def test_words_of_a_document_tell_its_topic():
    corpus = Corpus(seeded(0), 1000)
    words, topic = corpus.draw(seeded(1), 6000, 20)

    def profile(chosen: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(words[chosen].flatten(), minlength=1000).double()
        return counts / counts.sum()

    first, again, other = (
        profile((topic == t) & (torch.arange(6000) % 2 == half)) for t, half in ((0, 0), (0, 1), (1, 0))
    )
    assert (first - again).abs().sum() < 0.6 * (first - other).abs().sum()


def test_a_tied_bag_has_one_table_and_its_gradient_is_dense():
    for tied in (False, True):
        model = BagOfWords(100, 8, 100, 0, 0.1, tied)
        F.cross_entropy(model(torch.tensor([[1, 2]])), torch.tensor([3])).backward()
        assert len(list(model.parameters())) == (2 if tied else 3)
        assert model.embed.weight.grad is not None
        rows = int((model.embed.weight.grad.abs().sum(1) > 0).sum())
        assert rows == (100 if tied else 2)


@pytest.mark.parametrize("name", ["sparse_recommender", "large_embeddings"])
def test_most_parameters_are_rows_that_a_batch_leaves_alone(name):
    idle = []
    for seed in range(8):
        task = FAMILIES[name].task(seed)
        params, buffers = task.init(seeded(0))
        leaves = {k: p.requires_grad_() for k, p in params.items()}
        grads = torch.autograd.grad(task.loss(leaves, buffers, next(task.batches(seeded(1)))), list(leaves.values()))
        idle.append(sum(int((g == 0).sum()) for g in grads) / sum(g.numel() for g in grads))
    assert sorted(idle)[4] > 0.4
