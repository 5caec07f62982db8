"""C++ and Triton that are generated from functions of scalars compute what torch does."""

from __future__ import annotations

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch

from helpers.support import bits, give_gradients, leaves, make, random_policy, run
from learned_optim import Policy
from learned_optim.engine import codegen, kernels, native_library
from learned_optim.engine.codegen import CPP_TYPES, UnknownOperation, generate
from learned_optim.rule import ops
from learned_optim.rule.stochastic_rounding import _noise, _rounded

pytestmark = pytest.mark.skipif(kernels.find_compiler("cpu") is None, reason="needs a C++ compiler")

INFINITY, NAN = math.inf, math.nan
#: What is special to some operator or other.
SPECIAL = (NAN, INFINITY, -INFINITY, 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.1, 3.0, -7.25, 1e-30, 1e30, 1e-42, 2.0**24 + 2)

#: Functions of x, y and z that torch and C++ compute in the very same operations: by name, with what it applies to.
EXACT = {
    "add": lambda x, y: x + y,
    "add a number": lambda x: x + 0.1,
    "add in place": lambda x, y: x.abs().add_(y),
    "sub": lambda x, y: x - y,
    "subtract from a number": lambda x: 1.0 - x,
    "mul": lambda x, y: x * y,
    "mul by a number": lambda x: 0.1 * x,
    "div": lambda x, y: x / y,
    "div by a number": lambda x: x / 0.1,
    "reciprocal": lambda x: x.reciprocal(),
    "divide a number": lambda x: 2.5 / x,
    "neg": lambda x: -x,
    "abs": lambda x: x.abs(),
    "square": lambda x: x**2,
    "lt": lambda x, y: x < y,
    "lt a number": lambda x: x < 0.1,
    "gt": lambda x, y: x > y,
    "gt a number": lambda x: x > 0.1,
    "gt one": lambda x: x > 1,
    "and": lambda x, y: (x > y) & (x < 1.0),
    "or": lambda x, y: (x > y) | (x < 1.0),
    "xor": lambda x, y: (x > y) ^ (x < 1.0),
    "where": lambda x, y, z: torch.where(x > y, z, x),
    "where of numbers": lambda x: torch.where(x > 0.0, 0.25, -0.5) * x,
    "where of a number": lambda x, y: torch.where(x < y, -0.0, x),
    "nan_to_num": lambda x: torch.nan_to_num(x),
    "nan_to_num of nan": lambda x: torch.nan_to_num(x, nan=-0.0),
    "nan_to_num of all": lambda x: torch.nan_to_num(x, nan=1.5, posinf=2.5, neginf=-3.5),
    "nan_to_num of infinity": lambda x: torch.nan_to_num(x, posinf=INFINITY, neginf=0.0),
    "ones_like": lambda x: x + torch.ones_like(x),
    "full_like": lambda x: x + torch.full_like(x, -1.25),
    "infinite numbers": lambda x: x + torch.full_like(x, INFINITY) * torch.full_like(x, -INFINITY),
    "nan": lambda x: torch.where(x > 0.0, torch.full_like(x, NAN), x),
    "no operation": lambda x: torch.ops.aten.alias(x.detach().clone()) + 0.0,
    "constant": lambda x: x * torch.tensor([0.1, -2.0], dtype=x.dtype)[1],
    "stack and unbind": lambda x, y, z: torch.stack([x, y, z]).unbind()[1],
    "stack and select": lambda x, y, z: torch.stack([x, y, z])[-1],
    "cat and unsqueeze": lambda x, y: torch.cat([x.unsqueeze(0), y.unsqueeze(0) * 2.0])[1],
    "broadcast": lambda x, y: (torch.stack([x, y]) + x)[1],
    "to float64": lambda x, y: x.double() + y,
    "to float32": lambda x: x.float() * 3.0,
    "integers": lambda x: x.float().view(torch.int32) * -1640531535,
    "shift": lambda x: x.float().view(torch.int32) >> 15,
    "bits": lambda x, y: (x.float().view(torch.int32) ^ 99) & ~7 | (y.float().view(torch.int32) & 5),
    "add integers": lambda x, y: x.float().view(torch.int32) + (y.float().view(torch.int32) & 0xFFFF),
    "clamp integers": lambda x: x.float().view(torch.int32).clamp(-(10**9), 10**9),
    "maximum of integers": lambda x, y: torch.maximum(x.float().view(torch.int32), y.float().view(torch.int32)),
    "compare integers": lambda x: (x.float().view(torch.int32) < 12.5) & (x.float().view(torch.int32) > -3),
    "divide integers": lambda x: (x.float().view(torch.int32) >> 20) / 7,
    "from integers": lambda x: (x.float().view(torch.int32) >> 8).to(torch.float32),
    "and back": lambda x: (x.float().view(torch.int32) | 1).view(torch.float32),
    "noise": lambda x: _noise(x),
    "rounded to bfloat16": lambda x, y: _rounded(x, torch.bfloat16, _noise(y)),
    "rounded to float16": lambda x, y: _rounded(x, torch.float16, _noise(y)),
}

#: The same, but for the sign of a zero, in which torch's own results depend on the processor.
UP_TO_SIGN_OF_ZERO = {
    "stack and sum": lambda x, y, z: torch.stack([x, y, z]).sum(0),
    "slices": lambda x, y, z: torch.stack([x, y, z])[1:].sum(0) * torch.stack([x, y, z])[-3:-1][0],
    "maximum": lambda x, y: torch.maximum(x, y),
    "clamp": lambda x: x.clamp(-0.5, 0.1),
    "clamp to a maximum below the minimum": lambda x: x.clamp(2.0, 1.0),
    "clamp in place": lambda x: (x + 0.5).clamp_(-1.0, 1.0),
    "clamp at zero": lambda x: x.clamp(min=0.0),
    "clamp_min": lambda x, y: torch.clamp_min(x, y),
    "clamp_max": lambda x, y: torch.clamp_max(x, y),
    "clamp between tensors": lambda x, y, z: torch.clamp(x, y, z),
    "sign": lambda x: x.sign(),
    "clamp_magnitude": lambda x: ops.clamp_magnitude(x, 4.0),
    "clamp_positive": lambda x, y: ops.clamp_positive(x.abs(), y.abs(), 1.0),
}

#: Functions of which C++'s library has its own, or that the compiler may contract.
TO_ROUNDING = {
    "add a multiple": lambda x, y: torch.add(x.abs(), y.abs(), alpha=0.3),
    "subtract a multiple": lambda x, y: torch.sub(x.abs(), -y.abs(), alpha=0.3),
    "subtract a multiple in place": lambda x, y: x.abs().sub_(y.abs(), alpha=-3),
    "addcmul": lambda x, y, z: torch.addcmul(x.abs(), y, y) + torch.addcmul(-x.abs(), z, -z.abs()),
    "sqrt": lambda x: x.sqrt(),
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "tanh": lambda x: x.tanh(),
    "sigmoid": lambda x: x.sigmoid(),
    "pow": lambda x, y: x.abs() ** y,
    "power of a number": lambda x: 2.5**x,
    "root": lambda x: x.abs() ** 0.5,
    "bounded_ratio": lambda x: ops.bounded_ratio(x, 4.0),
    "add_product": lambda x, y, z: ops.add_product((x * y).abs(), z.abs(), y.abs()),
}

_FUNCTION = """
extern "C" void f%d(int64_t n, const T* const* arguments, %s* out) {
  for (int64_t i = 0; i < n; i++) {
    const T %s;
    %s
    out[i] = %s;
  }
}
"""


class Recorded(dict):
    """A table that knows which of its entries were used."""

    def __init__(self, table):
        super().__init__(table)
        self.used = set()

    def __getitem__(self, key):
        self.used.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.used.add(key)
        return super().get(key, default)


def arity(function):
    return function.__code__.co_argcount


def arguments_of(function, dtype):
    """All combinations of special values, and numbers of all magnitudes."""
    count = arity(function)
    values = SPECIAL if count < 3 else SPECIAL[:9]
    special = torch.tensor(list(itertools.product(values, repeat=count)), dtype=dtype).T
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(count, 500, generator=generator, dtype=dtype).mul(3.0).exp()
    return torch.cat([special, torch.randn(count, 500, generator=generator, dtype=dtype) * scale], 1).contiguous()


def compiled(functions, dtype, folder):
    """What C++ makes of each function's arguments."""
    source = ["#include <cmath>\n#include <cstdint>\n#include <cstring>", f"using T = {CPP_TYPES[dtype]};"]
    source.append("template <class To, class From> To bits(From x) { To y; std::memcpy(&y, &x, sizeof y); return y; }")
    outputs = []
    for number, function in enumerate(functions):
        names = [f"x{i}" for i in range(arity(function))]
        examples = [torch.ones((), dtype=dtype) for _ in names]
        inputs = [np.array(name, dtype=object) for name in names]
        statements, (result,) = generate(lambda *args, f=function: [f(*args)], examples, inputs, "r", codegen.CPP)
        kind = CPP_TYPES[function(*examples).dtype]
        loads = ", ".join(f"{name} = arguments[{i}][i]" for i, name in enumerate(names))
        source.append(_FUNCTION % (number, kind, loads, statements, result.item()))
        outputs.append(next(t for t, name in CPP_TYPES.items() if name == kind))
    path = folder / f"{CPP_TYPES[dtype]}.so"
    native_library._compile("\n".join(source), path)
    library = ctypes.CDLL(str(path))
    for number, (function, output) in enumerate(zip(functions, outputs, strict=True)):
        values = arguments_of(function, dtype)
        out = torch.empty(values.shape[1], dtype=output)
        addresses = (ctypes.c_void_p * len(values))(*(row.data_ptr() for row in values))
        getattr(library, f"f{number}")(ctypes.c_int64(len(out)), addresses, ctypes.c_void_p(out.data_ptr()))
        expected = function(*values)
        yield out.to(expected.dtype), expected  # two-byte results are rounded where they are stored


def interpreted(functions, dtype):
    """What Triton makes of each function's arguments, and what torch does."""
    from torch._inductor.codecache import PyCodeCache

    language = codegen.triton(dtype)
    source = ["import triton", "import triton.language as tl"]
    for number, function in enumerate(functions):
        names = [f"x{i}" for i in range(arity(function))]
        examples = [torch.ones((), dtype=dtype) for _ in names]
        inputs = [np.array(name, dtype=object) for name in names]
        statements, (result,) = generate(lambda *args, f=function: [f(*args)], examples, inputs, "r", language)
        loads = [f"{name} = tl.load(arguments + {i} * n + at, mask=at < n, other=0.0)" for i, name in enumerate(names)]
        source += ["@triton.jit", f"def f{number}(n, arguments, out, N: tl.constexpr):", "    at = tl.arange(0, N)"]
        source += [f"    {line}" for line in (*loads, *statements.splitlines())]
        source += [f"    tl.store(out + at, {result.item()}, mask=at < n)"]
    module = PyCodeCache.load("\n".join(source))
    for number, function in enumerate(functions):
        values = arguments_of(function, dtype)
        expected = function(*values)
        stored = torch.float32 if expected.dtype in (torch.bfloat16, torch.float16) else expected.dtype
        out = torch.empty(values.shape[1], dtype=stored)
        getattr(module, f"f{number}")[(1,)](len(out), values, out, N=4096)
        yield out.to(expected.dtype), expected


def canonical(tensor):
    """With one NaN only."""
    return torch.where(tensor.isnan(), torch.full_like(tensor, NAN), tensor) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_operator_computes_what_torch_does(dtype, tmp_path, monkeypatch):
    tables = {name: Recorded(getattr(codegen, name)) for name in ("_CPP_OPERATORS", "_CONSTANTS", "_SHAPES")}
    for name, table in tables.items():
        monkeypatch.setattr(codegen, name, table)
    monkeypatch.setattr(codegen, "CPP", codegen.CPP._replace(operators=tables["_CPP_OPERATORS"]))
    functions = {**EXACT, **UP_TO_SIGN_OF_ZERO, **TO_ROUNDING}
    assert len(functions) == len(EXACT) + len(UP_TO_SIGN_OF_ZERO) + len(TO_ROUNDING)
    assert_computed(functions, compiled(functions.values(), dtype, tmp_path), dtype)
    for name, table in tables.items():
        assert set(table) <= table.used, f"{name}: {set(table) - table.used} were not used by any function"


#: What no pass over coordinates uses, so that Triton need not know it.
NOT_IN_TRITON = (
    "nan_to_num", "sign", "log", "pow", "power", "root", "square", "infinite numbers", "nan", "constant",
    "divide integers",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities and NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_operator_of_triton_computes_what_torch_does(dtype, monkeypatch):
    pytest.importorskip("triton")
    language = codegen.triton(dtype)
    table = Recorded(language.operators)
    monkeypatch.setattr(codegen, "triton", lambda arithmetic: language._replace(operators=table))
    functions = {**EXACT, **UP_TO_SIGN_OF_ZERO, **TO_ROUNDING}
    functions = {name: f for name, f in functions.items() if not name.startswith(NOT_IN_TRITON)}
    assert_computed(functions, interpreted(list(functions.values()), dtype), dtype, atol=2 * torch.finfo(dtype).eps)
    assert set(table) <= table.used, f"{set(table) - table.used} were not used by any function"


def assert_computed(functions, results, dtype, atol=0.0):
    """Results and what torch gives: equal, as far as the lists of the functions say; ``atol`` for the last of them."""
    wrong = []
    for name, (actual, expected) in zip(functions, results, strict=True):
        if name in EXACT:
            same = bits(canonical(actual)) == bits(canonical(expected))
        elif name in UP_TO_SIGN_OF_ZERO:
            same = bits(canonical(actual) + 0.0) == bits(canonical(expected) + 0.0)
        else:
            epsilon = torch.finfo(dtype).eps
            least = max(atol, torch.finfo(dtype).tiny)
            same = torch.isclose(actual, expected, rtol=20 * epsilon, atol=least, equal_nan=True)
        if not same.all():
            (where,) = (~same).nonzero()[0]
            values = arguments_of(functions[name], dtype)[:, where].tolist()
            wrong.append(f"{name} of {values}: {actual[where]}, expected {expected[where]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.erf, "erf"),
        (lambda x: torch.minimum(x, x), "minimum"),
        (lambda x: torch.stack([x, x]).sum(), "sum"),
        (lambda x: torch.stack([x, x]).sum(0, keepdim=True), "sum"),
        (lambda x: torch.stack([torch.stack([x, x])] * 2).sum((0, 1)), "sum"),
        (lambda x: torch.stack([x, x]).sum(0, dtype=torch.float64), "sum"),
        (lambda x: torch.stack([x, x]).mean(0), "mean"),
        (lambda x: torch.stack([x, x]).split(1)[0], "split"),
        (lambda x: torch.stack([x, x]).view(2, 1), "view"),
        (lambda x: torch.addcmul(x, x, x, value=2.0), "addcmul with {'value': 2.0}"),
        (lambda x: torch.div(x, x, rounding_mode="floor"), "div with {'rounding_mode': 'floor'}"),
        (lambda x: torch.rsub(x, x, alpha=2.0), "rsub with {'alpha': 2.0}"),
        (lambda x: torch.complex(x, x).real, "complex"),
        (lambda x: x.to(torch.int8), "_to_copy"),
    ],
)
def test_an_operation_that_is_not_known_is_named(function, name):
    with pytest.raises(UnknownOperation) as caught:
        generate(lambda x: [function(x)], [torch.ones(())], [np.array("x", dtype=object)], "r")
    assert str(caught.value).startswith(f"no C++ is known for {name}")
    assert "add it to learned_optim/engine/codegen.py" in str(caught.value)


def test_shapes_are_resolved_and_unused_operations_left_out():
    def function(weights, state):
        weights["a"].exp()
        return [weights["a"][1] * state[0], state[1], weights["b"].unsqueeze(1)]

    names = [np.array(["A[0]", "A[1]"], dtype=object), np.array(["B[0]"], dtype=object)]
    examples = {"a": torch.ones(2), "b": torch.ones(1)}, [torch.ones(()), torch.ones(())]
    scalars = [np.array(name, dtype=object) for name in ("s", "t")]
    statements, results = generate(function, examples, [*names, *scalars], "v")
    assert statements == "const float v0 = A[1] * s;"
    assert [result.tolist() for result in results] == ["v0", "t", [["B[0]"]]]


# --- whole policies -------------------------------------------------------------------------------------------------

BUNDLED = ("default", "pretraining", "reader")


def both_after_steps(policy, dtype=torch.float32, **options):
    """Parameters and optimizers after some steps of either backend."""
    results = []
    for backend in ("eager", "compiled"):
        params = leaves((60, 50), (300,), (), (8, 4, 3, 3), dtype=dtype)
        optimizer = make(params, Policy.from_pretrained(policy), backend=backend, **options)
        for step in range(4):
            give_gradients(params, step // 2)
            optimizer.step()
        results.append((params, optimizer))
    assert optimizer.backend.startswith("compiled")
    return results


@pytest.mark.parametrize("options", [{}, {"safeguard": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BUNDLED)
def test_kernels_of_bundled_policies_agree_with_plain_operations(name, dtype, options):
    (plain, eager), (params, optimizer) = both_after_steps(name, dtype, **options)
    rtol = 2e-5 if dtype == torch.float32 else 1e-10
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=0.1 * rtol)
        for key, value in eager.state[b].items():
            torch.testing.assert_close(optimizer.state[a][key], value, rtol=5 * rtol, atol=rtol, msg=key)


@pytest.mark.parametrize("name", BUNDLED)
def test_kernels_of_bundled_policies_with_two_byte_state_agree_too(name):
    (plain, eager), (params, optimizer) = both_after_steps(name, state_dtype=torch.bfloat16)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=2e-3)
        for key, value in eager.state[b].items():  # each step may round to either side
            most = (4 * 2.0**-7 if value.dtype == torch.bfloat16 else 5e-3) * float(value.abs().max())
            assert float((optimizer.state[a][key] - value).abs().max()) <= most + 1e-5, key


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16])
def test_two_byte_state_is_rounded_alike_where_its_noise_is_the_same(state_dtype):
    """Noise is hashed from the second moment: here gradients have so few digits that all arithmetic is exact."""
    results = []
    for backend in ("eager", "compiled"):
        (p,) = leaves((5000,))
        optimizer = make([p], random_policy(), backend=backend, state_dtype=state_dtype, betas=(0.75, 0.5))
        p.grad = (leaves((5000,), seed=1)[0].detach() * 1500.0).round().clamp(-4095.0, 4095.0) / 16.0
        optimizer.step()
        results.append((optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"], p.grad * 0.25))
    (mean, square, exact), (others_mean, others_square, _) = results
    assert torch.equal(bits(square), bits(others_square))
    assert torch.equal(bits(mean), bits(others_mean))
    assert 100 < int((mean.float() != exact).sum()) < 4900


def test_two_byte_state_of_noisy_gradients_is_at_most_one_rounding_away():
    plain, params = leaves((5000,)), leaves((5000,))
    optimizers = make(plain, state_dtype=torch.bfloat16), make(params, backend="compiled", state_dtype=torch.bfloat16)
    for optimizer, ps in zip(optimizers, (plain, params), strict=True):
        run(optimizer, ps, 1)
    for key in ("exp_avg", "hidden_0", "hidden_3"):
        a, b = (o.state[ps[0]][key].view(torch.int16).int() for o, ps in zip(optimizers, (plain, params), strict=True))
        assert int((a - b).abs().max()) <= 1, key
