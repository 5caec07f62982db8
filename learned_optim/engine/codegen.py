"""Kernels from the rule: a function of scalars, traced, as straight-line code for the inside of a loop.

The compiled kernels are not a second transcription of the rule. Its functions are traced by torch.fx over scalars, and
every operation becomes one statement of C++ (:data:`CPP`) or of Triton (:func:`triton`): shapes (stacks, slices, sums
over a dozen terms) are resolved here, so that what remains is arithmetic. A C++ compiler makes SIMD code of it; in
Triton each variable is a block of coordinates.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Arrays of expressions, shaped like the tensors that they stand for.
Names = NDArray[np.object_]
_TRACING = threading.Lock()  #: torch's tracing is of the whole process

#: Two-byte floats are computed in float32, and rounded where they are stored.
CPP_TYPES = {
    torch.float64: "double", torch.float32: "float", torch.bfloat16: "float", torch.float16: "float",
    torch.int32: "int32_t", torch.int64: "int64_t", torch.bool: "bool",
}  # fmt: skip

#: An expression from those of its operands.
Operator = Callable[..., str]

_CPP_OPERATORS: dict[str, Operator] = {
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


def _cpp_literal(value: Any, kind: str) -> str:
    if kind == "bool":
        return str(bool(value)).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return f"{kind}({'NAN' if math.isnan(value) else 'INFINITY' if value > 0 else '-INFINITY'})"
    return f"{kind}({value!r})"


class Language(NamedTuple):
    """How statements are written.

    Args:
        name: of the language.
        types: by the dtype of a scalar.
        operators: elementwise ones of torch, by name without underscores.
        literal: a number, of a type.
        define: a variable of a type, and its value.
        cast: an expression to a type.
        bits: the bits of an expression, seen as of a type.
    """

    name: str
    types: Mapping[torch.dtype, str]
    operators: Mapping[str, Operator]
    literal: Callable[[Any, str], str]
    define: str
    cast: str
    bits: str


CPP = Language(
    "C++", CPP_TYPES, _CPP_OPERATORS, _cpp_literal, "const {kind} {name} = {value};", "{kind}({value})",
    "bits<{kind}>({value})",
)  # fmt: skip

#: Two-byte floats are computed in float32 here, too.
TRITON_TYPES = {
    torch.float64: "tl.float64", torch.float32: "tl.float32", torch.bfloat16: "tl.float32",
    torch.float16: "tl.float32", torch.int32: "tl.int32", torch.int64: "tl.int64", torch.bool: "tl.int1",
}  # fmt: skip


def _triton_literal(value: Any, kind: str) -> str:
    if kind == "tl.int1":
        return str(bool(value))
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(float(value) if "float" in kind else int(value))


def triton(arithmetic: torch.dtype) -> Language:
    """Triton, for kernels that compute in ``arithmetic``: divisions and roots are rounded as torch rounds them."""
    exact = "_rn" if arithmetic == torch.float32 else ""  # those of float64 always are
    operators: dict[str, Operator] = {
        **{name: _CPP_OPERATORS[name] for name in (
            "add", "sub", "rsub", "mul", "addcmul", "neg", "lt", "gt", "and", "or", "xor", "rshift",
        )},
        "div": (lambda a, b: f"tl.div_rn({a}, {b})") if exact else (lambda a, b: f"{a} / {b}"),
        "reciprocal": (lambda a: f"tl.div_rn(1.0, {a})") if exact else (lambda a: f"1.0 / {a}"),
        "abs": lambda a: f"tl.abs({a})",
        "sqrt": lambda a: f"tl.sqrt{exact}({a})",
        "exp": lambda a: f"tl.exp({a})",
        "sigmoid": lambda a: f"tl.sigmoid({a})",
        "tanh": lambda a: f"2.0 * tl.sigmoid(2.0 * {a}) - 1.0",  # absolutely as exact, not relatively
        "maximum": lambda a, b: f"tl.where(({a} > {b}) | ({a} != {a}), {a}, {b})",
        "clampmin": lambda a, b: f"tl.where(({a} < {b}) | ({b} != {b}), {b}, {a})",
        "clampmax": lambda a, b: f"tl.where(({a} > {b}) | ({b} != {b}), {b}, {a})",
        "where": lambda c, a, b: f"tl.where({c}, {a}, {b})",
    }  # fmt: skip
    return Language(
        "Triton", TRITON_TYPES, operators, _triton_literal, "{name} = {value}", "({value}).to({kind})",
        "({value}).to({kind}, bitcast=True)",
    )  # fmt: skip


_SAME = ("lift_fresh_copy", "clone", "detach", "alias")
#: Options of operators that are looked at, or change no value.
_OPTIONS = {"alpha", "dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}


class UnknownOperation(NotImplementedError):
    """The rule uses an operation that this module cannot write in a language."""


def generate(
    function: Callable, examples: Sequence[Any], names: Sequence[Names], prefix: str, language: Language = CPP
) -> tuple[str, list[Names]]:
    """Statements that compute what ``function`` does, and the expressions of its results.

    Args:
        function: of tensors, lists and dicts of them; returns a list of tensors.
        examples: arguments of the right shapes and dtypes; their values do not matter.
        names: expressions of the arguments' tensors, in order.
        prefix: of the names of the variables that the statements define.
        language: of the statements.

    Raises:
        UnknownOperation: there is none for one of its operations.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # a second, where nothing has to be compiled
    from torch.fx.node import map_arg

    with _TRACING, torch.no_grad():
        module = make_fx(function)(*examples)
    module.graph.eliminate_dead_code()
    statements = _Statements(prefix, language)
    values: dict[torch.fx.Node, Any] = {}
    arguments = iter(names)
    results: list[Names] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(arguments)
        elif node.op == "get_attr":
            constant: Tensor = getattr(module, node.target)
            literals = [language.literal(x, language.types[constant.dtype]) for x in constant.flatten().tolist()]
            values[node] = np.array(literals, dtype=object).reshape(constant.shape)
        else:
            args = map_arg(node.args, values.__getitem__)
            if node.op == "output":
                results = list(args[0])
            else:
                values[node] = statements.run(node, args)
    return "\n".join(statements.lines), results


class _Statements:
    """Statements, each of which defines one scalar."""

    def __init__(self, prefix: str, language: Language) -> None:
        self.prefix, self.language = prefix, language
        self.lines: list[str] = []

    def run(self, node: torch.fx.Node, args: Any) -> Any:
        """The results of a node, given those that it uses."""
        types, operators, literal = self.language.types, self.language.operators, self.language.literal
        target: Any = node.target
        if target.__name__ == "getitem":
            return args[0][args[1]]
        op, kwargs, value = target._schema.name.removeprefix("aten::"), node.kwargs, node.meta["val"]
        if op == "unbind":
            return _along(args[0], args[1] if len(args) > 1 else 0)
        if not isinstance(value, Tensor) or value.dtype not in types:
            raise self._unknown(op, kwargs)
        kind = types[value.dtype]
        if op == "_to_copy" or (op == "view" and isinstance(args[1], torch.dtype)):
            same = types[node.args[0].meta["val"].dtype] == kind  # pyright: ignore
            cast = self.language.cast if op == "_to_copy" else self.language.bits
            return args[0] if same else self._each(kind, lambda x: cast.format(kind=kind, value=x), args[0])
        if op in ("clamp", "clamp_"):
            x, low, high = (*args, None, None)[:3]
            x = x if low is None else self._each(kind, operators["clampmin"], x, low)
            return x if high is None else self._each(kind, operators["clampmax"], x, high)
        alpha = kwargs.get("alpha", 1)
        if alpha != 1 and op.rstrip("_") in ("add", "sub"):
            return self._each(kind, f"{{}} {'-' if 'sub' in op else '+'} {literal(alpha, kind)} * {{}}".format, *args)
        if op == "sum" and len(args) == 2 and len(args[1]) == 1 and not kwargs:
            first, *rest = _along(args[0], args[1][0])
            for term in rest:
                first = self._each(kind, operators["add"], first, term)
            return first
        if op in _CONSTANTS:
            return np.full(tuple(value.shape), literal(_CONSTANTS[op](args), kind), dtype=object)
        if op in _SHAPES:
            return _SHAPES[op](*args)
        if op == "nan_to_num":
            x, nan, high, low = (*args, None, None, None)[:4]
            most = torch.finfo(value.dtype).max
            args = (x, 0.0 if nan is None else nan, most if high is None else high, -most if low is None else low)
        if op in ("lt", "gt"):
            inputs: list[Any] = [n.meta["val"] if isinstance(n, torch.fx.Node) else n for n in node.args]
            compared = types[torch.result_type(*inputs)]
            args = [a if isinstance(a, np.ndarray) else np.array(literal(a, compared), dtype=object) for a in args]
        build = operators.get(op.replace("_", "").removeprefix("bitwise"))
        if build is None or alpha != 1 or kwargs.keys() - _OPTIONS:
            raise self._unknown(op, kwargs)
        return self._each(kind, build, *args)

    def _unknown(self, op: str, options: Mapping[str, Any]) -> UnknownOperation:
        what = f"{op} with {dict(options)}" if options else op
        return UnknownOperation(
            f"no {self.language.name} is known for {what}: add it to learned_optim/engine/codegen.py"
        )

    def _each(self, kind: str, build: Callable[..., str], *operands: Any) -> Names:
        """One statement per element, operands broadcast."""
        literal = self.language.literal
        arrays = [o if isinstance(o, np.ndarray) else np.array(literal(o, kind), dtype=object) for o in operands]
        out = np.empty(np.broadcast_shapes(*(a.shape for a in arrays)), dtype=object)
        for index in np.ndindex(out.shape):
            name = f"{self.prefix}{len(self.lines)}"
            value = build(*(np.broadcast_to(a, out.shape)[index] for a in arrays))
            self.lines.append(self.language.define.format(kind=kind, name=name, value=value))
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
