"""FSDP2 under torchrun, on CPUs or GPUs: parameters and state are sharded, the update is that of one process.

torchrun --nproc-per-node 2 examples/fsdp2.py --steps 200
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from learned_optim import LearnedOptimizer, param_groups

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")


def start(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 65), nn.Tanh(), nn.Linear(65, 65), nn.Tanh(), nn.Linear(65, 1)).to(DEVICE)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    # After fully_shard: the optimizer is to see the shards.
    if name == "AdamW":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, LearnedOptimizer(param_groups(model), lr=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    losses = []
    for step in steps:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1000 * dist.get_rank() + step)).to(DEVICE)
        loss = nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses[-20:]).mean()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def through_a_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> tuple:
    """Every process writes its shards; any number of processes could read them."""
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders, 0)
    dcp.save(dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folders[0])
    model, optimizer = start(name)
    saved = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.load(saved, checkpoint_id=folders[0])
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optim"])
    return model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 examples/fsdp2.py")
    dist.init_process_group("nccl" if CUDA else "gloo")
    for name in ("AdamW", "LearnedOptimizer"):
        run = start(name)
        train(*run, range(steps // 2))
        loss = train(*through_a_checkpoint(*run, name), range(steps // 2, steps))
        if dist.get_rank() == 0:
            print(f"{name}: training loss {loss:.4f} after {steps} steps, with a checkpoint half-way")
    dist.barrier()  # who leaves first takes the connections of the others along
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
