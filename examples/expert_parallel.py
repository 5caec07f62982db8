"""A loop as torchtitan has it, under torchrun: FSDP2 for each block, expert parallelism, and a run that can be resumed.

    torchrun --nproc-per-node 2 examples/expert_parallel.py --folder checkpoints --steps 60

Each process holds some of the experts whole, and tokens travel to them and back by all_to_all, which gloo has, too. All
else is sharded by FSDP2. A run that ended, also early by --stop, goes on from there, in 1, 2, 4 or 8 processes.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from learned_optim import LearnedOptimizer, param_groups

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
DATA = torch.tensor(list(Path(__file__).read_bytes()))  # what there is to learn: this file, letter by letter
VOCABULARY, WIDTH, HEADS, EXPERTS, LAYERS, BATCH, LENGTH, WARM_UP = 128, 32, 4, 4, 2, 16, 48, 10


class Exchange(torch.autograd.Function):
    """Rows to other processes and from them; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return Exchange.apply(grad, *ctx.way_back), None, None, None


class Experts(nn.Module):
    """Perceptrons stacked along the first dimension, of which every process of the mesh holds as many."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group, self.processes = mesh.get_group(), mesh.size()
        w1, w2 = torch.randn(EXPERTS, 2 * WIDTH, WIDTH), torch.randn(EXPERTS, WIDTH, 2 * WIDTH)
        w1, w2 = (distribute_tensor(w.to(DEVICE) / w.shape[2] ** 0.5, mesh, [Shard(0)]) for w in (w1, w2))
        self.w1, self.w2 = nn.Parameter(w1), nn.Parameter(w2)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """Tokens [N, WIDTH], each through the expert of its number [N]."""
        order = expert.argsort(stable=True)
        counts = expert.bincount(minlength=EXPERTS)
        arriving = torch.empty_like(counts)  # from each process, for each expert that is here
        dist.all_to_all_single(arriving, counts, group=self.group)
        counts, by_process = counts.view(self.processes, -1), arriving.view(self.processes, -1)
        sent, received = counts.sum(1).tolist(), by_process.sum(1).tolist()
        here = Exchange.apply(x[order], sent, received, self.group)
        number = torch.arange(by_process.shape[1], device=x.device).repeat(self.processes)
        by_expert = number.repeat_interleave(arriving).argsort(stable=True)
        tokens = here[by_expert].split(by_process.sum(0).tolist())
        w1, w2 = self.w1.to_local(), self.w2.to_local()
        for weights in (w1, w2):  # which have seen the tokens of all, and a loss is the mean over processes
            weights.register_hook(lambda grad: grad / self.processes)
        done = torch.cat([F.silu(t @ a.T) @ b.T for t, a, b in zip(tokens, w1, w2, strict=True)])
        return Exchange.apply(done[by_expert.argsort()], received, sent, self.group)[order.argsort()]


class Block(nn.Module):
    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), Experts(mesh)
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, mask = self.before(x), nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        x = x + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        y = self.between(x).flatten(0, 1)
        weight, expert = self.router(y).softmax(1).max(1)
        return x + (weight.unsqueeze(1) * self.experts(y, expert)).view_as(x)


def sharded_model() -> nn.Module:
    processes = dist.get_world_size()
    ways = math.gcd(processes, EXPERTS)
    everyone = dist.init_device_mesh(DEVICE.type, (processes,))
    mesh = dist.init_device_mesh(DEVICE.type, (processes // ways, ways), mesh_dim_names=("data", "experts"))
    torch.manual_seed(0)
    blocks = [Block(mesh["experts"]) for _ in range(LAYERS)]
    ends = nn.Flatten(0, 1), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, *ends).to(DEVICE)
    for block in blocks:
        # Where there are more processes, FSDP2 cuts the experts' matrices: the stack itself is cut already.
        fully_shard(block.experts, mesh=mesh["data"], shard_placement_fn=lambda p: Shard(1))
        fully_shard(block, mesh=everyone)
    return fully_shard(model, mesh=everyone)


def clip(model: nn.Module, most: float) -> None:
    """Gradients lie on two meshes, which ``clip_grad_norm_`` does not add up; every process has its part of each."""
    grads = [p.grad.to_local() for p in model.parameters()]
    square = nn.utils.get_total_norm(grads).square()
    dist.all_reduce(square)
    for grad in grads:
        grad.mul_((most / square.sqrt()).clamp(max=1.0))


def loss_of(model: nn.Module, step: int) -> Tensor:
    """On this process's rows of a batch that is the same however many processes there are."""
    starts = torch.randint(len(DATA) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    mine = starts[dist.get_rank() :: dist.get_world_size()].tolist()
    rows = torch.stack([DATA[i : i + LENGTH + 1] for i in mine]).to(DEVICE)
    return F.cross_entropy(model(rows[:, :-1]), rows[:, 1:].flatten())


def state(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, step: int) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optim": of_optimizer, "schedule": schedule.state_dict(), "step": step}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="of checkpoints; the run goes on from the last")
    parser.add_argument("--steps", type=int, default=60, help="of the whole run, which the learning rate decays over")
    parser.add_argument("--stop", type=int, help="save and leave after so many steps")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, as the docstring of this file shows")
    dist.init_process_group("nccl" if CUDA else "gloo")
    model, begin = sharded_model(), 0
    optimizer = LearnedOptimizer(param_groups(model, weight_decay=0.1), lr=2e-3)  # after fully_shard
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / WARM_UP, 1.0) * 0.5 * (1.0 + math.cos(math.pi * t / given.steps))
    )
    if checkpoints := sorted(Path(given.folder).glob("step-*")):
        saved = state(model, optimizer, schedule, begin)
        dcp.load(saved, checkpoint_id=checkpoints[-1])
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optim"])
        schedule.load_state_dict(saved["schedule"])
        begin = saved["step"]
    end = given.stop or given.steps
    for step in range(begin, end):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        clip(model, 0.5)
        optimizer.step()
        schedule.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item():.6f}", flush=True)
    dcp.save(state(model, optimizer, schedule, end), checkpoint_id=Path(given.folder, f"step-{end:06}"))
    dist.barrier()  # who leaves first takes the connections of the others along
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
