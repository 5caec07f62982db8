"""Time ``optimizer.step()`` and weigh its state, for AdamW and LearnedOptimizer.

    python tools/measure_step.py OUT.json

One thread, float32, dense gradients.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from learned_optim import LearnedOptimizer

OPTIMIZERS = {
    "AdamW": AdamW,
    "AdamW(fused=True)": partial(AdamW, fused=True),
    "LearnedOptimizer": LearnedOptimizer,
    "LearnedOptimizer(state_dtype=torch.bfloat16)": partial(LearnedOptimizer, state_dtype=torch.bfloat16),
}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def large() -> nn.Module:
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))


def state_bytes(optimizer: Optimizer) -> int:
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def measure(make: partial[Optimizer] | type[Optimizer], model: nn.Module, seconds: float = 3.0) -> tuple[float, float]:
    """Seconds of the fastest step (other load on the machine then counts least), and bytes of state per parameter."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.step()
    times = []
    while sum(times) < seconds or len(times) < 10:
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return min(times), state_bytes(optimizer) / sum(p.numel() for p in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    table = {}
    for name, make in OPTIMIZERS.items():
        (few, _), (many, size) = measure(make, small()), measure(make, large())
        parameters = [sum(p.numel() for p in model().parameters()) for model in (small, large)]
        table[name] = {
            f"{parameters[0]:,} parameters, ms a step": f"{few * 1e3:.2f}",
            f"{parameters[1]:,} parameters, ms a step": f"{many * 1e3:.0f}",
            "per parameter, ns": f"{many / parameters[1] * 1e9:.1f}",
            "state per parameter, bytes": f"{size:.1f}",
        }
        print(name, table[name], flush=True)
    facts = {"threads": 1, "torch": torch.__version__, "table": table}
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
