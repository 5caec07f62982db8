"""The language model: one LSTM layer whose embedding is also its output layer, and its ordinary training.

Short-term memory is the LSTM's state. Long-term memory is the weights that :func:`pretrain` makes. What is learned
while reading, the memory in between, is kept as *differences* from these weights: they start at zero with every
article, and the optimizer's weight decay is a decay back to the static weights.

One weight serves this level only: the rows of ``memory``, zero in the static weights. The last word, the last two and
the last four each name one row by a hash, and these are added to what goes into the output layer. So what one gradient
step teaches is recalled in full where a context comes back, and nowhere else, which no step on the LSTM can do.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence

import torch
from data import Article
from torch import Tensor, nn
from torch.nn import functional as F

from learned_optim.meta_train.progress import TimedLines, how_far

#: Output and cell of the LSTM, [1, batch, width], and the words before those to come, [3, batch].
State = tuple[Tensor, Tensor, Tensor]
#: Named weights, or differences from them.
Weights = dict[str, Tensor]
#: Which weights are learned while reading.
CHOICES = {
    "all": ("embedding", "bias", "input", "recurrent", "gates", "memory"),
    "lstm": ("embedding", "bias", "input", "recurrent", "gates"),
    "memory": ("bias", "memory"),
}
#: Numbers of words that name a row of the memory.
CONTEXTS = (1, 2, 4)
#: Of what is recalled: at one learning rate, what a step changes in it counts the square of this.
STRENGTH = 1.5


class LanguageModel(nn.Module):
    """Predicts the next word.

    Args:
        vocabulary: number of words.
        width: of the embedding and of the LSTM.
        dropout: share of embedding and output units left out in training.
        rows: of the memory, for contexts of each length.
    """

    def __init__(self, vocabulary: int, width: int = 128, dropout: float = 0.4, rows: int = 1024) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(width)
        self.width, self.dropout = width, dropout
        self.embedding = nn.Parameter(torch.empty(vocabulary, width).uniform_(-0.1, 0.1))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.input = nn.Parameter(torch.empty(4 * width, width).uniform_(-bound, bound))
        self.recurrent = nn.Parameter(torch.empty(4 * width, width).uniform_(-bound, bound))
        self.gates = nn.Parameter(torch.zeros(4 * width))
        self.rows = rows
        self.memory = nn.Parameter(torch.zeros(len(CONTEXTS) * rows, width))
        self.register_buffer("zeros", torch.zeros(4 * width), persistent=False)

    def weights(self) -> Weights:
        """The static weights by name, without their graph."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def start(self, batch: int = 1) -> State:
        """The state at the beginning of an article."""
        h, c = torch.zeros(2, 1, batch, self.width)
        return h, c, torch.zeros(max(CONTEXTS) - 1, batch, dtype=torch.int64)

    def losses(self, weights: Weights, tokens: Tensor, state: State, dropout: float = 0.0) -> tuple[Tensor, State]:
        """Losses in nats of each word but the first, given those before it.

        Args:
            weights: by name; without ``memory``, it counts as zero.
            tokens: [length + 1, batch].
            state: after the words before ``tokens``.
            dropout: share of units left out.

        Returns:
            [length, batch], and the state after all but the last word.
        """
        h, c, before = state
        seen = F.dropout(F.embedding(tokens[:-1], weights["embedding"]), dropout)
        lstm = [weights["input"], weights["recurrent"], weights["gates"], self.zeros]
        hidden, h, c = torch.lstm(seen, (h, c), lstm, True, 1, 0.0, False, False, False)  # pyright: ignore
        hidden = F.dropout(hidden, dropout)
        before = torch.cat([before, tokens[:-1]])
        if "memory" in weights:
            hidden = hidden + STRENGTH * F.embedding(self.recalled(before), weights["memory"]).sum(0)
        scores = torch.addmm(weights["bias"], hidden.flatten(0, 1), weights["embedding"].T)
        losses = F.cross_entropy(scores, tokens[1:].flatten(), reduction="none")
        return losses.view(tokens.shape[0] - 1, tokens.shape[1]), (h, c, before[1 - max(CONTEXTS) :])

    def recalled(self, words: Tensor) -> Tensor:
        """The memory's rows for each word but the first three, [contexts, length, batch]; those before it count too."""
        most = max(CONTEXTS)
        length, code, codes = len(words) - most + 1, torch.zeros((), dtype=torch.int64), []
        for back in range(most):
            # Any mixing will do that fits into 64 bits.
            code = ((code + words[most - 1 - back :][:length] + 1) * 1_000_003 + back) % 2_147_483_647
            if back + 1 in CONTEXTS:
                codes.append(code * 48_271 % 2_147_483_647 % self.rows + self.rows * len(codes))
        return torch.stack(codes)


def detached(state: State) -> State:
    return state[0].detach(), state[1].detach(), state[2]


def with_start(tokens: Tensor) -> Tensor:
    """An article's tokens behind the one that every article begins with."""
    return F.pad(tokens, (1, 0))


def pretrain(
    articles: Sequence[Article], vocabulary: int, *, width: int = 128, dropout: float = 0.4, epochs: float = 12.0,
    lr: float = 4e-3, seed: int = 0, rows: int = 32, length: int = 32, verbose: bool = True,
) -> LanguageModel:  # fmt: skip
    """The static level: AdamW with a cosine schedule over streams of articles in random order."""
    torch.manual_seed(seed)
    model = LanguageModel(vocabulary, width, dropout)
    optimizer = torch.optim.AdamW([getattr(model, name) for name in CHOICES["lstm"]], lr=lr, weight_decay=0.05)
    count = sum(len(a.tokens) + 1 for a in articles)
    per_epoch = max(1, count // rows // length)
    steps = max(1, round(epochs * per_epoch))
    weights: Weights = {name: getattr(model, name) for name in CHOICES["lstm"]}
    begun, total, step = time.perf_counter(), 0.0, 0
    far = lambda: f"  step {step} of {steps} {how_far(step, steps, time.perf_counter() - begun)}"  # noqa: E731
    lines = TimedLines(far) if verbose else None
    stream, state = torch.empty(0), model.start(rows)
    for step in range(steps):
        index = step % per_epoch
        if index == 0:
            order = torch.randperm(len(articles)).tolist()
            joined = torch.cat([with_start(articles[i].tokens) for i in order])
            usable = (len(joined) - 1) // rows
            stream = torch.stack([joined[row * usable : (row + 1) * usable + 1] for row in range(rows)], 1)
            state, total = model.start(rows), 0.0
        tokens = stream[index * length : (index + 1) * length + 1]
        if len(tokens) < 2:
            continue
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        losses, state = model.losses(weights, tokens, state, dropout)
        state = detached(state)
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach())
        if verbose and (index == per_epoch - 1 or step == steps - 1):
            seconds, done = time.perf_counter() - begun, (step + 1) / per_epoch
            print(f"  epoch {done:4.1f}: training loss {total / (index + 1):.3f}, {seconds:.0f} s", flush=True)
    if lines is not None:
        lines.close()
    return model.eval()


def keep_memory() -> None:
    """Have the C library keep freed memory: giving back and fetching megabytes at every chunk doubles the time."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 29)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):  # another C library
        pass
