"""C++ from the rule: a function of scalars, traced, as straight-line code for the inside of a loop.

The compiled kernels are not a second transcription of the rule. Its functions are traced by torch.fx over scalars, and
every operation becomes one C++ statement: shapes (stacks, slices, sums over a dozen terms) are resolved here, so that
what remains is arithmetic, which any C++ compiler makes SIMD code of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Arrays of C++ expressions, shaped like the tensors that they stand for.
Names = NDArray[np.object_]

#: Two-byte floats are computed in float32, and rounded where they are stored.
CPP_TYPES = {
    torch.float64: "double", torch.float32: "float", torch.bfloat16: "float", torch.float16: "float",
    torch.int32: "int32_t", torch.int64: "int64_t", torch.bool: "bool",
}  # fmt: skip

#: C++ of an elementwise operator of torch, by its name without underscores.
_ELEMENTWISE: dict[str, Callable[..., str]] = {
    "add": lambda a, b: f"{a} + {b}",
    "sub": lambda a, b: f"{a} - {b}",
    "rsub": lambda a, b: f"{b} - {a}",
    "mul": lambda a, b: f"{a} * {b}",
    "div": lambda a, b: f"1.f * {a} / {b}",  # of integers too
    "addcmul": lambda a, b, c: f"{a} + {b} * {c}",
    "neg": lambda a: f"-{a}",
    "reciprocal": lambda a: f"1.f / {a}",
    "abs": lambda a: f"std::fabs({a})",
    "sqrt": lambda a: f"std::sqrt({a})",
    "exp": lambda a: f"std::exp({a})",
    "log": lambda a: f"std::log({a})",
    "sigmoid": lambda a: f"1.f / (1.f + std::exp(-{a}))",
    "tanh": lambda a: f"std::tanh({a})",
    "pow": lambda a, b: f"std::pow({a}, {b})",
    "sign": lambda a: f"(({a} > 0) - ({a} < 0))",
    "maximum": lambda a, b: f"{a} > {b} || {a} != {a} ? {a} : {b}",
    "clampmin": lambda a, b: f"{a} < {b} || {b} != {b} ? {b} : {a}",
    "clampmax": lambda a, b: f"{a} > {b} || {b} != {b} ? {b} : {a}",
    "lt": lambda a, b: f"{a} < {b}",
    "gt": lambda a, b: f"{a} > {b}",
    "where": lambda c, a, b: f"{c} ? {a} : {b}",
    "nantonum": lambda a, nan, high, low: f"{a} != {a} ? {nan} : std::isinf({a}) ? ({a} > 0 ? {high} : {low}) : {a}",
    "and": lambda a, b: f"{a} & {b}",
    "or": lambda a, b: f"{a} | {b}",
    "xor": lambda a, b: f"{a} ^ {b}",
    "rshift": lambda a, b: f"{a} >> {b}",
}
_SAME = ("lift_fresh_copy", "clone", "detach", "alias")
#: Options of operators that are looked at, or change no value.
_OPTIONS = {"alpha", "dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}


class UnknownOperation(NotImplementedError):
    """The rule uses an operation of which this module does not know the C++."""


def _unknown(op: str, options: Mapping[str, Any]) -> UnknownOperation:
    what = f"{op} with {dict(options)}" if options else op
    return UnknownOperation(f"no C++ is known for {what}: add it to learned_optim/engine/codegen.py")


def generate(
    function: Callable, examples: Sequence[Any], names: Sequence[Names], prefix: str
) -> tuple[str, list[Names]]:
    """Statements that compute what ``function`` does, and the expressions of its results.

    Args:
        function: of tensors, lists and dicts of them; returns a list of tensors.
        examples: arguments of the right shapes and dtypes; their values do not matter.
        names: C++ expressions of the arguments' tensors, in order.
        prefix: of the names of the variables that the statements define.

    Raises:
        UnknownOperation: there is none for one of its operations.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # a second, where nothing has to be compiled
    from torch.fx.node import map_arg

    with torch.no_grad():
        module = make_fx(function)(*examples)
    module.graph.eliminate_dead_code()
    statements = _Statements(prefix)
    values: dict[torch.fx.Node, Any] = {}
    arguments = iter(names)
    results: list[Names] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(arguments)
        elif node.op == "get_attr":
            constant: Tensor = getattr(module, node.target)
            literals = [_literal(x, CPP_TYPES[constant.dtype]) for x in constant.flatten().tolist()]
            values[node] = np.array(literals, dtype=object).reshape(constant.shape)
        else:
            args = map_arg(node.args, values.__getitem__)
            if node.op == "output":
                results = list(args[0])
            else:
                values[node] = statements.run(node, args)
    return "\n".join(statements.lines), results


class _Statements:
    """C++ statements, each of which defines one scalar."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.lines: list[str] = []

    def run(self, node: torch.fx.Node, args: Any) -> Any:
        """The results of a node, given those that it uses."""
        target: Any = node.target
        if target.__name__ == "getitem":
            return args[0][args[1]]
        op, kwargs, value = target._schema.name.removeprefix("aten::"), node.kwargs, node.meta["val"]
        if op == "unbind":
            return _along(args[0], args[1] if len(args) > 1 else 0)
        if not isinstance(value, Tensor) or value.dtype not in CPP_TYPES:
            raise _unknown(op, kwargs)
        kind = CPP_TYPES[value.dtype]
        if op == "_to_copy" or (op == "view" and isinstance(args[1], torch.dtype)):
            same = CPP_TYPES[node.args[0].meta["val"].dtype] == kind  # pyright: ignore
            cast = f"{kind}({{}})" if op == "_to_copy" else f"bits<{kind}>({{}})"
            return args[0] if same else self._each(kind, cast.format, args[0])
        if op in ("clamp", "clamp_"):
            x, low, high = (*args, None, None)[:3]
            x = x if low is None else self._each(kind, _ELEMENTWISE["clampmin"], x, low)
            return x if high is None else self._each(kind, _ELEMENTWISE["clampmax"], x, high)
        alpha = kwargs.get("alpha", 1)
        if alpha != 1 and op.rstrip("_") in ("add", "sub"):
            return self._each(kind, f"{{}} {'-' if 'sub' in op else '+'} {_literal(alpha, kind)} * {{}}".format, *args)
        if op == "sum" and len(args) == 2 and len(args[1]) == 1 and not kwargs:
            first, *rest = _along(args[0], args[1][0])
            for term in rest:
                first = self._each(kind, _ELEMENTWISE["add"], first, term)
            return first
        if op in _CONSTANTS:
            return np.full(tuple(value.shape), _literal(_CONSTANTS[op](args), kind), dtype=object)
        if op in _SHAPES:
            return _SHAPES[op](*args)
        if op == "nan_to_num":
            x, nan, high, low = (*args, None, None, None)[:4]
            most = torch.finfo(value.dtype).max
            args = (x, 0.0 if nan is None else nan, most if high is None else high, -most if low is None else low)
        if op in ("lt", "gt"):
            inputs: list[Any] = [n.meta["val"] if isinstance(n, torch.fx.Node) else n for n in node.args]
            compared = CPP_TYPES[torch.result_type(*inputs)]
            args = [a if isinstance(a, np.ndarray) else np.array(_literal(a, compared), dtype=object) for a in args]
        build = _ELEMENTWISE.get(op.replace("_", "").removeprefix("bitwise"))
        if build is None or alpha != 1 or kwargs.keys() - _OPTIONS:
            raise _unknown(op, kwargs)
        return self._each(kind, build, *args)

    def _each(self, kind: str, build: Callable[..., str], *operands: Any) -> Names:
        """One statement per element, operands broadcast."""
        arrays = [o if isinstance(o, np.ndarray) else np.array(_literal(o, kind), dtype=object) for o in operands]
        out = np.empty(np.broadcast_shapes(*(a.shape for a in arrays)), dtype=object)
        for index in np.ndindex(out.shape):
            name = f"{self.prefix}{len(self.lines)}"
            self.lines.append(
                f"const {kind} {name} = {build(*(np.broadcast_to(a, out.shape)[index] for a in arrays))};"
            )
            out[index] = name
        return out


#: Operators that make constants, and which.
_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "ones_like": lambda args: 1.0,
    "full_like": lambda args: args[1],
    "scalar_tensor": lambda args: args[0],
}


def _along(x: Names, dim: int) -> list[Names]:
    """The parts at each index of a dimension; numpy alone would make strings of those without dimensions."""
    return [np.array(part, dtype=object) for part in np.moveaxis(x, dim, 0)]


def _slice(x: Names, dim: int = 0, start: int = 0, end: int = 2**63 - 1) -> Names:
    return x[(slice(None),) * dim + (slice(start, min(end, x.shape[dim])),)]


_SHAPES: dict[str, Callable[..., Names]] = {
    "stack": lambda parts, dim=0: np.stack(parts, axis=dim),
    "cat": lambda parts, dim=0: np.concatenate(parts, axis=dim),
    "unsqueeze": lambda x, dim: np.expand_dims(x, dim),
    "select": lambda x, dim, index: _along(x, dim)[index],
    "slice": _slice,
    **{name: lambda x: x for name in _SAME},
}


def _literal(value: Any, kind: str) -> str:
    if kind == "bool":
        return str(bool(value)).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return f"{kind}({'NAN' if math.isnan(value) else 'INFINITY' if value > 0 else '-INFINITY'})"
    return f"{kind}({value!r})"
