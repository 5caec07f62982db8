"""Runs unlike those of meta-training, against AdamW tuned for each: python tools/measure_beyond.py OUT.json

Four times as many steps as any run of meta-training, ten and forty times its largest network, batches of 1, 4 and
1,024, and parameters of two bytes. Perceptrons on the data of two validation families, letters and a formula, and a
transformer on words; AdamW at the best of 14 settings, as in ``learned-optim bench``. One seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim.bench.figures import compare_all
from learned_optim.bench.quality import REFERENCE, run_quality
from learned_optim.bench.quality_config import QualityConfig
from learned_optim.tasks import FAMILIES, ModuleTask, Task
from learned_optim.tasks.data_text import words
from learned_optim.tasks.families.language import language_task
from learned_optim.tasks.families.vision_validation import letter_data
from learned_optim.tasks.nets import Style, TransformerLM, mlp
from learned_optim.tasks.sampling import dataset_task

CLASSES = 26


class Cast(nn.Module):
    """A network in another dtype; its outputs are float32, as under every sensible recipe."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.dtype)).float()


def letters(
    name: str, hidden: Sequence[int], batch_size: int, length: int, dtype: torch.dtype = torch.float32
) -> ModuleTask:
    """A perceptron on 28 x 28 letters."""
    load = letter_data(torch.Generator().manual_seed(0), 4000, CLASSES, "standardised")

    def make() -> nn.Module:
        return Cast(mlp([784, *hidden, CLASSES], Style()), dtype)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    task = dataset_task(make, load, loss, batch_size=batch_size, length=length)
    task.name = name
    return task


def renamed(task: Task, name: str, length: int) -> Task:
    task.name, task.length = name, length
    return task


def transformer(name: str) -> Task:
    """Of width 384, four blocks, on 3,000 words."""
    style, rng = Style(norm="layer"), torch.Generator().manual_seed(0)
    return renamed(
        language_task(
            rng, lambda: TransformerLM(3000, 32, 384, 4, 6, style), lambda held_out: words("train", held_out, 3000),
            context=32, batch_size=8, length=200,
        ),
        name, 200,
    )  # fmt: skip


TASKS: dict[str, Callable[[str], Task]] = {
    "6,000 steps": lambda name: renamed(FAMILIES["val_formula_regression"].task(1), name, 6000),
    "2.6 million parameters": lambda name: letters(name, [1200, 1200, 256], 64, 300),
    "transformer of 9 million": transformer,
    "batches of 1": lambda name: letters(name, [128], 1, 1500),
    "batches of 4": lambda name: letters(name, [128], 4, 1500),
    "batches of 1,024": lambda name: letters(name, [256, 256], 1024, 300),
    "bfloat16 parameters": lambda name: letters(name, [128, 128], 64, 600, torch.bfloat16),
    "float16 parameters": lambda name: letters(name, [128, 128], 64, 600, torch.float16),
}


def measure(policy: str, cache: Path | None, max_length: int = 0) -> dict[str, Any]:
    """Figures and the table of docs/when_not.md."""
    config = QualityConfig(
        policies=(policy,), seeds=1, baselines=("adamw",), tune_lr=False, cache=cache, max_length=max_length
    )
    result = run_quality(config, tasks=[make(name) for name, make in TASKS.items()])
    comparisons = compare_all(result, result.subject().name, REFERENCE)

    def number(value: float | None, digits: str) -> str:
        return "–" if value is None else format(value, digits)

    table = {
        c.task: {
            "speedup": number(c.speedup, ".2f"), "training loss": number(c.loss, ".3g"),
            "AdamW's": number(c.reference_loss, ".3g"), "held-out loss": number(c.held_out_loss, ".3g"),
            "AdamW's, held out": number(c.reference_held_out_loss, ".3g"), "diverged": str(c.diverged),
        }
        for c in comparisons
    }  # fmt: skip
    return {"policy": policy, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a .json file")
    parser.add_argument("--policy", default="default")
    parser.add_argument("--cache", type=Path, help="folder of finished runs")
    parser.add_argument("--max-length", type=int, default=0, help="cap of the runs' lengths, to try this out")
    args = parser.parse_args()
    results = measure(args.policy, args.cache, args.max_length)
    args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
