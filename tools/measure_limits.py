"""Two tasks on which AdamW is the better choice, measured: python tools/measure_limits.py OUT.json

``table``: scikit-learn's diabetes data, 300 patients to learn from, 142 held out, a network that can learn them by
heart. ``words``: an embedding of 10,000 words that occur as words do, a few often and most of them rarely.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import AdamW

from learned_optim import LearnedOptimizer

SEEDS, STEPS, EVERY = 3, 400, 20
Task = tuple[nn.Module, Callable[[torch.Generator], Tensor], Callable[[], Tensor]]


def table() -> Task:
    """Model, loss on a batch, held-out loss."""
    data = load_diabetes()
    x = torch.tensor(data.data, dtype=torch.float32) * len(data.data) ** 0.5
    y = torch.tensor((data.target - data.target.mean()) / data.target.std(), dtype=torch.float32)[:, None]
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def batch_loss(rng: torch.Generator) -> Tensor:
        batch = torch.randint(300, (32,), generator=rng)
        return mse_loss(model(x[batch]), y[batch])

    return model, batch_loss, lambda: mse_loss(model(x[300:]), y[300:])


def words() -> Task:
    """Model, loss on a batch, held-out loss."""
    fixed = torch.Generator().manual_seed(0)
    frequency, topic = 1 / torch.arange(1, 10_001), torch.randint(10, (10_000,), generator=fixed)
    model = nn.Sequential(nn.EmbeddingBag(10_000, 16), nn.Linear(16, 10))

    def loss(texts: int, rng: torch.Generator) -> Tensor:
        text = torch.multinomial(frequency, 8 * texts, replacement=True, generator=rng).view(texts, 8)
        return cross_entropy(model(text), topic[text].mode(1).values)

    return model, partial(loss, 64), lambda: loss(2000, torch.Generator().manual_seed(10**6))


def run(task: Callable[[], Task], make: Callable, seed: int) -> tuple[float, float, float]:
    """Mean training loss of the last 40 steps, lowest held-out loss, held-out loss at the end."""
    torch.manual_seed(seed)
    model, batch_loss, held_out = task()
    optimizer = make(model.parameters())
    rng = torch.Generator().manual_seed(seed)
    train, test = [], []
    for step in range(1, STEPS + 1):
        loss = batch_loss(rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        train.append(loss.item())
        if step % EVERY == 0:
            with torch.no_grad():
                test.append(held_out().item())
    return statistics.fmean(train[-40:]), min(test), test[-1]


def main() -> None:
    torch.set_num_threads(1)
    columns: dict[str, dict[str, str]] = {}
    for task in (table, words):
        runs = {}
        for name, kind, rates in (
            ("AdamW", AdamW, (1e-3,)),
            ("LearnedOptimizer", LearnedOptimizer, (1e-3,)),
            ("AdamW, best lr of 5", AdamW, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
        ):
            tried = [[run(task, partial(kind, lr=lr), seed) for seed in range(SEEDS)] for lr in rates]
            runs[name] = min(tried, key=lambda results: sum(result[1] for result in results))  # lowest held-out loss
        for name, results in runs.items():
            for i, figure in enumerate(("training loss", "held-out loss, lowest", "held-out loss, end")):
                values = [result[i] for result in results]
                text = f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
                columns.setdefault(name, {})[f"{task.__name__}: {figure}"] = text
    for row in columns["AdamW"]:
        print(f"{row:32}", *(f"{column[row]:>20}" for column in columns.values()))
    facts = {"steps": STEPS, "seeds": SEEDS, "torch": torch.__version__, "table": columns}
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
