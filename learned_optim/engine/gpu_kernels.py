"""The rule's two passes as Triton kernels, each of which is launched once for many tensors.

They are generated from the rule (:mod:`learned_optim.engine.traced`). Tensors are found through a table of addresses on
the GPU and are cut into pieces, one for each program of a launch. A tensor's bits depend on that tensor alone, not on
those beside it.

    table         [K, 3 + T] int64  numel, row of the scalars, offset of the direction (or less than 0), T addresses
                                    (all 16-byte aligned, or not): parameter, gradient, state
    pieces        [N, 2] int64      tensor, first coordinate
    scalars       [R, 9]            see :class:`StepScalars`
    sums          [7, N]            of the pieces, see :class:`TensorSums`
    coefficients  [K, C]            see :class:`Coefficients`
    weights       [W]               of the cell, see :func:`learned_optim.engine.traced.weight_count`
    directions    any length        where an offset is given, the direction is written there, and the parameter left
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.engine.codegen import triton
from learned_optim.engine.head import coefficient_count
from learned_optim.engine.kernels import CompilationError
from learned_optim.engine.param_state import arithmetic_dtype
from learned_optim.engine.traced import MEASURED, SCALARS, SUMS, Passes, passes, weight_count
from learned_optim.rule.config import PolicyConfig

#: Coordinates of a piece, and of the blocks that a program takes one after the other: a thread then has 4 in registers.
PIECE, BLOCK, WARPS = 8192, 512, 4
#: Columns of a table before the addresses.
BEFORE_ADDRESSES = 3

_TYPES = {
    torch.float64: "tl.float64", torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}  # fmt: skip

_SOURCE = '''"""Generated from the update rule of learned_optim."""

import triton
import triton.language as tl


@triton.jit
def measure(table, pieces, scalars, sums, PIECE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
{begin}
{accumulators}
    if begin + PIECE <= numel:
        for i in range(0, PIECE, BLOCK):
            at = begin + i + tl.arange(0, BLOCK)
{measure_whole}
    else:
        for start in range(begin, numel, BLOCK):
            at = start + tl.arange(0, BLOCK)
            here = at < numel
{measure_rest}
    count = tl.num_programs(0)
{sums}


@triton.jit
def apply(
    table, pieces, scalars, coefficients, weights, directions,
    PIECE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
{begin}
    to = tl.multiple_of(tl.load(row + 2), 16)
{begin_apply}
    if begin + PIECE <= numel:
        for i in range(0, PIECE, BLOCK):
            at = begin + i + tl.arange(0, BLOCK)
{apply_whole}
    else:
        for start in range(begin, numel, BLOCK):
            at = start + tl.arange(0, BLOCK)
            here = at < numel
{apply_rest}
'''


class Kind(NamedTuple):
    """What kernels are specialised to."""

    device: torch.device  #: one of several GPUs
    config: PolicyConfig
    dtypes: tuple[torch.dtype, ...]  #: parameter, gradient, state tensors
    directions: torch.dtype

    @property
    def arithmetic(self) -> torch.dtype:
        return arithmetic_dtype(self.dtypes[0])


class Kernels(NamedTuple):
    """See the head of this module.

    ``measure(table, pieces, scalars, sums, aligned=)`` and
    ``apply(table, pieces, scalars, coefficients, weights, directions, aligned=)``.
    """

    measure: Callable[..., None]
    apply: Callable[..., None]


@cache
def _made(kind: Kind) -> Kernels | CompilationError:
    try:
        from torch._inductor.codecache import PyCodeCache

        module: Any = PyCodeCache.load(source(kind))
        made = Kernels(*(_launcher(kernel) for kernel in (module.measure, module.apply)))
        _try_out(kind, made)
        return made
    except Exception as error:  # Triton, a driver or a disk may fail in any way: the eager backend is there
        return CompilationError.of(error)


def kernels(kind: Kind) -> Kernels:
    """The kernels for tensors of this kind, compiled on the first call in a process, or loaded from Triton's cache.

    Raises:
        CompilationError: whatever went wrong; it is not tried again in this process.
    """
    made = _made(kind)
    if isinstance(made, CompilationError):
        raise made
    return made


def _launcher(kernel: Any) -> Callable[..., None]:
    def launch(table: Tensor, pieces: Tensor, *rest: Tensor, aligned: bool) -> None:
        # What the compiler may contract is said, since Triton's default is going to change.
        options = {"PIECE": PIECE, "BLOCK": BLOCK, "ALIGNED": aligned, "num_warps": WARPS, "enable_fp_fusion": True}
        with torch.cuda.device_of(table):
            kernel[(len(pieces),)](table, pieces, *rest, **options)

    return launch


def _try_out(kind: Kind, made: Kernels) -> None:
    """Launch both kernels in both variants: Triton compiles there, which may fail, and cannot while a graph records."""
    device, arithmetic = kind.device, kind.arithmetic
    tensors = [torch.zeros(1, dtype=dtype, device=device) for dtype in kind.dtypes]
    table = torch.tensor([[1, 0, -1, *(t.data_ptr() for t in tensors)]], dtype=torch.int64, device="cpu").to(device)
    pieces = torch.zeros(1, 2, dtype=torch.int64, device=device)
    scalars = torch.ones(1, SCALARS, dtype=arithmetic, device=device)
    sums, coefficients, weights = (
        scalars.new_ones(n) for n in (SUMS, coefficient_count(kind.config), weight_count(kind.config))
    )
    directions = torch.zeros(1, dtype=kind.directions, device=device)
    for aligned in (True, False):
        made.measure(table, pieces, scalars, sums, aligned=aligned)
        made.apply(table, pieces, scalars, coefficients, weights, directions, aligned=aligned)


def source(kind: Kind) -> str:
    """The module of the kernels."""
    made = passes(kind.config, kind.dtypes, triton(kind.arithmetic), "{}{}".format)
    columns = BEFORE_ADDRESSES + len(kind.dtypes)
    real = _TYPES[kind.arithmetic]
    elements = [
        *(f"c{i} = tl.load(coefficients + tensor * {n} + {i})" for n in [coefficient_count(kind.config)]
          for i in range(n)),
        *(f"w{i} = tl.load(weights + {i})" for i in range(weight_count(kind.config))),
    ]  # fmt: skip
    return _SOURCE.format(
        begin=_indented(1, _begin(kind, columns)),
        accumulators=_indented(1, [f"sum{i} = tl.zeros([BLOCK], {real})" for i in range(len(made.sums))]),
        sums=_indented(1, [f"tl.store(sums + {i} * count + piece, tl.sum(sum{i}))" for i in range(len(made.sums))]),
        measure_whole=_indented(3, _measure(kind, made, "")),
        measure_rest=_indented(3, _measure(kind, made, ", mask=here, other=0.0")),
        begin_apply=_indented(1, elements),
        apply_whole=_indented(3, _apply(kind, made, "", "")),
        apply_rest=_indented(3, _apply(kind, made, ", mask=here, other=0.0", ", mask=here")),
    )


def _indented(levels: int, lines: list[str]) -> str:
    return textwrap.indent("\n".join(lines), "    " * levels)


def _begin(kind: Kind, columns: int) -> list[str]:
    lines = [
        "piece = tl.program_id(0).to(tl.int64)",
        "tensor = tl.load(pieces + 2 * piece)",
        f"begin = tl.multiple_of(tl.load(pieces + 2 * piece + 1), {PIECE})",
        f"row = table + tensor * {columns}",
        "numel = tl.load(row)",
        f"values = scalars + tl.load(row + 1) * {SCALARS}",
        *(f"s{i} = tl.load(values + {i})" for i in range(SCALARS)),
    ]
    for i, dtype in enumerate(kind.dtypes):
        lines.append(f"q{i} = tl.load(row + {BEFORE_ADDRESSES + i}).to(tl.pointer_type({_TYPES[dtype]}))")
    aligned = [f"    q{i} = tl.multiple_of(q{i}, 16)" for i in range(len(kind.dtypes))]
    return [*lines, "if ALIGNED:", *aligned]


def _loads(kind: Kind, count: int, masked: str) -> list[str]:
    names = ["p", "g", *(f"x{i}" for i in range(count - 2))]
    real = _TYPES[kind.arithmetic]
    return [f"{name} = tl.load(q{i} + at{masked}).to({real})" for i, name in enumerate(names)]


def _measure(kind: Kind, made: Passes, masked: str) -> list[str]:
    # Zeros, which lanes beyond the end have, add nothing.
    return [
        *_loads(kind, MEASURED, masked), *made.measure.splitlines(),
        *(f"sum{i} += {term}" for i, term in enumerate(made.sums)),
    ]  # fmt: skip


def _apply(kind: Kind, made: Passes, masked: str, mask: str) -> list[str]:
    def stored(where: str, value: str, dtype: torch.dtype) -> str:
        return f"tl.store({where} + at, ({value}).to({_TYPES[dtype]}){mask})"

    return [
        *_loads(kind, len(kind.dtypes), masked), *made.apply.splitlines(),
        "if to < 0:",
        "    " + stored("q0", made.moved, kind.dtypes[0]),
        "else:",
        "    " + stored("directions + to", made.direction, kind.directions),
        *(stored(f"q{i + 2}", value, kind.dtypes[i + 2]) for i, value in enumerate(made.state)),
    ]  # fmt: skip
