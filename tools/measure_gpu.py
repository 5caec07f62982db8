"""What the optimizer does on a GPU: its graph, agreement with the CPU, launches, time, memory.

    python tools/measure_gpu.py --out gpu-out/gpu.json       # and gpu-out/gpu.md
    python tools/measure_gpu.py --show gpu-out/gpu.json      # as docs/gpu.json and docs/gpu.md

Says nothing where there is no GPU. A section that fails is recorded, with its traceback, and the next one goes on;
the files are written after every section. With ``--seconds`` no section is begun that is not expected to end in time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # without installation
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_sections
import torch
from gpu_sections import Run, difference, without_graph
from torch import Tensor

from learned_optim import LearnedOptimizer
from learned_optim.bench import step as bench

#: 0-d, empty, tiny, rows of the kernels and rests of them, a convolution, a matrix that is run where it lies.
SHAPES = [(), (0,), (3,), (512,), (1541,), (40, 130), (8, 3, 3, 3), (256, 1024), (1100, 1031)]
#: Optimizer of each way to run it, its device left open.
WAYS = {"eager on the CPU": "eager", "eager on the GPU": "eager", "compiled on the GPU": "compiled"}
#: Optimizers of which more than their time is told.
WITHOUT = "ours, default without graph"
SHOWN = (bench.REFERENCE, "AdamW (fused)", "ours, eager", "ours, compiled", bench.ORTHOGONAL, WITHOUT)
DOCS = Path(__file__).resolve().parents[1] / "docs" / "gpu.json"
#: What a host does to start work on a GPU, and to wait for it.
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaGraphLaunch",
)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
#: What the profiler shows as events on the GPU that are none.
ANNOTATIONS = ("Optimizer.step", "Torch-Compiled Region", "## Call CompiledFxGraph", "ProfilerStep")
FIRST_STEP = """
import sys, time, torch
from learned_optim import LearnedOptimizer
from learned_optim.bench.step import _prepared
opt, _ = _prepared([(300, 300)] * 3, lambda ps: LearnedOptimizer(ps, backend="compiled"), sys.argv[1])
start = time.perf_counter()
opt.step()
if sys.argv[1] == "cuda":
    torch.cuda.synchronize()
print(time.perf_counter() - start, opt.backend, sep="|")
"""


def environment(run: Run) -> dict[str, Any]:
    card = torch.cuda.get_device_name() if run.device == "cuda" else "none"
    return {"card": card, "torch": torch.__version__, "cuda": str(torch.version.cuda), "python": sys.version.split()[0]}


def _parameters(dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(0.1 * torch.randn(s, generator=generator)).to(device, dtype).requires_grad_() for s in SHAPES]


def _steps(optimizer: Any, params: list[Tensor], first: int, last: int, broken: int | None = None) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 + step)
        for i, p in enumerate(params):
            p.grad = (1e-2 * torch.randn(p.shape, generator=generator)).to(p)
            if i == broken:
                p.grad.view(-1)[-1] = float("nan")
        optimizer.step()


def agreement(run: Run) -> dict[str, Any]:
    """Largest differences of parameters after 10 steps, whose updates add up to some 0.01."""
    figures: dict[str, Any] = {}
    options = [(torch.float32, {}), (torch.bfloat16, {}), (torch.float16, {}), (torch.float32, {"safeguard": True}),
               (torch.float32, {"state_dtype": torch.bfloat16}), (torch.float32, {"offload": True})]  # fmt: skip
    for dtype, more in options:
        ends: dict[str, list[Tensor]] = {}
        for way, backend in WAYS.items():
            params = ends[way] = _parameters(dtype, "cpu" if way.endswith("CPU") else run.device)
            optimizer = LearnedOptimizer(params, backend=backend, **more)
            _steps(optimizer, params, 0, 10)
            figures[f"how it ran {way}"] = optimizer.backend
        reference, eager, compiled = ends.values()
        what = " ".join(map(str, (dtype, *more)))
        figures[f"{what}: eager, GPU - CPU"] = difference(eager, reference)
        figures[f"{what}: GPU, compiled - eager"] = difference(compiled, eager)
        again = _parameters(dtype, run.device)
        make = partial(LearnedOptimizer, again, backend=WAYS["compiled on the GPU"], **more)
        optimizer = make()
        _steps(optimizer, again, 0, 5)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = make()
        optimizer.load_state_dict(saved)
        _steps(optimizer, again, 5, 10)
        figures[f"{what}: compiled, stopped and resumed - straight"] = difference(again, compiled)
    for first, second in (("eager on the CPU", "compiled on the GPU"), ("compiled on the GPU", "eager on the CPU")):
        devices = ["cpu" if way.endswith("CPU") else run.device for way in (first, second)]
        params = _parameters(torch.float32, devices[0])
        optimizer = LearnedOptimizer(params, backend=WAYS[first])
        _steps(optimizer, params, 0, 5)
        moved = [p.detach().to(devices[1], copy=True).requires_grad_() for p in params]
        resumed = LearnedOptimizer(moved, backend=WAYS[second])
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        _steps(resumed, moved, 5, 10)
        straight = _parameters(torch.float32, "cpu")
        _steps(LearnedOptimizer(straight, backend="eager"), straight, 0, 10)
        figures[f"checkpoint from {first} to {second} - straight"] = difference(moved, straight)
    for way, backend in list(WAYS.items())[1:]:
        clean, dirty = _parameters(torch.float32, run.device), _parameters(torch.float32, run.device)
        _steps(LearnedOptimizer(clean, backend=backend), clean, 0, 2)
        _steps(LearnedOptimizer(dirty, backend=backend), dirty, 0, 2, broken=5)
        figures[f"{way}: NaN in one tensor, others differ by"] = difference(
            dirty[:5] + dirty[6:], clean[:5] + clean[6:]
        )
        figures[f"{way}: NaN in one tensor, it is hurt"] = bool(dirty[5].isnan().any())
    return figures


def first_step(run: Run) -> dict[str, Any]:
    """Seconds of the first compiled step in a new process, with an empty cache folder and with a filled one."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        env["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        for cache in ("empty", "filled"):
            command = [sys.executable, "-c", FIRST_STEP, run.device]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            seconds, figures["backend"] = done.stdout.strip().split("|")
            figures[f"seconds, {cache} cache"] = float(seconds)
    return figures


def _choose(*names: str) -> dict[str, Callable]:
    every = bench.contenders([torch.empty(8, 8)])
    every[WITHOUT] = lambda params: without_graph(LearnedOptimizer(params, backend="compiled"))
    return {name: every[name] for name in names if name in every}


def launches(run: Run) -> dict[str, Any]:
    """Of one step of the GPT's tensors: kernels and copies on the GPU, time there, time until ``step`` returns.

    Launches and waits of the host are those of its calls into CUDA's runtime, less the wait that ends the measurement.
    """
    from torch.profiler import ProfilerActivity, profile

    figures: dict[str, Any] = {}
    for name, make in _choose(*SHOWN).items():
        optimizer, _ = bench._prepared(run.shapes(), make, run.device)
        for _ in range(gpu_sections.SETTLED):
            optimizer.step()
        host = []
        for _ in range(run.repeats):
            run.wait()
            start = time.perf_counter()
            optimizer.step()
            host.append(time.perf_counter() - start)
        run.wait()
        on_gpu = run.device == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
            optimizer.step()
            run.wait()
        of_gpu = [e for e in seen.events() if (e.device_type == torch.autograd.DeviceType.CUDA) == on_gpu]
        events = [e for e in of_gpu if not (getattr(e, "is_user_annotation", False) or e.name.startswith(ANNOTATIONS))]
        longest: dict[str, list[float]] = {}
        for event in events:
            of = longest.setdefault(event.name[:80], [0, 0.0])
            of[0] += 1
            of[1] += event.device_time_total / 1e3
        by_host = sum(e.name.startswith(LAUNCHES) for e in seen.events())
        waits = max(0, sum(e.name.startswith(WAITS) for e in seen.events()) - 2)  # ours, and the profiler's
        figures[name] = {
            "launches by the host": by_host, "kernels": len(events), "waits": waits,
            "host ms": sorted(host)[len(host) // 2] * 1e3,
            "GPU ms": sum(ms for _, ms in longest.values()),
            "longest": dict(sorted(longest.items(), key=lambda item: -item[1][1])[:12]),
        }  # fmt: skip
        del optimizer, _
    return figures


def _case(shapes: Callable[[Run], Any]) -> Callable[[Run], Any]:
    return lambda run: bench.steps(shapes(run), run.repeats, run.device)


def memory(run: Run) -> dict[str, Any]:
    """Bytes allocated at most during a step beyond those before it, over the bytes of the state."""
    figures: dict[str, Any] = {}
    for what, shapes in (("one tensor", [bench._matrix(run.sizes[-1])]), ("the GPT's tensors", run.shapes())):
        for name, make in _choose(*SHOWN).items():
            optimizer, params = bench._prepared(shapes, make, run.device)
            for _ in range(2):
                optimizer.step()
            row = figures[f"{what}: {name}"] = {"state MB": bench._state_bytes(optimizer) / 1e6}
            if run.device == "cuda":
                run.wait()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                optimizer.step()
                run.wait()
                row["MB besides"] = (torch.cuda.max_memory_allocated() - before) / 1e6
                row["besides / state"] = row["MB besides"] / row["state MB"]
            del optimizer, params
    return figures


def sections(run: Run) -> dict[str, Callable[[Run], Any]]:
    """By title, the most telling first."""
    by_title: dict[str, Callable[[Run], Any]] = {
        "environment": environment,
        "graph": gpu_sections.graph,
        "launches": launches,
        "training steps, GPT": lambda run: gpu_sections.training(run, run.gpt, False),
        "training steps, GPT-2": lambda run: gpu_sections.training(run, run.gpt2, True),
        "steps, the GPT's tensors": _case(lambda run: run.shapes()),
    }
    for number, size in reversed(list(enumerate(run.sizes))):
        by_title[f"steps, one tensor of {size:,}"] = _case(lambda run, n=number: [bench._matrix(run.sizes[n])])
    last = {"memory": memory, "limits": gpu_sections.limits, "two-byte directions": gpu_sections.two_bytes}
    last |= {"offload": gpu_sections.offloaded, "agreement": agreement}
    return {**by_title, **last, "first step": first_step}


#: What the page says before its figures; what nobody has measured is said in place of them.
ABOUT = Path(__file__).with_name("gpu_about.md").read_text(encoding="utf-8")
UNMEASURED = """**Not measured yet:** the kernels, the graph, `capturable=True`, `offload=True`, padded batches and
two-byte directions. The two passes over memory are Triton kernels that are generated from the rule, each launched once
for all parameters of a dtype, and once more for every 16 million coordinates of matrices
(`learned_optim/engine/gpu.py`). The tests run them in Triton's interpreter, and compile them for an H100: loads and
stores of 16 bytes, 80 and 94 registers, none spilt. They read and write 56 bytes per parameter in float32, fused AdamW
28. What follows is from before there were any of these: other kernels, for one tensor or a packed row of them, launched
from the host one operation at a time.
"""


def markdown(results: dict[str, Any]) -> str:
    lines = [ABOUT, *([] if "graph" in results else [UNMEASURED]), "## Figures", ""]
    lines += ["Made by `tools/measure_gpu.py`. Steps in ns per parameter, memory in MB.", ""]
    for title, section in results.items():
        rows = section.get("result", {"failed": section.get("error", "").strip().splitlines()[-1:]})
        lines += [f"### {title} ({section['seconds']:.0f} s)", "", "|  |  |", "| --- | --- |"]
        for key, value in {**rows, **rows.get("optimizers", {})}.items():
            if key not in ("optimizers", "longest"):
                lines.append(f"| {key} | {_cell(value)} |")
        lines += [f"| warning | {text} |" for text in section.get("warnings", [])] + [""]
    return "\n".join(lines).rstrip("\n").replace("\n\n\n", "\n\n") + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(x)}" for key, x in value.items() if key != "longest")
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def write(out: Path, results: dict[str, Any]) -> None:
    """The figures, and the page beside them."""
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu.json", help="JSON; the table is written beside it")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # "cpu" tries the script itself, in small
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no section after these")
    parser.add_argument("--show", metavar="FILE", help="measure nothing: make docs/gpu.* of this file")
    parser.add_argument("--docs", action="store_true", help="make docs/gpu.* of what was measured, in the end")
    parser.add_argument("--only", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.show:
        write(DOCS, json.loads(Path(given.show).read_text(encoding="utf-8")))
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        return
    gpt2 = {"width": 768, "layers": 12, "vocabulary": 50_304, "length": 1024}
    run = Run(given.device, (10**6, 10**7, 10**8), given.repeats, {"length": 1024}, gpt2, 16, 1024)
    if given.device == "cpu":
        small = {"width": 8, "layers": 2, "vocabulary": 50, "length": 8}
        run = Run("cpu", (1000, 3000), given.repeats, small, small, 1, 4)
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    begun = time.perf_counter()
    for title, section in sections(run).items():
        if given.only and not title.startswith(tuple(given.only)):
            continue
        if time.perf_counter() - begun > given.seconds:
            print(f"{title}: not begun, time is up", flush=True)
            continue
        start = time.perf_counter()
        row = results[title] = {}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            try:
                row["result"] = section(run)
            except Exception:
                row["error"] = traceback.format_exc()
        row["seconds"] = time.perf_counter() - start
        row["warnings"] = sorted({str(w.message)[:500] for w in said})
        write(out, results)
        print(f"{title}: {row['seconds']:.1f} s{', FAILED' if 'error' in row else ''}", flush=True)
        gc.collect()
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
    if given.docs:
        write(DOCS, results)


if __name__ == "__main__":
    main()
