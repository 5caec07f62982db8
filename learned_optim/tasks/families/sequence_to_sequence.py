"""Training families that turn one sequence of tokens into another: encoders and decoders with attention.

Token 0 pads, token 1 begins (and ends) a sentence. Lengths vary inside tensors of one shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import LossFn, Task, TaskFamily
from ..nets import Attention, Residual, Style, initialise, norm_layer, random_style, transformer_blocks
from ..sampling import Data, chance, choice, integer, log_int, run_length, spawn, uniform
from .embeddings import zipf_ranks
from .synthetic import stream_task

PAD, EDGE, FIRST = 0, 1, 2


def close_gaps(tokens: Tensor) -> Tensor:
    """Moves the padding of ``[batch, time]`` behind the tokens, whose order stays."""
    return tokens.gather(1, (tokens == PAD).long().argsort(stable=True, dim=1))


class Language:
    """A way to make pairs ``(source, target)``, ``[batch, time]`` each, from tokens below ``source`` and ``target``.

    Attributes:
        sizes: vocabularies of source and target.
        lengths: times of source and target, without the edge token.
    """

    sizes: tuple[int, int]
    lengths: tuple[int, int]

    def draw(self, rng: torch.Generator, size: int) -> Data:
        raise NotImplementedError


class Translation(Language):
    """Phrases of words by category; the other language orders phrases and words otherwise.

    A word's translation depends on the class of its phrase's head where it agrees with it, and is one of two synonyms
    in part of the cases, which nobody can foresee.
    """

    def __init__(self, rng: torch.Generator) -> None:
        self.phrases, self.words, self.categories = integer(rng, 2, 4), integer(rng, 2, 3), integer(rng, 4, 8)
        self.lexicon, self.synonyms = log_int(rng, 12, 150), uniform(rng, 0.0, 0.25)
        total = self.categories * self.lexicon
        self.sizes = FIRST + 2 + total, FIRST + 2 * total
        self.lengths = 1 + self.phrases * self.words, self.phrases * self.words
        self.make_rng = spawn(rng)

    @functools.cached_property
    def grammar(self) -> tuple[Tensor, ...]:
        """Order of phrases by mood, of words and categories by kind of phrase; dictionary by class; dropped words."""
        rng = self.make_rng()

        def orders(n: int, count: int) -> Tensor:
            return torch.rand(count, n, generator=rng).argsort(1)

        kinds = 6
        categories = torch.randint(self.categories, (kinds, self.words), generator=rng)
        total = self.categories * self.lexicon
        # Two forms per word; those of categories without agreement are the same.
        forms = torch.randperm(2 * total, generator=rng).view(total, 2) + FIRST
        agrees = (torch.rand(self.categories, generator=rng) < 0.5).repeat_interleave(self.lexicon)
        forms = torch.where(agrees[:, None], forms, forms[:, :1])
        dropped = torch.rand(kinds, self.words, generator=rng) < 0.15
        dropped[:, 0] = False
        return orders(self.phrases, 2), orders(self.words, kinds), categories, forms, dropped

    def draw(self, rng: torch.Generator, size: int) -> Data:
        phrase_order, word_order, categories, forms, dropped = self.grammar
        mood = torch.randint(2, (size,), generator=rng)
        kind = torch.randint(len(word_order), (size, self.phrases), generator=rng)
        rank = zipf_ranks(rng, (size, self.phrases, self.words), self.lexicon, 0.8)
        word = categories[kind] * self.lexicon + rank
        used = torch.rand(size, self.phrases, generator=rng) < 0.85
        used[:, 0] = True
        head = word[:, :, :1] % 2  # the class of a word: whether its number is odd
        synonym = torch.rand(word.shape, generator=rng) < self.synonyms
        target = forms[word, head.expand_as(word) ^ synonym.long()].masked_fill(dropped[kind], PAD)
        target = target.gather(2, word_order[kind]).masked_fill(~used[:, :, None], PAD)
        target = target.gather(1, phrase_order[mood][:, :, None].expand_as(target)).flatten(1)
        source = (word + FIRST + 2).masked_fill(~used[:, :, None], PAD).flatten(1)
        return close_gaps(torch.cat([mood[:, None] + FIRST, source], 1)), close_gaps(target)


class NumberNames(Language):
    """Numbers in digits become words in an invented system of counting, or the words digits.

    Groups of digits have a unit word; within a group digits have names by place, some pairs an irregular one
    ("twelve"), zeros none; the smaller digit may come first ("fünfundzwanzig").
    """

    def __init__(self, rng: torch.Generator) -> None:
        self.group, self.groups, self.base = integer(rng, 2, 3), integer(rng, 2, 3), choice(rng, (8, 10, 12, 16))
        self.swapped, self.backward = chance(rng, 0.5), chance(rng, 0.4)
        digits, names = self.group * self.groups, self.group * self.base + self.base**2 + self.groups
        self.lengths = digits, digits + self.groups
        self.sizes = FIRST + self.base, FIRST + names
        if self.backward:
            self.lengths = self.lengths[1], self.lengths[0]
            self.sizes = self.sizes[1], self.sizes[0]
        self.irregular = uniform(rng, 0.1, 0.6)
        self.make_rng = spawn(rng)

    def draw(self, rng: torch.Generator, size: int) -> Data:
        n, base = self.group * self.groups, self.base
        digit = torch.randint(base, (size, n), generator=rng)
        digit = torch.where(torch.arange(n) < torch.randint(n, (size, 1), generator=rng), 0, digit)
        digit[:, -1] += (digit == 0).all(1)  # zero has no name
        leading = (digit != 0).cumsum(1) == 0
        place = torch.arange(n) % self.group
        names = (FIRST + place * base + digit).masked_fill(digit == 0, PAD).view(size, self.groups, self.group)
        # The last two digits of a group as one word, for some pairs.
        high, low = digit.view(size, self.groups, self.group)[:, :, -2:].unbind(2)
        pair = high * base + low
        irregular = torch.rand(base * base, generator=self.make_rng())[pair] < self.irregular
        irregular &= (high > 0) & (low > 0)
        first, second = names[:, :, -2], names[:, :, -1]
        if self.swapped:
            first, second = second, first
        first = torch.where(irregular, FIRST + self.group * base + pair, first)
        second = second.masked_fill(irregular, PAD)
        silent = (digit.view(size, self.groups, self.group) == 0).all(2, keepdim=True)
        unit = (self.sizes[0 if self.backward else 1] - self.groups + torch.arange(self.groups)).view(1, -1, 1)
        unit = unit.expand(size, -1, -1).masked_fill(silent, PAD)
        words = torch.cat([names[:, :, :-2], first.unsqueeze(2), second.unsqueeze(2), unit], 2).flatten(1)
        numerals = (digit + FIRST).masked_fill(leading, PAD)
        pair_of = close_gaps(numerals), close_gaps(words)
        return pair_of[::-1] if self.backward else pair_of


class Rewriting(Language):
    """Strings of letters through two or three of: a cipher whose shift each letter sets for the next, reversal,
    rotation by the first letter, doubling of some letters and dropping of others, exchange of neighbours, sorting."""

    RULES = ("cipher", "reverse", "rotate", "double", "drop", "exchange", "sort")

    def __init__(self, rng: torch.Generator) -> None:
        self.letters, self.time = log_int(rng, 6, 40), integer(rng, 6, 14)
        names = list(self.RULES)
        self.rules = [names.pop(integer(rng, 0, len(names) - 1)) for _ in range(integer(rng, 2, 3))]
        self.sizes = FIRST + self.letters, FIRST + self.letters
        self.lengths = self.time, self.time * (2 if "double" in self.rules else 1)
        self.make_rng = spawn(rng)

    def draw(self, rng: torch.Generator, size: int) -> Data:
        letters = torch.randint(self.letters, (size, self.time), generator=rng)
        length = torch.randint(max(3, self.time // 2), self.time + 1, (size, 1), generator=rng)
        inside = torch.arange(self.time) < length
        source = (letters + FIRST).masked_fill(~inside, PAD)
        target = source
        for i, rule in enumerate(self.rules):
            target = self._apply(rule, target, torch.Generator().manual_seed(self.make_rng().initial_seed() + i))
        return source, F.pad(target, (0, self.lengths[1] - target.shape[1]))

    def _apply(self, rule: str, tokens: Tensor, rule_rng: torch.Generator) -> Tensor:
        marked = torch.rand(FIRST + self.letters, generator=rule_rng) < 0.3
        count = (tokens != PAD).sum(1, keepdim=True).clamp(min=1)
        at = torch.arange(tokens.shape[1]).expand_as(tokens)
        if rule == "cipher":
            shift = torch.randint(self.letters, (FIRST + self.letters,), generator=rule_rng)
            before = F.pad(tokens[:, :-1], (1, 0))
            return torch.where(tokens == PAD, PAD, FIRST + (tokens - FIRST + shift[before]) % self.letters)
        if rule in ("reverse", "rotate"):
            turned = count - 1 - at if rule == "reverse" else (at + tokens[:, :1]) % count
            return tokens.gather(1, torch.where(at < count, turned, at))
        if rule == "double":
            again = tokens.masked_fill(~marked[tokens], PAD)
            return close_gaps(torch.stack([tokens, again], 2).flatten(1))
        if rule == "drop":
            return close_gaps(tokens.masked_fill(marked[tokens] & (at > 0), PAD))
        if rule == "exchange":
            other = at ^ 1
            return tokens.gather(1, torch.where(torch.maximum(at, other) < count, other, at))
        return tokens.masked_fill(tokens == PAD, 10**6).sort(1).values.masked_fill(at >= count, PAD)


class RecurrentTranslator(nn.Module):
    """GRU encoder and decoder with attention between them: source and target ``[batch, time]`` to logits.

    Args:
        sizes: vocabularies of source and target.
        embedding, hidden: widths.
        attention: ``"dot"``, ``"general"`` (a matrix between) or ``"additive"`` (Bahdanau's network).
        both_ways: a second encoder reads backward.
    """

    def __init__(self, sizes: tuple[int, int], embedding: int, hidden: int, attention: str, both_ways: bool) -> None:
        super().__init__()
        self.attention = attention
        self.source, self.target = nn.Embedding(sizes[0], embedding), nn.Embedding(sizes[1], embedding)
        # Two layers rather than a bidirectional one: those are not vectorized.
        self.encoders = nn.ModuleList(nn.GRU(embedding, hidden, batch_first=True) for _ in range(2 if both_ways else 1))
        self.decoder = nn.GRU(embedding, hidden, batch_first=True)
        memory = hidden * len(self.encoders)
        self.bridge, self.keys = nn.Linear(memory, hidden), nn.Linear(memory, hidden, bias=False)
        if attention != "dot":
            self.queries = nn.Linear(hidden, hidden, bias=False)
        if attention == "additive":
            self.energy = nn.Linear(hidden, 1, bias=False)
        self.combine, self.output = nn.Linear(hidden + memory, hidden), nn.Linear(hidden, sizes[1])

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        x = self.source(source)
        states = [self.encoders[0](x)[0]]
        if len(self.encoders) > 1:
            states.append(self.encoders[1](x.flip(1))[0].flip(1))
        memory = torch.cat(states, 2)
        begin = self.bridge(memory.mean(1)).tanh().unsqueeze(0)
        state, keys = self.decoder(self.target(given), begin)[0], self.keys(memory)
        query = state if self.attention == "dot" else self.queries(state)
        if self.attention == "additive":
            scores = self.energy((query.unsqueeze(2) + keys.unsqueeze(1)).tanh()).squeeze(3)
        else:
            scores = query @ keys.transpose(1, 2) * query.shape[2] ** -0.5
        weights = scores.masked_fill((source == PAD).unsqueeze(1), -math.inf).softmax(2)
        return self.output(self.combine(torch.cat([state, weights @ memory], 2)).tanh())


class DecoderBlock(nn.Module):
    """Pre-norm causal self-attention, attention to the source's ``memory`` (padding masked), and a network."""

    def __init__(self, width: int, heads: int, style: Style) -> None:
        super().__init__()
        norm = "rms" if style.norm == "rms" else "layer"
        self.heads = heads
        self.own = Residual(nn.Sequential(*norm_layer(norm, width), Attention(width, heads, causal=True)))
        self.query = nn.Sequential(*norm_layer(norm, width), nn.Linear(width, width))
        self.memory, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        hidden = nn.Sequential(nn.Linear(width, 4 * width), style.act(), nn.Linear(4 * width, width))
        self.network = Residual(nn.Sequential(*norm_layer(norm, width), hidden))

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        x = self.own(x)
        batch, time, width = x.shape
        size = width // self.heads
        q = self.query(x).view(batch, time, self.heads, size).transpose(1, 2)
        k, v = self.memory(memory).view(batch, -1, 2, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * size**-0.5).masked_fill(padding[:, None, None], -math.inf).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, time, width))
        return self.network(x)


class Transformer(nn.Module):
    """Encoder-decoder transformer with learned positions: source and target ``[batch, time]`` to logits."""

    def __init__(
        self, sizes: tuple[int, int], lengths: tuple[int, int], width: int, depths: tuple[int, int], heads: int,
        style: Style,
    ) -> None:  # fmt: skip
        super().__init__()
        self.source, self.target = (nn.Embedding(size, width) for size in sizes)
        for table in (self.source, self.target):
            nn.init.normal_(table.weight, std=width**-0.5)
        self.positions = nn.ParameterList(nn.Parameter(0.1 * torch.randn(time, width)) for time in lengths)
        self.encoder = transformer_blocks(width, depths[0], heads, style, causal=False)
        self.decoder = nn.ModuleList(DecoderBlock(width, heads, style) for _ in range(depths[1]))
        self.norm, self.output = nn.Sequential(*norm_layer("layer", width)), nn.Linear(width, sizes[1])

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        memory = self.encoder(self.source(source) + self.positions[0])
        x, padding = self.target(given) + self.positions[1], source == PAD
        for block in self.decoder:
            x = block(x, memory, padding)
        return self.output(self.norm(x))


def translation_loss(smoothing: float) -> LossFn:
    """Cross-entropy (nats per token, edge included, padding not) of ``(source, given, target)``."""

    def loss(module: nn.Module, batch: Data) -> Tensor:
        source, given, target = batch
        log_p = module(source, given).log_softmax(2)
        cost = -(1 - smoothing) * log_p.gather(2, target.unsqueeze(2)).squeeze(2) - smoothing * log_p.mean(2)
        counted = (target != PAD).to(cost.dtype)
        return (cost * counted).sum() / counted.sum()

    return loss


def sequence_task(
    rng: torch.Generator, make: Callable[[Language, tuple[int, int]], nn.Module], batch_size: int, work: float
) -> Task:
    """A task whose pairs are fresh at every step; ``work`` is that of one token of one example in multiply-adds.

    The pairs are translations between two invented grammars (half of the tasks), names of numbers, or rewritten
    strings: rules that attention has to find, with words that are rare, irregular or ambiguous as in translation.
    """
    language = choice(rng, (Translation, Translation, NumberNames, Rewriting))(rng)
    smoothing = choice(rng, (0.0, 0.0, 0.05, 0.1))
    lengths = language.lengths[0], language.lengths[1] + 1

    def draw(batch_rng: torch.Generator, size: int) -> Data:
        source, target = language.draw(batch_rng, size)
        given = F.pad(target, (1, 0), value=EDGE)
        # The edge token ends the sentence where padding begins.
        ended = F.pad(target, (0, 1))
        ends = (ended != PAD).sum(1, keepdim=True)
        return source, given, ended.scatter(1, ends, EDGE)

    work = batch_size * sum(lengths) * (work + 0.5 * language.sizes[1] * math.sqrt(work))
    return stream_task(
        rng,
        lambda: make(language, lengths),
        draw,
        translation_loss(smoothing),
        batch_size=batch_size,
        length=run_length(rng, 250, 700, 2 * work),
    )


def seq2seq_recurrent(rng: torch.Generator) -> Task:
    """See :func:`sequence_task`; the networks are those of Bahdanau's and Luong's translators, small."""
    embedding, hidden, both_ways = log_int(rng, 12, 48), log_int(rng, 24, 96), chance(rng, 0.5)
    attention = choice(rng, ("dot", "general", "additive"))

    def make(language: Language, lengths: tuple[int, int]) -> nn.Module:
        return RecurrentTranslator(language.sizes, embedding, hidden, attention, both_ways)

    return sequence_task(rng, make, log_int(rng, 16, 64), 12 * hidden**2)


def seq2seq_transformer(rng: torch.Generator) -> Task:
    """See :func:`sequence_task`; one to three layers on either side."""
    width, heads = choice(rng, (16, 32, 48, 64)), choice(rng, (1, 2, 4))
    depths = integer(rng, 1, 2), integer(rng, 1, 2)
    style = random_style(rng, norms=("layer", "rms"), inits=("default", "default", "xavier", "zero_output"))

    def make(language: Language, lengths: tuple[int, int]) -> nn.Module:
        return initialise(Transformer(language.sizes, lengths, width, depths, heads, style), style)

    return sequence_task(rng, make, log_int(rng, 16, 64), sum(depths) * 14 * width**2)


FAMILIES = (
    TaskFamily("seq2seq_recurrent", "GRU translators with attention", "train", seq2seq_recurrent),
    TaskFamily("seq2seq_transformer", "encoder-decoder transformers", "train", seq2seq_transformer),
)
