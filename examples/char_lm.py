"""A small character model of this repository's documents, trained by AdamW and by LearnedOptimizer.

    python examples/char_lm.py --steps 300

Nothing is tuned: both optimizers run with the same learning rate, 1e-3, which is each one's default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, param_groups

ROOT = Path(__file__).parent.parent
TEXT = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
LETTERS = sorted(set(TEXT))
DATA = torch.tensor([LETTERS.index(letter) for letter in TEXT])


class CharModel(nn.Module):
    """A GRU over characters; the output layer shares the embedding's weights."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(len(LETTERS)))

    def forward(self, letters: Tensor) -> Tensor:
        return self.gru(self.embedding(letters))[0] @ self.embedding.weight.T + self.bias


def batch(generator: torch.Generator, part: Tensor, size: int = 16, length: int = 48) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(part) - length - 1, (size,), generator=generator)
    rows = torch.stack([part[i : i + length + 1] for i in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(rows[0]).flatten(0, 1), rows[1].flatten())


def train(name: str, steps: int) -> tuple[float, float]:
    torch.manual_seed(0)
    model = CharModel()
    if name == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:  # the groups say that the GRU's weights hold a matrix for each gate
        optimizer = LearnedOptimizer(param_groups(model), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    cut = 9 * len(DATA) // 10
    losses = []
    for _ in range(steps):
        loss = loss_of(model, batch(generator, DATA[:cut]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        held_out = loss_of(model, batch(generator, DATA[cut:], size=64)).item()
    return sum(losses[-20:]) / len(losses[-20:]), held_out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"argument --steps: expected 1 or more, found {steps}")
    for name in ("AdamW", "LearnedOptimizer"):
        loss, held_out = train(name, steps)
        print(f"{name}: training loss {loss:.3f}, held-out loss {held_out:.3f} after {steps} steps")


if __name__ == "__main__":
    main()
