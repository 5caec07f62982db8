"""The middle level: an optimizer's policy, meta-trained to make the words that come next more likely.

Every article is a task of ``learned_optim.meta_train``: its parameters are the differences from the static weights,
its batches the chunks of the article in order, its buffers the LSTM's state. The loss after an update is thus the loss
on the chunk that is read next, and that is the meta-loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from data import Article
from model import Weights
from read import Method, Reader
from torch import Tensor

from learned_optim import Policy, PolicyConfig
from learned_optim.meta_train import MetaTrainConfig, MetaTrainResult, meta_train
from learned_optim.rule.context import CONTEXT, DEFAULT_CONTEXT
from learned_optim.tasks import TaskFamily

#: Names of the parts of a reader's state.
STATE = ("h", "c", "before")


class Stretch:
    """A stretch of an article as a task: read it chunk by chunk, learning after each.

    Args:
        reader: model, weights that are learned, and length of the chunks.
        article: what is read.
        first: chunk that the stretch begins with; the LSTM begins it without memory.
    """

    def __init__(self, reader: Reader, article: Article, first: int = 0) -> None:
        self.name, self._reader, self.warm_start = article.title, reader, reader.warm
        self._chunks = [c for c in reader.chunks(article.tokens)[first:] if len(c) == reader.chunk + 1]
        self.length = len(self._chunks) - 1
        if self.length < 1:
            raise ValueError(f"article {article.title!r} has no two whole chunks from chunk {first} on")

    def init(self, rng: torch.Generator) -> tuple[Weights, Weights]:
        return self._reader.differences(), dict(zip(STATE, self._reader.model.start(), strict=True))

    def batches(self, rng: torch.Generator) -> Iterator[Tensor]:
        return itertools.cycle(self._chunks)

    def loss(self, params: Weights, buffers: Weights, batch: Tensor) -> Tensor:
        losses, state = self._reader.losses(params, batch, (buffers["h"], buffers["c"], buffers["before"]))
        buffers.update(zip(STATE, state, strict=True))
        return losses.mean()


def stretches(reader: Reader, articles: Sequence[Article], shortest: int = 8) -> TaskFamily:
    """Stretches that begin at an article's beginning, or half of the time anywhere in it."""
    shortest = min(shortest, max(len(a.tokens) for a in articles) // reader.chunk - 1)
    usable = [a for a in articles if len(a.tokens) // reader.chunk > shortest]
    if shortest < 1:
        raise ValueError(f"no article has two chunks of {reader.chunk} words")
    weights = torch.tensor([float(len(a.tokens)) for a in usable])

    def sample(rng: torch.Generator) -> Stretch:
        article = usable[int(torch.multinomial(weights, 1, generator=rng))]
        last = len(article.tokens) // reader.chunk - shortest
        anywhere = int(torch.randint(last, (), generator=rng))
        return Stretch(reader, article, anywhere if bool(torch.rand((), generator=rng) < 0.5) else 0)

    return TaskFamily("articles", "stretches of articles", "train", sample)


def base_policy(eps: float = 1e-8) -> Policy:
    """What meta-training starts from: close to the gradient over the rms known from training (Krause et al. 2018).

    Args:
        eps: added to the rms, in units of the gradient.

    All windows are constant: those that grow with the step would be as long as the training text from the start. The
    second moments hardly move, either: a rare word's would be many times larger after it was read once, and what a rare
    word's return teaches should not count less for that.
    """
    center = {"log_age": 13.8, "log_numel": 9.0, "log_rms_p": -6.5}
    scale = {"log_rms_p": 1.0, "log_numel": 3.0}
    return Policy(
        PolicyConfig(
            step_scale=1.0, momentum_weight=0.05, gradient_weight=0.8, hidden_weights=(0.05, 0.05, 0.05, 0.05),
            betas=(0.9, 0.99999), windows=(), rates=(0.5, 0.2, 0.06, 0.02), caution=0.1,
            amplitude_bound=4.0, gate_bound=8.0, eps=eps,
            context_center=tuple(center.get(name, CONTEXT[name].center) for name in DEFAULT_CONTEXT),
            context_scale=tuple(scale.get(name, CONTEXT[name].scale) for name in DEFAULT_CONTEXT),
        ),
        source="gradient over training rms",
    )  # fmt: skip


def learn(
    reader: Reader,
    articles: Sequence[Article],
    method: Method,
    *,
    outer_steps: int,
    out: Path | None = None,
    seed: int = 0,
    unroll_length: int = 20,
    meta_batch: int = 2,
    meta_lr: float = 0.02,
    stretch: int = 200,
) -> MetaTrainResult:
    """Meta-train on stretches of articles, from the tuned base policy of ``method``.

    Args:
        reader: with its gradients measured.
        articles: what the static weights have not seen.
        method: learning rate, decay and eps of the inner steps, and the policy to start from.
        outer_steps: updates of the meta-parameters.
        out: folder of the run.
        seed: of everything random.
        unroll_length: chunks that the meta-loss is back-propagated through.
        meta_batch: stretches that are read at a time.
        meta_lr: learning rate of the meta-parameters.
        stretch: chunks after which another stretch is begun.
    """
    start = method.policy or base_policy(method.eps * reader.gradient_rms)
    config = MetaTrainConfig(
        outer_steps=outer_steps, seed=seed, estimator="backprop", meta_loss="sum", meta_batch=meta_batch,
        unroll_length=unroll_length, checkpoint_segment=0, max_length=stretch, inner_lr=method.lr,
        inner_weight_decay=method.decay / method.lr, meta_lr=meta_lr, validate_every=0, save_every=25,
        backend=method.backend, threads=torch.get_num_threads(),
    )  # fmt: skip
    return meta_train(config, tasks=[stretches(reader, articles)], start=start, out=out, resume=out is not None)
