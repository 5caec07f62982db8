"""What sharding costs: python tools/measure_fsdp.py docs/results/fsdp.json

Transformers under FSDP2 (gloo, CPU) in two and four processes of one thread, with ``param_groups``. Bytes are those of
the tensors that the optimizer all-reduces in a step, over the number of parameters. *Whole updates* is the sum by
formula: seven sums per tensor, and each orthogonalised matrix in float32. Time is that of a training step over AdamW's:
the median processor time of a process, added up for all, and of it the mean that goes into the optimizer's all-reduces.
Both train in turn, on the same batch, cut among the processes. In one process nothing is sharded.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from learned_optim import LearnedOptimizer, Policy, param_groups
from learned_optim.engine.kinds import TensorKind
from learned_optim.engine.sharding import Shards
from learned_optim.rule.types import TensorSums

#: Width and layers.
MODELS = ((128, 4), (256, 1))
PROCESSES = (1, 2, 4)
VOCABULARY, BATCH, LENGTH = 96, 16, 64
WARM_UP, STEPS = 4, 24


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x)).flatten(0, 1).clone()  # FSDP2 warns of a view


class Trainee:
    """A model and its optimizer; in several processes both are sharded."""

    def __init__(self, name: str, size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        self.model = Transformer(*size)
        if dist.get_world_size() > 1:
            for layer in (*self.model.layers, self.model):
                fully_shard(layer)
        groups = param_groups(self.model, weight_decay=0.1)
        if name == "AdamW":
            known = [{key: group[key] for key in ("params", "weight_decay") if key in group} for group in groups]
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(known, lr=1e-3)
        else:
            self.optimizer = LearnedOptimizer(groups, lr=1e-3)
        self.seconds: list[float] = []

    def step(self, tokens: Tensor) -> None:
        begin = time.process_time()
        loss = nn.functional.cross_entropy(self.model(tokens[:, :-1]), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - begin)


def whole_updates(groups: list[dict[str, Any]]) -> int:
    """Bytes of a step that adds up seven sums per tensor and every orthogonalised matrix."""
    settings, total = Policy.from_pretrained("default").config.orthogonalization, 0
    for group in groups:
        for part in (part for p in group["params"] for part in TensorKind.of(group).parts(p)):
            matrix = settings.matrix_shape(part.shape, part.role)
            total += 8 * len(TensorSums._fields) + 4 * (math.prod(matrix) if matrix else 0)
    return total


def in_a_process(rank: int, processes: int, size: tuple[int, int], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    trainees = {name: Trainee(name, size) for name in ("AdamW", "LearnedOptimizer")}
    ours = trainees["LearnedOptimizer"]
    sent: list[int] = []
    adding: list[float] = []
    add_up = Shards.add_up

    def counted(self: Shards, sums: Tensor) -> None:
        begin = time.process_time()
        add_up(self, sums)
        adding.append(time.process_time() - begin)
        sent.append(sums.nbytes)

    Shards.add_up = counted
    generator = torch.Generator().manual_seed(0)
    share = BATCH // processes
    for _ in range(WARM_UP + STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        for trainee in trainees.values():
            dist.barrier()  # nobody waits for another's last step within its own
            trainee.step(tokens[rank * share : (rank + 1) * share])
    figures = {
        "parameters": sum(p.numel() for p in ours.model.parameters()),
        "bytes": sum(sent) / (WARM_UP + STEPS),
        "all_reduces": len(sent) // (WARM_UP + STEPS),
        "adding": sum(adding[len(adding) * WARM_UP // (WARM_UP + STEPS) :]) / STEPS,
        "whole": whole_updates(ours.optimizer.param_groups) if processes > 1 else 0,
        "seconds": {name: statistics.median(trainee.seconds[WARM_UP:]) for name, trainee in trainees.items()},
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(figures), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measured(size: tuple[int, int], processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(in_a_process, (processes, size, folder), nprocs=processes)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    seconds = {name: sum(rank["seconds"][name] for rank in ranks) for name in ranks[0]["seconds"]}
    adding = sum(rank["adding"] for rank in ranks)
    return {**ranks[0], "adding": adding, "seconds": seconds, "ratio": seconds["LearnedOptimizer"] / seconds["AdamW"]}


def main() -> None:
    runs, table = [], {}
    for width, layers in MODELS:
        for processes in PROCESSES:
            run = {"width": width, "layers": layers, "processes": processes, **measured((width, layers), processes)}
            print(run, flush=True)
            runs.append(run)
            n, shape = run["parameters"], f"{layers} layer{'s' if layers > 1 else ''} of {width}"
            table[f"{shape}, {processes} process{'es' if processes > 1 else ''}"] = {
                "parameters": f"{n:,}",
                "bytes, whole updates": f"{run['whole'] / n:.2f}",
                "bytes": f"{run['bytes'] / n:.2f}",
                "training step": f"{run['ratio']:.2f}",
                "of which all-reduces": f"{run['adding'] / run['seconds']['AdamW']:.2f}",
            }
    result = {"batch": BATCH, "length": LENGTH, "steps": STEPS, "table": table, "runs": runs}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
