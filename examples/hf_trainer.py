"""transformers.Trainer with LearnedOptimizer: a small GPT-2 that learns to sort, against AdamW.

pip install -e ".[clients]"
python examples/hf_trainer.py --steps 100
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from learned_optim import LearnedOptimizer, param_groups


def examples(count: int = 512) -> list[dict[str, torch.Tensor]]:
    """Eight digits, a separator, and the digits in order; only the second half counts."""
    digits = torch.randint(0, 10, (count, 8), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([digits, torch.full((count, 1), 10), digits.sort(dim=1).values], dim=1)
    labels = rows.clone()
    labels[:, :9] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def train(name: str, steps: int) -> float:
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 17, "vocab_size": 11}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=10, eos_token_id=10))
    # The groups say that GPT-2 packs three matrices into one, transposed. The Trainer makes the schedule (None).
    learned = {"optimizers": (LearnedOptimizer(param_groups(model, weight_decay=0.01), lr=1e-3), None)}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.01,
            per_device_train_batch_size=32, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=examples(), **(learned if name != "AdamW" else {}))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(losses[-10:]) / len(losses[-10:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    losses = {name: train(name, steps) for name in ("AdamW", "LearnedOptimizer")}
    for name, loss in losses.items():
        print(f"{name}: training loss {loss:.3f} after {steps} steps")


if __name__ == "__main__":
    main()
