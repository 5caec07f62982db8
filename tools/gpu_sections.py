"""Sections of ``measure_gpu.py``: the graph against steps without, state on the host, training steps of GPTs."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # without installation
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products need

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, Policy
from learned_optim.bench import step as bench
from learned_optim.bench.ablations import variant
from learned_optim.engine import gpu_kernels, packing, products
from learned_optim.engine import offload as offloading
from learned_optim.engine.graph import MOVES, WARM_UP, CudaCapture, StepGraph

Make = Callable[[list[Tensor]], Any]
#: Steps after which every way of making them is in its last state: captured, or captured with buffers.
SETTLED = WARM_UP + MOVES + 2


class Run(NamedTuple):
    device: str
    sizes: Sequence[int]  #: parameters of the single tensors
    repeats: int
    gpt: dict[str, int]  #: arguments of the GPT whose tensors are used
    gpt2: dict[str, int]
    batch: int
    length: int
    accumulated: tuple[int, ...] = (1, 4)  #: batches in a training step

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def shapes(self) -> list[torch.Size]:
        return [p.shape for p in bench.Gpt(**self.gpt).parameters()]

    def shapes2(self) -> list[torch.Size]:
        return [p.shape for p in tied(self.gpt2).parameters()]


def without_graph(optimizer: LearnedOptimizer) -> LearnedOptimizer:
    """The same, but every step is launched from the host."""
    optimizer._graph = StepGraph(CudaCapture(), own=False)
    return optimizer


def tied(arguments: dict[str, int]) -> bench.Gpt:
    """A GPT whose output layer is its embedding, as GPT-2's; twelve heads."""
    model = bench.Gpt(**arguments)
    model.out.weight = model.tokens.weight
    for block in model.blocks:
        block.heads = 12 if arguments["width"] % 12 == 0 else block.heads
    return model


def difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest of all coordinates."""
    pairs = [[t.detach().cpu().double() for t in pair] for pair in zip(some, others, strict=True)]
    return float(torch.stack([(a - b).abs().max() for a, b in pairs if a.numel()]).max())


def _training(run: Run, make: Make, steps: int, each: Callable[[int, Any], None] = lambda number, opt: None) -> Any:
    """Steps of a small GPT; its parameters and optimizer."""
    torch.manual_seed(0)
    model = bench.Gpt(**run.gpt).to(run.device)
    params: list[Tensor] = list(model.parameters())
    optimizer = make(params)
    tokens = torch.randint(model.tokens.num_embeddings, (run.batch, run.length + 1), device=run.device)
    for number in range(steps):
        each(number, optimizer)
        optimizer.zero_grad()
        _loss(model, tokens).backward()
        optimizer.step()
    run.wait()
    return params, optimizer


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def graph(run: Run) -> dict[str, Any]:
    """Training with a graph against steps launched one by one, with a schedule; the user's own graph; determinism."""
    steps = SETTLED + 4

    def schedule(number: int, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + number)

    def ours(params: list[Tensor]) -> LearnedOptimizer:
        return LearnedOptimizer(params, backend="compiled" if run.device == "cuda" else "auto")

    params, optimizer = _training(run, ours, steps, schedule)
    plain, _ = _training(run, lambda ps: without_graph(ours(ps)), steps, schedule)
    figures: dict[str, Any] = {
        "how it ran": optimizer.backend,
        f"graph - launches, after {steps} steps with a schedule": difference(params, plain),
    }
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (_training(run, ours, steps)[0] for _ in range(2))
        figures["deterministic algorithms, second run - first"] = difference(second, first)
    except RuntimeError as error:
        figures["deterministic algorithms"] = f"refused: {str(error).splitlines()[0]}"
    finally:
        torch.use_deterministic_algorithms(False)
    if run.device == "cuda":
        figures |= _users_graph(run) | _reduce_overhead(run, ours)
    return figures


def _users_graph(run: Run) -> dict[str, Any]:
    """A training step, the optimizer's included, captured by the user."""
    results = []
    for captured in (True, False):
        torch.manual_seed(0)
        model = bench.Gpt(**run.gpt).cuda()
        params: list[Tensor] = list(model.parameters())
        lr = torch.tensor(1e-3, device="cuda")
        optimizer = LearnedOptimizer(params, lr=lr, backend="compiled", capturable=True)
        tokens = torch.randint(model.tokens.num_embeddings, (run.batch, run.length + 1), device="cuda")

        def train(model=model, optimizer=optimizer, tokens=tokens) -> None:
            optimizer.zero_grad(set_to_none=False)
            _loss(model, tokens).backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                train()
        torch.cuda.current_stream().wait_stream(stream)
        action = train
        if captured:
            whole = torch.cuda.CUDAGraph()
            with torch.cuda.graph(whole):
                train()
            action = whole.replay
        for number in range(5):
            lr.fill_(1e-3 / (1 + number))
            action()
        torch.cuda.synchronize()
        results.append((params, float(optimizer.state[params[0]]["step"])))
    (params, count), (plain, _) = results
    return {"your own graph - steps, after 3 and 5 replays": difference(params, plain), "steps counted": count}


def _reduce_overhead(run: Run, ours: Make) -> dict[str, Any]:
    """``torch.compile(model, mode="reduce-overhead")`` with our step after it."""
    torch.manual_seed(0)
    model = bench.Gpt(**{**run.gpt, "layers": 2}).cuda()
    compiled = torch.compile(model, mode="reduce-overhead")
    optimizer = ours(list(model.parameters()))
    tokens = torch.randint(model.tokens.num_embeddings, (run.batch, run.length + 1), device="cuda")
    losses = []
    for _ in range(SETTLED + 3):
        optimizer.zero_grad()
        loss = _loss(compiled, tokens)  # pyright: ignore[reportArgumentType]
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return {"reduce-overhead": f"{optimizer.backend}; loss {losses[0]:.3f} to {losses[-1]:.3f}"}


def _muon(params: list[Tensor], lr: float = 1e-3) -> Any:
    """Torch's Muon for the matrices within, fused AdamW for embeddings, output and vectors."""
    largest = max(p.shape[0] for p in params if p.ndim == 2)
    inner = [p for p in params if p.ndim == 2 and p.shape[0] < largest and p.shape[0] * 16 > p.shape[1]]
    others = [p for p in params if all(p is not q for q in inner)]
    muon = torch.optim.Muon(inner, lr=lr)  # pyright: ignore[reportPrivateImportUsage]
    return bench._Both(muon, torch.optim.AdamW(others, lr=lr, fused=True))


def contenders() -> dict[str, Make]:
    """What trains the GPTs."""
    every: dict[str, Make] = {"AdamW (fused)": lambda ps: torch.optim.AdamW(ps, fused=True)}
    if hasattr(torch.optim, "Muon"):
        every["Muon"] = _muon
    every["ours, default"] = lambda ps: LearnedOptimizer(ps)
    every["ours, without graph"] = lambda ps: without_graph(LearnedOptimizer(ps))
    plain = variant(Policy.from_pretrained("default"), orthogonal=0.0)
    every["ours, not orthogonalised"] = lambda ps: LearnedOptimizer(ps, policy=plain)
    return every


def _clear(optimizer: Any) -> None:
    for one in getattr(optimizer, "optimizers", [optimizer]):
        one.zero_grad()


def training(run: Run, arguments: dict[str, int], is_tied: bool) -> dict[str, Any]:
    """Training steps in bfloat16 autocast, the model not compiled: ms of all of it and of the optimizer's part."""
    figures: dict[str, Any] = {"batch": run.batch, "length": run.length}
    for name, make in contenders().items():
        torch.manual_seed(0)
        model = (tied if is_tied else lambda a: bench.Gpt(**a))(arguments).to(run.device)
        params: list[Tensor] = list(model.parameters())
        optimizer = make(params)
        tokens = torch.randint(model.tokens.num_embeddings, (run.batch, run.length + 1), device=run.device)
        for batches in run.accumulated:
            whole, part, host = [], [], []
            for turn in range(-SETTLED, max(3, run.repeats // 2)):
                run.wait()
                start = time.perf_counter()
                _clear(optimizer)
                for _ in range(batches):
                    with torch.autocast(run.device, dtype=torch.bfloat16):
                        loss = _loss(model, tokens)
                    loss.backward()
                run.wait()
                before = time.perf_counter()
                optimizer.step()
                returned = time.perf_counter()
                run.wait()
                end = time.perf_counter()
                if turn >= 0:
                    whole.append(end - start)
                    part.append(end - before)
                    host.append(returned - before)
            count = sum(p.numel() for p in params)
            figures[f"{name}, {batches * run.batch * run.length:,} tokens"] = {
                "training step ms": statistics.median(whole) * 1e3,
                "optimizer ms": statistics.median(part) * 1e3,
                "host ms": statistics.median(host) * 1e3,
                "share %": 100.0 * statistics.median(part) / statistics.median(whole),
                "parameters": count,
                **({"how": optimizer.backend} if hasattr(optimizer, "backend") else {}),
            }
        del model, params, optimizer
        if run.device == "cuda":
            torch.cuda.empty_cache()
    return figures


def limits(run: Run) -> dict[str, Any]:
    """How many directions are kept at once, and how the kernels' programs are cut: ms and memory.

    The limits as they are were chosen without a GPU.
    """
    figures: dict[str, Any] = {}
    as_they_are = packing.ON_GPU, gpu_kernels.BLOCK, gpu_kernels.WARPS
    copied, block, warps = as_they_are
    for what, shapes in (("GPT", run.shapes()), ("GPT-2", run.shapes2())):
        others = (8, block, warps), (4 * copied, block, warps), (copied, 1024, 8), (copied, 1024, 4), (copied, 256, 4)
        for values in (as_they_are, *others):
            packing.ON_GPU, gpu_kernels.BLOCK, gpu_kernels.WARPS = values
            try:
                optimizer, params = bench._prepared(shapes, LearnedOptimizer, run.device)
                peak = _peak(run, optimizer)
                seconds = [bench._timed(optimizer.step, run.device) for _ in range(run.repeats)]
                figures["{}: ON_GPU {}, BLOCK {}, WARPS {}".format(what, *values)] = {
                    "ms": statistics.median(seconds) * 1e3,
                    "MB besides the state": peak / 1e6,
                    "of the state": peak / bench._state_bytes(optimizer),
                }
                del optimizer, params
            finally:
                packing.ON_GPU, gpu_kernels.BLOCK, gpu_kernels.WARPS = as_they_are
    return figures


def _peak(run: Run, optimizer: Any) -> int:
    """Most bytes that its steps have allocated beside state, parameters and gradients, the graph's own included."""
    if run.device != "cuda":
        for _ in range(SETTLED):
            optimizer.step()
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(SETTLED):
        optimizer.step()
    run.wait()
    return torch.cuda.max_memory_allocated() - before - bench._state_bytes(optimizer)


def offloaded(run: Run) -> dict[str, Any]:
    """State on the host: ms and memory of a step of GPT-2's tensors, and whether small chunks change any bits."""
    figures: dict[str, Any] = {}
    ends: list[list[Tensor]] = []
    for offload, chunk in ((False, offloading.LENT), (True, offloading.LENT), (True, offloading.LENT >> 4)):
        as_it_is, offloading.LENT = offloading.LENT, chunk
        try:
            optimizer, params = bench._prepared(
                run.shapes2(), lambda ps, offload=offload: LearnedOptimizer(ps, offload=offload), run.device
            )
            peak = _peak(run, optimizer) + (0 if offload else bench._state_bytes(optimizer))
            seconds = [bench._timed(optimizer.step, run.device) for _ in range(run.repeats)]
            row = {"ms": statistics.median(seconds) * 1e3, "MB with the state": peak / 1e6, "ran": optimizer.backend}
            figures[f"chunks of {chunk}" if offload else "on the device"] = row
            ends.append([p.detach().cpu() for p in params])
            del optimizer, params
        finally:
            offloading.LENT = as_it_is
    for end, what in zip(ends[1:], ("as it is", "in small chunks"), strict=True):
        figures[f"offloaded {what} - on the device"] = max(
            float((a - b).abs().max()) for a, b in zip(end, ends[0], strict=True)
        )
    return figures


def _without_decay(params: list[Tensor]) -> LearnedOptimizer:
    return LearnedOptimizer(params, weight_decay=0.0)


def two_bytes(run: Run) -> dict[str, Any]:
    """Directions in two bytes: ms of a step of GPT-2's tensors, and how far updates of its matrices differ."""
    figures: dict[str, Any] = {}
    reference: list[Tensor] = []
    for dtype in (None, torch.bfloat16, torch.float16):
        products.DIRECTIONS = dtype
        try:
            optimizer, params = bench._prepared(run.shapes2(), _without_decay, run.device)
            before = [p.detach().clone() for p in params if p.ndim == 2]
            optimizer.step()
            moved = [p.detach() - q for p, q in zip((p for p in params if p.ndim == 2), before, strict=True)]
            reference = reference or moved
            off = [float((a - b).norm() / b.norm()) for a, b in zip(moved, reference, strict=True)]
            for _ in range(SETTLED):
                optimizer.step()
            seconds = [bench._timed(optimizer.step, run.device) for _ in range(run.repeats)]
            figures[str(dtype or torch.float32)] = {
                "ms": statistics.median(seconds) * 1e3,
                "updates differ by at most": max(off),
                "on average by": math.fsum(off) / len(off),
            }
            del optimizer, params
        finally:
            products.DIRECTIONS = None
    return figures
