"""Do two checkouts make the same updates, bit by bit? Every bundled policy, backend, dtype, shards, meta-training.

    python tools/compare_commits.py OLD NEW [--only default]

Each scenario runs in a process of its own per checkout, with that checkout's package and bundled policies, and prints
a hash of everything that it computed: parameters and state, or the weights that meta-training made. Only the public API
is used, so that the two may differ in everything else. Exit status 1 if any scenario differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

SHAPES = [(), (0,), (7,), (512,), (40, 30), (30, 40), (8, 3, 3, 3), (64, 128), (300, 130), (400, 300), (3000, 20)]
#: Meta-trainings, all two outer steps from the base mixture.
RUNS: dict[str, dict[str, Any]] = {
    "es": {"estimator": "es", "max_length": 12},
    "es, vectorized": {"estimator": "es", "max_length": 12, "pairs": 2},
    "es, vectorized, compiled": {"estimator": "es", "max_length": 12, "pairs": 2, "backend": "compiled"},
    "pes": {"estimator": "pes", "unroll_length": 6},
    "backprop": {"estimator": "backprop", "unroll_length": 6},
    "backprop, compiled": {"estimator": "backprop", "unroll_length": 6, "backend": "compiled"},
    "backprop, second order": {"estimator": "backprop", "unroll_length": 4, "second_order": True},
    "backprop, recomputed, fixed scale": {
        "estimator": "backprop", "unroll_length": 8, "checkpoint_segment": 2, "fixed_scale": True,
    },
    "backprop from default": {"estimator": "backprop", "unroll_length": 6, "start": "default"},
    "es from default, vectorized, compiled": {
        "estimator": "es", "max_length": 12, "pairs": 2, "backend": "compiled", "start": "default",
    },
    "backprop, GRU": {"estimator": "backprop", "unroll_length": 6, "start": "gru"},
    "mixed": {"estimator": "mixed", "unroll_length": 6, "meta_batch": 4},
}  # fmt: skip


def scenarios() -> dict[str, Callable[[], Iterable[Any]]]:
    """By name; each yields tensors."""
    table: dict[str, Callable[[], Iterable[Any]]] = {}
    for policy in ("default", "pretraining", "reader"):
        for backend in ("eager", "compiled"):
            for dtype in ("float32", "bfloat16"):
                table[f"{policy}, {backend}, {dtype}"] = partial(steps, policy, dtype, backend=backend)
            table[f"{policy}, {backend}, two-byte state"] = partial(
                steps, policy, "float32", backend=backend, two_bytes=True
            )
            table[f"{policy}, {backend}, safeguard"] = partial(
                steps, policy, "float32", backend=backend, safeguard=True
            )
        table[f"{policy}, eager, float64"] = partial(steps, policy, "float64", backend="eager")
        table[f"{policy}, eager, two processes"] = partial(sharded, policy, "eager")
        table[f"{policy}, compiled, two processes"] = partial(sharded, policy, "compiled")
    table["GRU, eager, float32"] = partial(steps, "gru", "float32", backend="eager")
    for name, options in RUNS.items():
        table[f"meta-training, {name}"] = partial(meta_trained, options)
    return table


def steps(
    policy: str, dtype: str, *, backend: str, two_bytes: bool = False, safeguard: bool = False, mesh: Any = None
) -> Iterable[Any]:
    """Eight steps over tensors of many shapes, in two groups."""
    import torch

    from learned_optim import LearnedOptimizer, Policy, PolicyConfig

    rng = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=rng).to(getattr(torch, dtype)).requires_grad_() for shape in SHAPES]
    if mesh is not None:
        from torch.distributed.tensor import Shard, distribute_tensor

        sharded = [distribute_tensor(p.detach(), mesh, [Shard(0)]) for p in params if p.ndim]
        params = [torch.nn.Parameter(p) for p in sharded]
    rule: Any = policy
    if policy == "gru":
        rule = Policy(PolicyConfig.gru(), generator=torch.Generator().manual_seed(0))
    groups = [{"params": params[::2], "lr": 1e-2, "weight_decay": 0.1}, {"params": params[1::2], "betas": (0.8, 0.99)}]
    options = {"state_dtype": torch.bfloat16} if two_bytes else {}
    optimizer = LearnedOptimizer(groups, policy=rule, backend=backend, safeguard=safeguard, **options)
    for step in range(8):
        for p in params:
            g = torch.randn(p.shape, generator=rng).to(p.dtype)
            if step == 3:
                g *= 100.0
            if mesh is not None:
                g = distribute_tensor(g, mesh, [Shard(0)])
            p.grad = g if step != 5 or p.ndim != 1 else None
        optimizer.step()
        optimizer.diagnostics()
    for p in params:
        for tensor in (p.detach(), *optimizer.state[p].values()):
            yield tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded(policy: str, backend: str) -> Iterable[Any]:
    """The same in two processes, each of which holds a part of every tensor."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (policy, backend, folder), nprocs=2)
        for path in sorted(Path(folder).glob("*.pt")):
            yield from torch.load(path)


def _process(rank: int, policy: str, backend: str, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    tensors = [t.clone() for t in steps(policy, "float32", backend=backend, mesh=mesh)]
    torch.save(tensors, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def meta_trained(options: dict[str, Any]) -> Iterable[Any]:
    """Weights after two outer steps on small tasks of the zoo, an RNN among them."""
    from learned_optim.meta_train import MetaTrainConfig, meta_train

    settings = {"outer_steps": 2, "meta_batch": 2, "validate_every": 0, "inner_lr": 1e-2, "backend": "eager"}
    result = meta_train(MetaTrainConfig(**{**settings, "tasks": ("mlp_images", "gru_char"), **options}))
    yield from (weight.detach() for weight in result.last.weights().values())


def run(name: str) -> str:
    """The hash of a scenario, in this process."""
    import torch

    torch.set_num_threads(1)
    digest = hashlib.sha256()
    for tensor in scenarios()[name]():
        data = tensor.detach().contiguous().reshape(-1)
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return digest.hexdigest()


def hashed(checkout: Path, name: str) -> str:
    """The hash of a scenario in a checkout; what went wrong, where it did."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, __file__, "--run", name]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    lines = done.stdout.split() if done.returncode == 0 else done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkouts", nargs="*", type=Path, help="two folders")
    parser.add_argument("--only", default="", help="scenarios with this in their name")
    parser.add_argument("--run", metavar="NAME", help="run one scenario in this process")
    arguments = parser.parse_args()
    if arguments.run:
        print(run(arguments.run))
        return 0
    if len(arguments.checkouts) != 2:
        parser.error("give two checkouts")
    different = 0
    names = [name for name in scenarios() if arguments.only in name]
    for name in names:
        old, new = (hashed(checkout, name) for checkout in arguments.checkouts)
        same = old == new and len(old) == 64
        different += not same
        what = "same" if same else f"DIFFERENT: {old[:80]} | {new[:80]}"
        print(f"{name}: {what}", flush=True)
    print(f"{len(names) - different} of {len(names)} scenarios have the same bits")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
