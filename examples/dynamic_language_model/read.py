"""Reading an article: predict a chunk of words, then learn from it, then predict the next one."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from data import Article
from model import CHOICES, LanguageModel, State, Weights, detached, with_start
from torch import Tensor

from learned_optim import LearnedOptimizer, Policy
from learned_optim.tasks.warm import WarmStart

#: Second moments count as gathered over this many steps: no bias correction is left.
STEPS_BEFORE = 1_000_000


@dataclasses.dataclass(frozen=True)
class Method:
    """How to learn while reading.

    Args:
        kind: ``sgd``, ``rms`` (Krause et al. 2018), ``adam`` or ``learned``; ``static`` learns nothing, and
            ``forgetful`` does not even carry the LSTM's state from one chunk to the next.
        lr: learning rate.
        decay: share of the way back to the static weights that every step takes.
        eps: added to the root of the second moments, as a multiple of the gradient's rms over the training text.
        memory: factor of the learning rate for the memory; ``learned`` has the reader's ``strength``.
        clip: bound of the gradient's norm, in units of its root mean square over the training text. Where text repeats
            itself within a chunk, steps would run away otherwise.
        policy: of ``learned``.
        backend: of ``learned``.
    """

    kind: str
    lr: float = 0.0
    decay: float = 0.0
    eps: float = 0.0
    memory: float = 1.0
    clip: float = 2.0
    policy: Policy | None = None
    backend: Literal["compiled", "eager"] = "compiled"

    def settings(self) -> dict[str, float]:
        return {"lr": self.lr, "decay": self.decay, "eps": self.eps, "memory": self.memory, "clip": self.clip}


class Reading(NamedTuple):
    """What came of reading an article."""

    losses: Tensor  #: [words], nats, each before anything was learned from its chunk
    updates: dict[str, list[float]]  #: rms of every step's change over the rms of the weights after it, by tensor


class Reader:
    """A language model with all that reading needs.

    Args:
        model: the static level; never changed.
        choice: key of ``CHOICES``: which weights are learned while reading.
        chunk: words that are predicted before they are learned from.
        strength: what differences in the memory count; to an optimizer with a single learning rate what a learning rate
            of its own is to the others.
    """

    def __init__(self, model: LanguageModel, choice: str = "all", chunk: int = 20, strength: float = 1.0) -> None:
        if choice not in CHOICES:
            raise ValueError(f"unknown choice of weights {choice!r}; known are {', '.join(CHOICES)}")
        if chunk < 1:
            raise ValueError(f"chunk must be 1 word or more, found {chunk}")
        self.model, self.chunk, self.strength = model, chunk, strength
        self.names = CHOICES[choice]
        self.static = model.weights()
        if "memory" not in self.names:
            del self.static["memory"]
        self.warm, self.gradient_norm = WarmStart({}, STEPS_BEFORE), math.inf

    def measure(self, articles: Sequence[Article]) -> None:
        """Gather the mean square of the gradient of a chunk's loss at the static weights; all methods share it."""
        total = self.differences()
        count = 0
        for article in articles:
            state = self.model.start()
            for tokens in self.chunks(article.tokens):
                difference = {name: d.requires_grad_() for name, d in self.differences().items()}
                losses, state = self.losses(difference, tokens, state)
                for t, g in zip(
                    total.values(), torch.autograd.grad(losses.mean(), list(difference.values())), strict=True
                ):
                    t.addcmul_(g, g)
                count += 1
        if count == 0:
            raise ValueError("no articles to measure the gradients on")
        self._know({name: t / count for name, t in total.items()})

    def _know(self, second_moments: Weights) -> None:
        self.warm = WarmStart(second_moments, STEPS_BEFORE)
        self.gradient_norm = math.sqrt(sum(float(v.sum()) for v in second_moments.values()))

    def strengthened(self, strength: float) -> Reader:
        """The same with another strength, and what gradients were measured to be then."""
        other, moments = copy.copy(self), dict(self.warm.second_moments)
        other.strength = strength
        moments["memory"] = moments["memory"] * (strength / self.strength) ** 2
        other._know(moments)
        return other

    @property
    def gradient_rms(self) -> float:
        """Of all learned weights together."""
        return self.gradient_norm / math.sqrt(sum(v.numel() for v in self.warm.second_moments.values()))

    def differences(self) -> Weights:
        """Zero differences from the static weights, of those that are learned."""
        return {name: torch.zeros_like(self.static[name]) for name in self.names}

    def chunks(self, tokens: Tensor) -> list[Tensor]:
        """[n] -> pieces of chunk + 1 tokens, each beginning with the one that the last ended with."""
        whole = with_start(tokens)
        return [whole[i : i + self.chunk + 1] for i in range(0, len(tokens), self.chunk)]

    def losses(self, difference: Weights, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Losses of a chunk's words, [chunk], with the static weights plus ``difference``."""
        weights = dict(self.static)
        for name, d in difference.items():
            weights[name] = torch.add(self.static[name], d, alpha=self.strength if name == "memory" else 1.0)
        losses, state = self.model.losses(weights, tokens[:, None], state)
        return losses[:, 0], detached(state)

    def read(self, tokens: Tensor, method: Method, watch: bool = False) -> Reading:
        """Read an article; nothing of it is left afterwards.

        Args:
            tokens: [words].
            method: how to learn from it.
            watch: take down the sizes of the updates.
        """
        chunks, state = self.chunks(tokens), self.model.start()
        if method.kind in ("static", "forgetful"):
            return Reading(self._static(chunks, state, method.kind == "forgetful"), {})
        params = {name: d.requires_grad_() for name, d in self.differences().items()}
        optimizer = self.optimizer(method, params)
        losses: list[Tensor] = []
        updates: dict[str, list[float]] = {name: [] for name in params} if watch else {}
        for number, chunk in enumerate(chunks):
            if number == len(chunks) - 1:
                with torch.no_grad():
                    losses.append(self.losses(params, chunk, state)[0])
                break
            of_chunk, state = self.losses(params, chunk, state)
            losses.append(of_chunk.detach())
            grads = torch.autograd.grad(of_chunk.mean(), list(params.values()))
            for p, g in zip(params.values(), grads, strict=True):
                p.grad = g
            torch.nn.utils.clip_grad_norm_(params.values(), method.clip * self.gradient_norm)
            before = {name: p.detach().clone() for name, p in params.items()} if watch else {}
            optimizer.step()
            for name, old in before.items():
                now = params[name].detach()
                updates[name].append(float(_rms(now - old) / _rms(self.static[name] + now).clamp(min=1e-20)))
        return Reading(torch.cat(losses), updates)

    def _static(self, chunks: list[Tensor], state: State, forgetful: bool) -> Tensor:
        losses = []
        weights = {name: w for name, w in self.static.items() if name != "memory"}  # it is zero
        with torch.no_grad():
            for chunk in chunks:
                of_chunk, after = self.model.losses(weights, chunk[:, None], state)
                losses.append(of_chunk[:, 0])
                state = state if forgetful else after
        return torch.cat(losses)

    def optimizer(self, method: Method, params: Weights) -> torch.optim.Optimizer:
        """A fresh optimizer over differences from the static weights."""
        lr, values = method.lr, list(params.values())
        groups = [{"params": [p], "lr": lr * (method.memory if n == "memory" else 1.0)} for n, p in params.items()]
        if method.kind == "sgd":
            return torch.optim.SGD(groups, lr=lr, weight_decay=method.decay / lr)
        eps = method.eps * self.gradient_rms
        if method.kind == "rms":
            return RmsDynamic(groups, list(self.warm.second_moments.values()), lr, method.decay, eps)
        kwargs: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": method.decay / lr}
        if method.kind == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, **kwargs, foreach=False, fused=True)
        elif method.kind == "learned":
            optimizer = LearnedOptimizer(values, **kwargs, policy=method.policy or "default", backend=method.backend)
        else:
            raise ValueError(f"unknown way of reading {method.kind!r}")
        self.warm.apply(optimizer, params)
        return optimizer


class RmsDynamic(torch.optim.Optimizer):
    """Dynamic evaluation with the gradient, and the way back, scaled by training statistics (Krause et al. 2018).

        difference -= lr g / (rms + eps) + difference * min(decay rms / mean(rms), 1)

    Args:
        params: differences from the static weights, or groups of one each.
        second_moments: mean squares of the gradient, one tensor per parameter.
        lr: learning rate.
        decay: mean share of the way back that every step takes.
        eps: in units of the gradient.
    """

    def __init__(
        self, params: Sequence[Any], second_moments: Sequence[Tensor], lr: float, decay: float, eps: float
    ) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})
        rms = [v.sqrt() for v in second_moments]
        mean = float(torch.cat([r.flatten() for r in rms]).mean())
        self.inverse = [1.0 / (r + max(eps, 1e-20)) for r in rms]
        self.relative = [r / max(mean, 1e-20) for r in rms]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        places = [(group, p) for group in self.param_groups for p in group["params"]]
        for (group, p), inverse, relative in zip(places, self.inverse, self.relative, strict=True):
            if group["decay"]:
                p.addcmul_(p, (relative * group["decay"]).clamp_(max=1.0), value=-1.0)
            p.addcmul_(p.grad, inverse, value=-group["lr"])


def cache_losses(losses: Tensor, tokens: Tensor, weight: float, memory: float) -> Tensor:
    """Losses of a model mixed with a unigram cache: the share of each word among the words before, recent ones more.

    Args:
        losses: the model's own, [words].
        tokens: [words].
        weight: of the cache in the mixture, once it is full; it grows with the words read so far.
        memory: words after which an occurrence counts e times less.
    """
    n = len(tokens)
    age = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    counts = torch.where(age > 0, torch.exp(-(age.clamp(min=1) - 1) / memory), torch.zeros(()))
    total = counts.sum(1)
    share = (counts * (tokens[:, None] == tokens[None, :])).sum(1) / total.clamp(min=1e-9)
    # A cache of a few words says little.
    mix = weight * total / (total + 20.0)
    return -((1.0 - mix) * (-losses).exp() + mix * share).clamp(min=1e-12).log()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
