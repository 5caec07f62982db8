"""Training families whose parameters sit in large embeddings of which one batch touches few rows.

Users, items and words are as unequal as in practice: the r-th most frequent comes about ``1 / r`` as often as the
first, so that a few rows get a gradient at every step and most a handful in the whole run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Task, TaskFamily
from ..nets import tie
from ..objectives import classification
from ..sampling import Data, chance, choice, integer, log_int, log_uniform, run_length, spawn, uniform
from .synthetic import stream_task


def zipf_ranks(rng: torch.Generator, shape: tuple[int, ...], rows: int, exponent: float) -> Tensor:
    """Ranks int64 from 0 to ``rows - 1``, rank r with a probability close to ``(r + 1) ** -exponent``.

    By the inverse of the continuous distribution: no table of probabilities, whatever ``rows``.
    """
    u = torch.rand(shape, generator=rng, dtype=torch.float64)
    power = 1 - exponent
    whole = ((1 + u * ((rows + 1) ** power - 1)) ** (1 / power)) if abs(power) > 1e-6 else (rows + 1) ** u
    return (whole.long() - 1).clamp_(0, rows - 1)


class Shop:
    """Who takes which item: tastes in a few dimensions, popular items, active users.

    Users (or visits) look at ``SHOWN`` items by popularity and take one by taste. Rows are in random order.
    """

    SHOWN = 24

    def __init__(self, rng: torch.Generator, users: int, items: int) -> None:
        self.users, self.items = users, items
        self.user_skew, self.item_skew = uniform(rng, 0.3, 1.0), uniform(rng, 0.7, 1.2)
        self.factors, self.sharpness, self.make_rng = integer(rng, 3, 8), uniform(rng, 2.0, 5.0), spawn(rng)

    @functools.cached_property
    def world(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tastes of users ``[users, factors]`` and items ``[items, factors]``; the row of every rank, for both."""
        rng = self.make_rng()
        # Around a few types each, so that rows which are hardly ever seen resemble others.
        user_types, item_types = torch.randn(2, 12, self.factors, generator=rng).unbind(0)

        def tastes(types: Tensor, rows: int) -> Tensor:
            own = torch.randn(rows, self.factors, generator=rng)
            return types[torch.randint(len(types), (rows,), generator=rng)] + 0.4 * own

        user, item = tastes(user_types, self.users), tastes(item_types, self.items)
        return user, item, torch.randperm(self.users, generator=rng), torch.randperm(self.items, generator=rng)

    def draw_users(self, rng: torch.Generator, size: int) -> Tensor:
        return self.world[2][zipf_ranks(rng, (size,), self.users, self.user_skew)]

    def draw_items(self, rng: torch.Generator, shape: tuple[int, ...], skew: float = 1.0) -> Tensor:
        """Items by popularity, which ``skew`` < 1 flattens."""
        return self.world[3][zipf_ranks(rng, shape, self.items, skew * self.item_skew)]

    def take(self, rng: torch.Generator, taste: Tensor) -> Tensor:
        """One item ``[batch]`` for each of the tastes ``[batch, factors]``."""
        shown = self.draw_items(rng, (len(taste), self.SHOWN))
        appeal = self.sharpness * (self.world[1][shown] @ taste.unsqueeze(2)).squeeze(2) / self.factors**0.5
        chance_of_others = -torch.log(-torch.rand(shown.shape, generator=rng).clamp(1e-9, 1 - 1e-7).log())
        return shown.gather(1, (appeal + chance_of_others).argmax(1, keepdim=True)).squeeze(1)

    def visits(self, rng: torch.Generator, size: int, length: int) -> Tensor:
        """Items ``[size, length]`` taken one after the other; what was taken last changes the taste for the next."""
        taste = self.world[0][self.draw_users(rng, size)]
        taken = []
        for _ in range(length):
            taken.append(self.take(rng, taste))
            taste = 0.6 * taste + 0.8 * self.world[1][taken[-1]]
        return torch.stack(taken, 1)


class Scorer(nn.Module):
    """Scores ``[batch, candidates]`` of items for a context: users ``[batch, 1]``, or items seen ``[batch, time]``.

    Args:
        kind: ``"dot"``: product of user and item; ``"mlp"``: a network on user, item and their product;
            ``"two_tower"``: a network on either side, then the cosine; ``"pooled"``, ``"gru"``: the context is the
            items seen before, averaged or read in order.
        users, items: rows of the embeddings.
        width: columns of the embeddings.
        hidden: width of the networks.
        scale: deviation of the embeddings at the start.
        own_table: of ``"pooled"`` and ``"gru"``: items seen have another embedding than items scored.
    """

    def __init__(
        self, kind: str, users: int, items: int, width: int, hidden: int, scale: float, own_table: bool
    ) -> None:
        super().__init__()
        self.kind = kind
        self.item = nn.Embedding(items, width)
        self.bias = nn.Embedding(items, 1)
        sequence = kind in ("pooled", "gru")
        if sequence and not own_table:
            self.context = self.item
        else:
            self.context = nn.Embedding(items if sequence else users, width)
        for table in (self.item, self.bias, self.context):
            nn.init.normal_(table.weight, std=scale)
        if kind == "mlp":
            self.head = nn.Sequential(nn.Linear(3 * width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        elif kind == "two_tower":
            self.towers = nn.ModuleList(
                nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(2)
            )
        elif kind == "gru":
            self.reader = nn.GRU(width, hidden, batch_first=True)
            self.project = nn.Linear(hidden, width)
        elif kind == "pooled":
            self.project = nn.Linear(width, width)

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        seen, item = self.context(context), self.item(candidates)
        if self.kind == "gru":
            query = self.project(self.reader(seen)[0][:, -1])
        elif self.kind == "pooled":
            query = self.project(seen.mean(1))
        else:
            query = seen[:, 0]
        if self.kind == "mlp":
            user = query.unsqueeze(1).expand_as(item)
            score = self.head(torch.cat([user, item, user * item], 2)).squeeze(2)
        elif self.kind == "two_tower":
            user, item = F.normalize(self.towers[0](query), dim=1), F.normalize(self.towers[1](item), dim=2)
            score = 8.0 * (user.unsqueeze(1) * item).sum(2)
        else:
            score = (query.unsqueeze(1) * item).sum(2)
        return score + self.bias(candidates).squeeze(2)


def softmax_loss(module: nn.Module, batch: Data) -> Tensor:
    """Cross-entropy (nats) of the first candidate, which was taken, against the others, which were not."""
    scores = module(*batch)
    return -scores.log_softmax(1)[:, 0].mean()


def logistic_loss(module: nn.Module, batch: Data) -> Tensor:
    """Binary cross-entropy (nats) of "taken", true of the first candidate, which weighs as much as all others."""
    scores = module(*batch)
    return 0.5 * (F.softplus(-scores[:, 0]).mean() + F.softplus(scores[:, 1:]).mean())


def pairwise_loss(module: nn.Module, batch: Data) -> Tensor:
    """Bayesian personalised ranking (nats per pair): the first candidate should score above each of the others."""
    scores = module(*batch)
    return F.softplus(scores[:, 1:] - scores[:, :1]).mean()


def rating_loss(module: nn.Module, batch: Data) -> Tensor:
    """Mean squared error of ratings ``[batch]``."""
    context, candidates, ratings = batch
    return F.mse_loss(module(context, candidates).squeeze(1), ratings)


RANKING_LOSSES = (softmax_loss, logistic_loss, pairwise_loss)


def table_rows(rng: torch.Generator, width: int) -> int:
    """Rows of an embedding of ``width`` columns: 20 thousand to 1.3 million parameters, 100 thousand rows at most."""
    return min(100_000, log_int(rng, 20_000, 1_300_000) // (width + 1))


def sparse_recommender(rng: torch.Generator) -> Task:
    """Users take items by taste and popularity; a network ranks what was taken above sampled others, or rates.

    As in recommenders in use: implicit feedback with sampled negatives, or ratings on which users and items have
    biases of their own; factors, networks on embeddings, two towers, the next item of a visit. Fresh examples.
    """
    kind = choice(rng, ("dot", "mlp", "two_tower", "pooled", "gru"))
    sequence = kind in ("pooled", "gru")
    width = log_int(rng, 8, 64)
    rows = table_rows(rng, width)
    users = rows // 2 if sequence else max(200, min(rows - 200, int(rows * uniform(rng, 0.2, 0.9))))
    items = users if sequence else rows - users
    shop, own_table = Shop(rng, users, items), chance(rng, 0.5)
    hidden, scale = log_int(rng, 16, 48), log_uniform(rng, 0.02, 0.3)
    rated = not sequence and chance(rng, 0.25)
    others, flat = log_int(rng, 2, 12), choice(rng, (0.3, 0.75, 1.0))
    time, noise = integer(rng, 4, 8), uniform(rng, 0.3, 0.8)
    batch_size = log_int(rng, 64, 256) if sequence else log_int(rng, 128, 1024)

    def draw(batch_rng: torch.Generator, size: int) -> Data:
        if sequence:
            taken = shop.visits(batch_rng, size, time + 1)
            context, last = taken[:, :-1], taken[:, -1:]
        else:
            context = shop.draw_users(batch_rng, size).unsqueeze(1)
            last = shop.take(batch_rng, shop.world[0][context[:, 0]]).unsqueeze(1)
        if not rated:
            return context, torch.cat([last, shop.draw_items(batch_rng, (size, others), flat)], 1)
        user, item = shop.world[0][context[:, 0]], shop.world[1][last[:, 0]]
        # The first factor of either side counts as its bias too: generous users, good items.
        rating = (user * item).sum(1) / shop.factors**0.5 + 0.7 * user[:, 0] + item[:, 0]
        return context, last, rating + noise * torch.randn(size, generator=batch_rng)

    return stream_task(
        rng,
        lambda: Scorer(kind, users, items, width, hidden, scale, own_table),
        draw,
        rating_loss if rated else choice(rng, RANKING_LOSSES),
        batch_size=batch_size,
        length=run_length(rng, 250, 800, 60 * rows * width),
    )


class Corpus:
    """Documents about topics: of every document's words some are everybody's, the others those of its two topics."""

    def __init__(self, rng: torch.Generator, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.topics, self.common = log_int(rng, 6, 24), uniform(rng, 0.1, 0.4)
        self.exponent, self.make_rng = uniform(rng, 1.0, 1.3), spawn(rng)

    @functools.cached_property
    def words(self) -> Tensor:
        """The word of every rank, ``[1 + topics, vocabulary]``; row 0 is the common language."""
        rng = self.make_rng()
        return torch.stack([torch.randperm(self.vocabulary, generator=rng) for _ in range(self.topics + 1)])

    def draw(self, rng: torch.Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Words ``[size, length]`` and the first, larger topic ``[size]`` of every document."""
        first, second = torch.randint(self.topics, (2, size), generator=rng).unbind(0)
        dice = torch.rand(size, length, generator=rng)
        topic = torch.where(dice < self.common + 0.7 * (1 - self.common), first[:, None], second[:, None]) + 1
        topic = torch.where(dice < self.common, 0, topic)
        return self.words[topic, zipf_ranks(rng, (size, length), self.vocabulary, self.exponent)], first


class BagOfWords(nn.Module):
    """The mean embedding of words ``[batch, time]``, perhaps through a network, to ``[batch, outputs]``.

    Without ``hidden`` and with as many outputs as words the output layer may be ``tied`` to the embedding.
    """

    def __init__(self, vocabulary: int, width: int, outputs: int, hidden: int, scale: float, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=scale)
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) if hidden else None
        self.output = nn.Linear(width, outputs)
        tie(self.output, self.embed, tied)

    def forward(self, tokens: Tensor) -> Tensor:
        bag = self.embed(tokens).mean(1)
        return self.output(bag if self.hidden is None else self.hidden(bag))


def large_embeddings(rng: torch.Generator) -> Task:
    """Word vectors from invented documents: classify a bag of words, guess the missing word, tell neighbours apart.

    The three classical jobs of large embeddings: fastText's, word2vec's CBOW with a full softmax (tied or untied),
    and skip-gram with sampled negatives. Topics share words, so that frequent words teach what rare ones mean.
    """
    kind, width = choice(rng, ("classify", "cbow", "cbow", "skip_gram")), log_int(rng, 8, 64)
    tied = kind == "cbow" and chance(rng, 0.5)
    rows = table_rows(rng, width)
    vocabulary = max(500, min(rows, {"classify": 100_000, "cbow": 4000, "skip_gram": 8000}[kind]))
    corpus, scale = Corpus(rng, vocabulary), log_uniform(rng, 0.05, 0.5)
    time = log_int(rng, 4, 12) if kind == "classify" else log_int(rng, 8, 32)
    hidden, classes, wrong = choice(rng, (0, 32)), integer(rng, 4, 20), uniform(rng, 0.0, 0.2)
    others, make_rng = log_int(rng, 2, 12), spawn(rng)
    batch_size = log_int(rng, 64, 256) if kind == "cbow" else log_int(rng, 256, 1024)

    def bag(batch_rng: torch.Generator, size: int) -> Data:
        words, topic = corpus.draw(batch_rng, size, time)
        classes_of_topics = torch.randint(classes, (corpus.topics,), generator=make_rng())
        guess = torch.randint(classes, (size,), generator=batch_rng)
        return words, torch.where(torch.rand(size, generator=batch_rng) < wrong, guess, classes_of_topics[topic])

    def missing_word(batch_rng: torch.Generator, size: int) -> Data:
        words, _ = corpus.draw(batch_rng, size, time + 1)
        return words[:, 1:], words[:, 0]

    def neighbours(batch_rng: torch.Generator, size: int) -> Data:
        words, _ = corpus.draw(batch_rng, size, 2)
        # Of the common language only: what belongs together are the words of a topic.
        other = corpus.words[0, zipf_ranks(batch_rng, (size, others), vocabulary, 0.75 * corpus.exponent)]
        return words[:, :1], torch.cat([words[:, 1:], other], 1)

    def make() -> nn.Module:
        if kind == "skip_gram":
            return Scorer("dot", vocabulary, vocabulary, width, 0, scale, own_table=True)
        return BagOfWords(vocabulary, width, vocabulary if kind == "cbow" else classes, hidden, scale, tied)

    draws: dict[str, Callable[[torch.Generator, int], Data]] = {"classify": bag, "cbow": missing_word}
    work = batch_size * width * vocabulary if kind == "cbow" else 60 * vocabulary * width
    return stream_task(
        rng,
        make,
        draws.get(kind, neighbours),
        logistic_loss if kind == "skip_gram" else classification,
        batch_size=batch_size,
        length=run_length(rng, 250, 800, work),
    )


FAMILIES = (
    TaskFamily("sparse_recommender", "recommenders with rarely hit rows", "train", sparse_recommender),
    TaskFamily("large_embeddings", "word vectors, tied and untied, mostly rare words", "train", large_embeddings),
)
