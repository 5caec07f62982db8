"""The rule's passes as a C++ library: generated from the rule, compiled once per machine, kept on disk.

Three functions, each over many tensors in one call. Tensors come as addresses, coordinates in any order that all of a
parameter's tensors share. A tensor's bits depend on that tensor alone: not on the tensors beside it, nor on threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learned_optim import rule
from learned_optim.engine.codegen import CPP, CPP_TYPES, Names, generate
from learned_optim.engine.head import coefficient_count, head_pass
from learned_optim.engine.kernels import NO_COMPILER, CompilationError, find_compiler
from learned_optim.engine.param_state import arithmetic_dtype
from learned_optim.engine.traced import MEASURED, SCALARS, SUMS, passes, weight_count
from learned_optim.rule.cells import CELLS
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.layouts import ShapeContext, TensorShapes
from learned_optim.rule.types import TensorState, TensorSums

#: Infinities and NaN mean what they mean in torch, and integers wrap around; traps and errno, which nobody reads,
#: would stop SIMD. Without -fopenmp: for GCC and Clang it means different libraries, and torch has loaded one.
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fwrapv",
    "-fPIC", "-w",
)  # fmt: skip

_ONE_AT_A_TIME = threading.Lock()


class Kind(NamedTuple):
    """What a library is specialised to."""

    config: PolicyConfig
    dtypes: tuple[torch.dtype, ...]  #: parameter, gradient, state tensors

    @property
    def arithmetic(self) -> torch.dtype:
        return arithmetic_dtype(self.dtypes[0])


@cache
def library(kind: Kind) -> ctypes.CDLL | CompilationError:
    """The library, compiled or loaded on the first call in a process; what went wrong is not tried again."""
    try:
        with _ONE_AT_A_TIME:  # another thread's library is on disk by then
            loaded = _loaded(kind)
        for name, arguments in _ARGUMENTS.items():
            if hasattr(loaded, name):
                getattr(loaded, name).argtypes = arguments
                getattr(loaded, name).restype = None
        return loaded
    except Exception as error:  # a compiler, a disk or a loader may fail in any way: the eager backend is there
        return CompilationError.of(error, error.stderr if isinstance(error, subprocess.CalledProcessError) else None)


def _loaded(kind: Kind) -> ctypes.CDLL:
    path = _cache_folder() / f"{_key(kind)}.so"
    if path.exists() and _ours(path):
        with suppress(OSError):  # of a file that a full disk or a crash has damaged: it is made again
            return ctypes.CDLL(str(path))
    source = _source(kind)
    try:
        _compile(source, path)
        return ctypes.CDLL(str(path))
    except OSError:  # nothing can be kept there, or nothing run from there
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / path.name
            _compile(source, path)
            return ctypes.CDLL(str(path))  # stays loaded without its file


def _compile(source: str, path: Path) -> None:
    compiler = find_compiler("cpu")
    if compiler is None:
        raise FileNotFoundError(NO_COMPILER["cpu"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        text, code, built = (Path(folder) / f"kernel.{ending}" for ending in ("cpp", "o", "so"))
        text.write_text(source, encoding="utf-8")
        for command in ([*_FLAGS, "-c", text, "-o", code], ["-shared", code, "-o", built]):
            subprocess.run([compiler, *map(str, command)], check=True, capture_output=True, text=True)
        os.replace(built, path)


def _key(kind: Kind) -> str:
    """Equal if and only if the library is: of the machine, of the rule's source, of this folder's, and of the kind."""
    compiler = os.path.realpath(shutil.which(find_compiler("cpu") or "") or "")
    parts = [
        platform.machine(), _processor(), compiler, str(os.stat(compiler).st_mtime_ns), str(_FLAGS),
        json.dumps(kind.config.to_dict()), repr(kind.dtypes), torch.__version__, str(torch.get_default_dtype()),
        *_sources([*rule.__path__, str(Path(__file__).parent)]),
    ]  # fmt: skip
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))


def _sources(folders: Iterable[str]) -> list[str]:
    """Everything that the folders' files say: all of the rule, since a list of modules would be forgotten."""
    paths = [
        path for folder in folders for ending in ("py", "cpp") for path in sorted(Path(folder).rglob(f"*.{ending}"))
    ]
    return [part for path in paths for part in (path.name, path.read_text(encoding="utf-8"))]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "learned_optim" / "kernels"


def _ours(path: Path) -> bool:
    """Whether the file is this user's own: what others have put into a shared folder is not run."""
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()


def _source(kind: Kind) -> str:
    config, real, state = kind.config, CPP_TYPES[kind.arithmetic], len(kind.dtypes) - 2
    made = passes(config, kind.dtypes, CPP, "{}[{}]".format)
    storage = [_STORAGE[dtype] for dtype in kind.dtypes]
    arguments = ", ".join(f"{t}* X{i}" for i, t in enumerate(storage[2:]))
    loads = " ".join(f"const R x{i} = load(X{i}[i]);" for i in range(state))
    stores = " ".join(f"store(X{i}[i], {r});" for i, r in enumerate(made.state))
    pointers = ", ".join(f"({t}*)q[{i + 2}] + begin" for i, t in enumerate(storage[2:]))
    few = (
        f"const R p = load(param[i]), g = load(grad[i]); {' '.join(f'const R x{i} = load(X{i}[i]);' for i in range(3))}"
    )
    adds = " ".join(f"lanes[{i}][j] += {s};" for i, s in enumerate(made.sums))
    types = {"R": real, "P": storage[0], "G": storage[1]}
    return _template("native.cpp") % {
        "types": "\n".join(f"using {name} = {t};" for name, t in types.items()),
        "few_arguments": ", ".join(f"const {t}* X{i}" for i, t in enumerate(storage[2:MEASURED])),
        "few_pointers": ", ".join(f"(const {t}*)q[{i + 2}] + begin" for i, t in enumerate(storage[2:MEASURED])),
        "few": few, "measure": made.measure, "adds": adds, "arguments": arguments, "loads": loads, "apply": made.apply,
        "move": made.move, "there": made.there,
        "direction": made.direction, "moved": made.moved, "stores": stores, "pointers": pointers,
        "rows": coefficient_count(config), "weights": weight_count(config), "scalars": SCALARS, "sums": SUMS,
        "stride": 2 + state,
        "heads": "\n".join(_head(config, guarded) for guarded in {False, CELLS[config.cell].is_mixture}),
        "orthogonalize": _template("native_orthogonalize.cpp"),
    }  # fmt: skip


def _template(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _head(config: PolicyConfig, guarded: bool) -> str:
    """The tensor head as a function over K tensors."""
    shapes = {name: shape for name, shape in config.weight_shapes().items() if name not in config.coordinate_weights()}
    keys = len(TensorState._fields) - (not guarded)

    def headed(weights: dict, numel: Tensor, context: Tensor, sums: list, state: list, step: Tensor) -> list[Tensor]:
        tensor_shapes = TensorShapes(numel, context)
        stacked, new = head_pass(weights, config, tensor_shapes, TensorSums(*sums), TensorState(*state), step)
        return [stacked, *new.tensors]

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.float64, device="cpu")

    def one(name: str) -> Names:
        return np.array([name], dtype=object)

    context, begin, names = len(ShapeContext._fields), 0, []
    for shape in shapes.values():
        n = math.prod(shape)
        names.append(np.array([f"W[{begin + i}]" for i in range(n)], dtype=object).reshape(shape))
        begin += n
    names += [
        one("numel[k]"), np.array([[f"context[{i} * K + k]"] for i in range(context)], dtype=object),
        *(one(f"sums[{i} * K + k]") for i in range(SUMS)), *(one(f"t{i}") for i in range(keys)), one("step[which[k]]"),
    ]  # fmt: skip
    weights = {name: ones(*shape) for name, shape in shapes.items()}
    sums, states = ([ones(1) for _ in range(n)] for n in (SUMS, keys))  # tracing tells tensors apart by identity
    examples = weights, ones(1), ones(context, 1), sums, states, ones(1)
    statements, (stacked, *state) = generate(headed, examples, names, "h")
    loads = " ".join(f"const double t{i} = *(const R*)q[{i}];" for i in range(keys))
    writes = " ".join(f"coefficients[{i} * K + k] = {r};" for i, r in enumerate(stacked.reshape(-1)))
    stores = " ".join(f"seen[{i} * K + k] = {r.item()}; *(R*)q[{i}] = (R){r.item()};" for i, r in enumerate(state))
    return _template("native_head.cpp") % {
        "name": "guarded_head" if guarded else "head", "keys": keys, "loads": loads, "statements": statements,
        "writes": writes, "stores": stores,
    }  # fmt: skip


_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64
#: Of the functions that return nothing.
_ARGUMENTS = {
    "measure": [_COUNT, *[_ADDRESS] * 5, ctypes.c_int],
    "apply": [_COUNT, *[_ADDRESS] * 6, _COUNT, _ADDRESS, ctypes.c_int],
    "move_along": [_COUNT, *[_ADDRESS] * 6, ctypes.c_int],
    "orthogonalize": [_COUNT, *[_ADDRESS] * 3, _COUNT, *[_ADDRESS] * 2, ctypes.c_int],
    "head": [_COUNT, *[_ADDRESS] * 9],
    "guarded_head": [_COUNT, *[_ADDRESS] * 9],
}
_STORAGE = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
