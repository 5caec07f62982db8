"""Families of language models, on text that comes with Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..base import LossFn, ModuleTask, Task, TaskFamily
from ..data_text import CHARACTERS, characters, streams, windows, words
from ..nets import RecurrentLM, TransformerLM, initialise, random_style
from ..objectives import next_token
from ..sampling import chance, choice, integer, log_int, run_length, uniform


def language_task(
    rng: torch.Generator,
    make_module: Callable[[], nn.Module],
    tokens: Callable[[bool], Tensor],
    *,
    context: int,
    batch_size: int,
    length: int,
    loss_fn: LossFn = next_token,
) -> ModuleTask:
    """Next-token prediction on a random stretch of a text, read at random places or as continued streams.

    ``tokens(held_out)`` gives one of the two parts of the text. The stretch is 5% to all of it: short ones are
    seen many times over.
    """
    cursor = choice(rng, (windows, windows, streams))
    stretch, position = min(1.0, uniform(rng, 0.05, 1.5)), uniform(rng, 0.0, 1.0)
    held_out_examples = max(1, min(512, 8192 // context))

    def training_tokens() -> Tensor:
        whole = tokens(False)
        size = int(stretch * len(whole))
        start = int(position * (len(whole) - size))
        return whole[start : start + size]

    def held_out_batch() -> tuple[Tensor]:
        # Windows at equal distances rather than at random places: the least noise for the number of examples.
        part = tokens(True)
        start = torch.linspace(0, len(part) - context - 1, held_out_examples).long()
        return (part[start[:, None] + torch.arange(context + 1)],)

    return ModuleTask(
        make_module,
        lambda batch_rng: cursor(training_tokens(), context, batch_size, batch_rng),
        loss_fn,
        length=length,
        eval_batch=held_out_batch,
    )


def recurrent_char(rng: torch.Generator, cell: str) -> Task:
    embedding, hidden = log_int(rng, 8, 64), log_int(rng, 24, 192 if cell == "lstm" else 96)
    layers, lower = choice(rng, (1, 1, 2)), chance(rng, 0.3)
    context, batch_size = log_int(rng, 12, 32), log_int(rng, 8, 24)
    return language_task(
        rng,
        lambda: RecurrentLM(cell, len(CHARACTERS), embedding, hidden, layers),
        lambda held_out: characters("train", held_out, lower),
        context=context,
        batch_size=batch_size,
        length=run_length(rng, 200, 600),
    )


def gru_char(rng: torch.Generator) -> Task:
    return recurrent_char(rng, "gru")


def lstm_char(rng: torch.Generator) -> Task:
    return recurrent_char(rng, "lstm")


def transformer_char(rng: torch.Generator) -> Task:
    width, depth, heads = choice(rng, (16, 32, 48, 64, 80)), integer(rng, 1, 3), choice(rng, (1, 2, 4))
    style = random_style(rng, norms=("layer", "rms"), inits=("default", "default", "xavier", "zero_output"))
    tied, lower = chance(rng, 0.3), chance(rng, 0.3)
    if tied and style.init in ("xavier", "zero_output"):
        style = random_style(rng, norms=("layer", "rms"), inits=("default",))  # the last layer is the embedding
    context, batch_size = log_int(rng, 12, 40), log_int(rng, 8, 24)
    work = batch_size * context * depth * 12 * width**2
    return language_task(
        rng,
        lambda: initialise(TransformerLM(len(CHARACTERS), context, width, depth, heads, style, tied), style),
        lambda held_out: characters("train", held_out, lower),
        context=context,
        batch_size=batch_size,
        length=run_length(rng, 200, 500, work),
    )


def lstm_word_tied(rng: torch.Generator) -> Task:
    vocabulary, width = log_int(rng, 400, 5000), choice(rng, (16, 32, 48, 64, 96))
    hidden = width if chance(rng, 0.7) else 2 * width
    context, batch_size = log_int(rng, 6, 12), log_int(rng, 6, 12)
    work = batch_size * context * width * (vocabulary + 8 * hidden)
    return language_task(
        rng,
        lambda: RecurrentLM("lstm", vocabulary, width, hidden, tied=True),
        lambda held_out: words("train", held_out, vocabulary),
        context=context,
        batch_size=batch_size,
        length=run_length(rng, 200, 600, work),
    )


class WordWindow(nn.Module):
    """Predicts a word from the embeddings of those before it: ``[batch, context]`` to ``[batch, vocabulary]``."""

    def __init__(self, vocabulary: int, context: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(context * width, hidden), nn.Tanh())
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.hidden(self.embed(tokens)))


def last_token(module: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """Cross-entropy (nats) of the last token of each row given the others."""
    (tokens,) = batch
    return nn.functional.cross_entropy(module(tokens[:, :-1]), tokens[:, -1])


def word_window(rng: torch.Generator) -> Task:
    """A large embedding of which one batch touches few rows; untied, so that most gradients are exactly zero."""
    vocabulary, width, hidden = log_int(rng, 800, 6000), log_int(rng, 8, 64), log_int(rng, 16, 48)
    context, batch_size = integer(rng, 2, 6), log_int(rng, 16, 128)
    return language_task(
        rng,
        lambda: WordWindow(vocabulary, context, width, hidden),
        lambda held_out: words("train", held_out, vocabulary),
        context=context,
        batch_size=batch_size,
        length=run_length(rng, 200, 800, batch_size * hidden * vocabulary),
        loss_fn=last_token,
    )


def val_recurrent_char(rng: torch.Generator) -> Task:
    cell, lower = choice(rng, ("gru", "lstm", "lstm")), chance(rng, 0.3)
    embedding, hidden, layers = log_int(rng, 24, 64), log_int(rng, 96, 192), choice(rng, (1, 2))
    context, batch_size = log_int(rng, 24, 48), log_int(rng, 12, 24)
    return language_task(
        rng,
        lambda: RecurrentLM(cell, len(CHARACTERS), embedding, hidden, layers),
        lambda held_out: characters("validation", held_out, lower),
        context=context,
        batch_size=batch_size,
        length=run_length(rng, 300, 1000, 40 * batch_size * context * layers * hidden**2, seconds=20.0),
    )


def val_transformer_char(rng: torch.Generator) -> Task:
    width, depth, heads = choice(rng, (96, 128)), integer(rng, 3, 5), 4
    style = random_style(rng, norms=("layer", "rms"), inits=("default",))
    context, batch_size = log_int(rng, 32, 64), log_int(rng, 8, 16)
    work = batch_size * context * depth * 12 * width**2
    return language_task(
        rng,
        lambda: initialise(TransformerLM(len(CHARACTERS), context, width, depth, heads, style), style),
        lambda held_out: characters("validation", held_out),
        context=context,
        batch_size=batch_size,
        length=run_length(rng, 300, 1000, work, seconds=12.0),
    )


def val_lstm_word_tied(rng: torch.Generator) -> Task:
    vocabulary, width, layers = log_int(rng, 2000, 4500), choice(rng, (64, 96, 128)), choice(rng, (1, 2))
    context, batch_size = log_int(rng, 10, 20), log_int(rng, 8, 16)
    work = batch_size * context * width * (vocabulary + 8 * layers * width)
    return language_task(
        rng,
        lambda: RecurrentLM("lstm", vocabulary, width, width, layers, tied=True),
        lambda held_out: words("validation", held_out, vocabulary),
        context=context,
        batch_size=batch_size,
        length=run_length(rng, 300, 800, work, seconds=10.0),
    )


FAMILIES = (
    TaskFamily("gru_char", "character-level GRU language models", "train", gru_char),
    TaskFamily("lstm_char", "character-level LSTM language models", "train", lstm_char),
    TaskFamily("transformer_char", "small character-level transformers", "train", transformer_char),
    TaskFamily("lstm_word_tied", "word-level LSTMs with tied embeddings", "train", lstm_word_tied),
    TaskFamily("word_window", "next word from a window, large untied embeddings", "train", word_window),
    TaskFamily("val_recurrent_char", "wider character-level GRUs and LSTMs", "validation", val_recurrent_char),
    TaskFamily("val_transformer_char", "wider, deeper character transformers", "validation", val_transformer_char),
    TaskFamily("val_lstm_word_tied", "wider word-level LSTMs, tied embeddings", "validation", val_lstm_word_tied),
)
