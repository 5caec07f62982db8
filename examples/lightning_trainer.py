"""A Lightning module with LearnedOptimizer, against AdamW.

pip install -e ".[clients]"
python examples/lightning_trainer.py --steps 200
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from learned_optim import LearnedOptimizer


class Regression(lightning.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.name == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        return LearnedOptimizer(self.named_parameters(), lr=1e-3)


def train(name: str, steps: int) -> float:
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(2048, 16)
    data = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=32, shuffle=True)
    module = Regression(name)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return sum(module.losses[-20:]) / len(module.losses[-20:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    losses = {name: train(name, steps) for name in ("AdamW", "LearnedOptimizer")}
    for name, loss in losses.items():
        print(f"{name}: training loss {loss:.4f} after {steps} steps")


if __name__ == "__main__":
    main()
