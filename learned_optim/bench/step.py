"""What a step costs: nanoseconds and bytes per parameter, ours against hand-designed optimizers.

All optimizers take turns in one process, so that whatever else the machine does hits all alike; figures are medians
over the turns, with quartiles, and ratios of medians to ``torch.optim.AdamW`` as it is by default. With a GPU the
same is measured there, too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim.bench.ablations import variant
from learned_optim.bench.config import StepBenchConfig
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.policy.policy import Policy

REFERENCE = "AdamW"
#: The bundled default, whose matrices are orthogonalised; the other rows of ours are the same without that.
ORTHOGONAL = "ours, default"
Progress = Callable[[str], None]


class Gpt(nn.Module):
    """A small GPT: 76 tensors, 12.6 million parameters.

    Args:
        width: of the residual stream.
        layers: attention and feed-forward blocks.
        vocabulary: tokens.
        length: positions.
    """

    def __init__(self, width: int = 256, layers: int = 12, vocabulary: int = 6_016, length: int = 256) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width, bias=False), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 4
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=2))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class _Both:
    """Two optimizers as one: Muon takes matrices only."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = optimizers
        self.state = {p: s for optimizer in optimizers for p, s in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.state = {p: s for optimizer in self.optimizers for p, s in optimizer.state.items()}


def _muon(params: list[Tensor]) -> Any:
    matrices = [p for p in params if p.ndim == 2]
    others = [p for p in params if p.ndim != 2]
    muon = torch.optim.Muon(matrices)  # pyright: ignore[reportPrivateImportUsage]
    return _Both(muon, torch.optim.AdamW(others)) if others else muon


def contenders(params: list[Tensor]) -> dict[str, Callable[[list[Tensor]], Any]]:
    """Optimizers by name, those that this installation has and that suit these tensors."""
    optimizers: dict[str, Callable[[list[Tensor]], Any]] = {
        REFERENCE: torch.optim.AdamW,
        "AdamW (foreach)": lambda ps: torch.optim.AdamW(ps, foreach=True),
        "AdamW (fused)": lambda ps: torch.optim.AdamW(ps, fused=True),
    }
    matrices = any(p.ndim == 2 for p in params)
    # Muon's products grow with the third power of a matrix's side, minutes for the largest; ours are of blocks.
    if hasattr(torch.optim, "Muon") and matrices and max(p.numel() for p in params) <= 1 << 22:
        optimizers["Muon"] = _muon
    try:
        from schedulefree import AdamWScheduleFree

        optimizers["schedule-free AdamW"] = AdamWScheduleFree
    except ImportError:
        pass
    if matrices:
        optimizers[ORTHOGONAL] = lambda ps: LearnedOptimizer(ps, backend="compiled")
    plain = variant(Policy.from_pretrained("default"), orthogonal=0.0)
    rest: dict[str, dict[str, Any]] = {
        "eager": {"backend": "eager"}, "compiled": {}, "safeguard": {"safeguard": True},
        "bfloat16 state": {"state_dtype": torch.bfloat16},
    }  # fmt: skip
    for name, options in rest.items():
        options = {"policy": plain, "backend": "compiled", **options}
        optimizers[f"ours, {name}"] = lambda ps, options=options: LearnedOptimizer(ps, **options)
    return optimizers


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(action: Callable[[], Any], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def _alternate(actions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each action, taken in turns; the first two turns do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(-2, repeats):
        for name, action in actions.items():
            took = _timed(action, device)
            if turn >= 0:
                seconds[name].append(took)
    return seconds


def _summary(seconds: dict[str, list[float]], unit: float) -> dict[str, dict[str, float]]:
    """Median and quartiles in units, and the ratio of medians to the reference's."""
    reference = statistics.median(seconds[REFERENCE])
    rows = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        rows[name] = {"median": middle / unit, "low": low / unit, "high": high / unit, "ratio": middle / reference}
    return rows


def _prepared(shapes: Iterable[Sequence[int]], make: Callable[[list[Tensor]], Any], device: str) -> tuple[Any, list]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.randn(shape, generator=generator, device=device).mul_(0.02).requires_grad_()
        p.grad = torch.randn(shape, generator=generator, device=device).mul_(1e-3)
        params.append(p)
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer, params


def _state_bytes(optimizer: Any) -> int:
    return sum(
        t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)
    )


def steps(shapes: Sequence[Sequence[int]], repeats: int, device: str = "cpu") -> dict[str, Any]:
    """Optimizer steps over tensors of these shapes.

    Returns:
        By optimizer: ``median``, ``low`` and ``high`` (quartiles) in ns per parameter, ``ratio`` to AdamW's median,
        ``bytes`` of state per parameter.
    """
    count = sum(math.prod(shape) for shape in shapes)
    made = {
        name: _prepared(shapes, make, device)
        for name, make in contenders([torch.empty(s, device="meta") for s in shapes]).items()
    }
    rows = _summary(_alternate({name: made[name][0].step for name in made}, repeats, device), count * 1e-9)
    for name, row in rows.items():
        row["bytes"] = _state_bytes(made[name][0]) / count
    return {"parameters": count, "tensors": len(shapes), "optimizers": rows}


def training_steps(
    repeats: int,
    device: str = "cpu",
    batch: int = 8,
    length: int = 256,
    names: Sequence[str] = (REFERENCE, ORTHOGONAL, "ours, compiled"),
) -> dict[str, Any]:
    """Whole training steps of the GPT: zero_grad, forward, backward, step.

    Returns:
        By optimizer: ``median``, ``low`` and ``high`` in ms, ``ratio`` to AdamW's median.
    """
    model = Gpt().to(device)
    params: list[Tensor] = list(model.parameters())
    made = {name: make(params) for name, make in contenders(params).items() if name in names}
    tokens = torch.randint(
        model.tokens.num_embeddings, (batch, length + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)

    def train(optimizer: Any) -> None:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    actions = {name: (lambda o=optimizer: train(o)) for name, optimizer in made.items()}
    rows = _summary(_alternate(actions, repeats, device), 1e-3)
    return {"batch": batch, "length": length, "optimizers": rows}


def _matrix(size: int) -> tuple[int, int]:
    """The most square shape of this many coordinates."""
    rows = next(r for r in range(math.isqrt(size), 0, -1) if size % r == 0)
    return rows, size // rows


def _free_memory() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8e9


def run(
    sizes: Sequence[int] = StepBenchConfig.sizes,
    repeats: int = StepBenchConfig.repeats,
    out: str | Path | None = None,
    *,
    threads: int = 0,
    model: bool = True,
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """Measure, on the CPU and on a GPU if there is one.

    Args:
        sizes: parameters of the single tensors.
        repeats: steps of each optimizer that count.
        out: folder for ``results.json``, ``table.md`` and ``plots/step_time.png`` (the last needs matplotlib).
        threads: that torch computes with; 0 leaves its setting.
        model: also measure the GPT.
        progress: hears what is measured next.

    Returns:
        Settings of the machine, and for each device ``cases`` and ``training``; see :func:`steps`.
    """
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        result: dict[str, Any] = {
            "torch": torch.__version__, "threads": torch.get_num_threads(), "load": load, "repeats": repeats,
            "devices": {device: _on(device, sizes, repeats, model, progress) for device in devices},
        }  # fmt: skip
    finally:
        torch.set_num_threads(before)
    if out is not None:
        plots = Path(out) / "plots"
        plots.mkdir(parents=True, exist_ok=True)
        (plots.parent / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (plots.parent / "table.md").write_text(table(result), encoding="utf-8")
        draw(result, plots / "step_time.png")
    return result


def _on(device: str, sizes: Sequence[int], repeats: int, model: bool, progress: Progress) -> dict[str, Any]:
    measured: dict[str, Any] = {"cases": [], "training": None}
    for size in sizes:
        # Seven optimizers with their own parameters, gradients and state: 8 to 32 bytes each.
        if 150.0 * size < _free_memory():
            progress(f"{device}: one tensor of {size:,} parameters")
            measured["cases"].append(steps([_matrix(size)], max(3, repeats if size < 5e7 else repeats // 3), device))
    if model:
        progress(f"{device}: a GPT's tensors")
        shapes = [p.shape for p in Gpt().parameters()]
        measured["cases"] += [steps(s, repeats, device) for s in ([_matrix(sum(map(math.prod, shapes)))], shapes)]
        progress(f"{device}: a GPT's training steps")
        measured["training"] = training_steps(max(3, repeats // 3), device)
    return measured


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"torch {result['torch']}, {result['threads']} threads, load {result['load']:.1f} at the start; medians "
             f"of {result['repeats']} steps taken in turns, quartiles in brackets.", ""]  # fmt: skip
    for device, measured in result["devices"].items():
        lines += [f"| {device}: optimizer | tensors | parameters | ns per parameter | × AdamW | bytes of state each |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for case in measured["cases"]:
            for name, row in case["optimizers"].items():
                lines.append(
                    f"| {name} | {case['tensors']} | {case['parameters']:,} | {row['median']:.2f} "
                    f"({row['low']:.2f}–{row['high']:.2f}) | {row['ratio']:.2f} | {row['bytes']:.0f} |"
                )
        if measured["training"]:
            of = measured["training"]
            title = f"{device}: training step of the GPT, batch {of['batch']} × {of['length']}"
            lines += ["", f"| {title} | ms | × AdamW |", "|---|---|---|"]
            lines += [f"| {name} | {row['median']:.0f} ({row['low']:.0f}–{row['high']:.0f}) | {row['ratio']:.3f} |"
                      for name, row in of["optimizers"].items()]  # fmt: skip
        lines.append("")
    return "\n".join(lines)


_VARIANTS = ("ours, safeguard", "ours, bfloat16 state")
_COLOURS = {"ours, default": "#0072B2", "ours, compiled": "#D55E00", "ours, eager": "#E69F00",
            "ours, safeguard": "#000000", "ours, bfloat16 state": "#CC79A7"}  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> Path | None:
    """Nanoseconds per parameter against the size of one tensor; ``None`` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    devices = result["devices"]
    figure = Figure(figsize=(6.0 * len(devices) + 1.5, 4.2), layout="constrained")
    for axes, (device, values) in zip(figure.subplots(1, len(devices), squeeze=False)[0], devices.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for case in sorted(values["cases"], key=lambda c: c["parameters"]):
            for name, row in case["optimizers"].items() if case["tensors"] == 1 else ():
                lines.setdefault(name, []).append((case["parameters"], row["median"]))
        for name, points in lines.items():
            ours = name.startswith("ours")
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, linewidth=2.5 if ours else 1.2,
                      color=_COLOURS.get(name), linestyle=":" if name in _VARIANTS else "-")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="parameters of one tensor", ylabel="ns per parameter and step",
                 title=f"A step on {device}" + f", {result['threads']} threads" * (device == "cpu"))  # fmt: skip
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)
    return path


def run_config(config: StepBenchConfig, out: str | Path | None = None, progress: Progress = lambda what: None) -> dict:
    """:func:`run` with the settings of a command line."""
    return run(**dataclasses.asdict(config), out=out, progress=progress)
