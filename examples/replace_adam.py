"""The swap in a whole training loop: clipping, a schedule, and a run that stops and resumes.

    python examples/replace_adam.py

Both losses that it prints are the same: a resumed run continues exactly.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from learned_optim import LearnedOptimizer


def start() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    # optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = LearnedOptimizer(model.parameters(), lr=1e-3)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: object, steps: range) -> float:
    loss = torch.zeros(())
    for step in steps:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(f"200 steps at once: loss {train(*start(), range(200)):.6f}")

    run = start()
    train(*run, range(100))
    with tempfile.TemporaryDirectory() as folder:
        torch.save([part.state_dict() for part in run], Path(folder) / "checkpoint.pt")
        resumed = start()
        for part, state in zip(resumed, torch.load(Path(folder) / "checkpoint.pt"), strict=True):
            part.load_state_dict(state)
    print(f"stopped at 100 and resumed: loss {train(*resumed, range(100, 200)):.6f}")


if __name__ == "__main__":
    main()
