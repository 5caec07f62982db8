"""The kernels for GPUs, run here by Triton's interpreter: against plain torch operations. And compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref

import pytest
import torch

from helpers import ROOT
from helpers.optimizer_checks import assert_bad_gradients_stay_apart
from helpers.param_changes import CHANGES, data_of_another_dtype
from helpers.support import assert_same_bits, copies, give_gradients, leaves, make, run
from learned_optim import Policy
from learned_optim.engine import auto, gpu, gpu_kernels, kernels
from learned_optim.engine.auto import AutoBackend
from learned_optim.engine.gpu import GpuBackend
from learned_optim.engine.head import head_pass

pytest.importorskip("triton")
needs_compiler = pytest.mark.skipif(kernels.find_compiler("cpu") is None, reason="torch.compile needs a C++ compiler")

#: Coordinates of a piece in these tests: the interpreter takes as long for a small block as for a large one.
PIECE, BLOCK = 512, 256
#: With and without matrices that are orthogonalised.
BOTH = ("random", "orthogonal")
#: 0-d, empty, tiny, a whole piece, pieces and a rest, several dimensions.
SHAPES = [(), (0,), (3,), (PIECE,), (PIECE + 7,), (2 * PIECE + BLOCK + 5,), (10, 13), (4, 3, 3, 3), (16, 64)]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "PIECE", PIECE)
    monkeypatch.setattr(gpu, "PIECE", PIECE)
    monkeypatch.setattr(gpu_kernels, "BLOCK", BLOCK)
    gpu_kernels._made.cache_clear()
    yield
    gpu_kernels._made.cache_clear()


def with_kernels(params, policy="random", **options):
    """An optimizer that runs the kernels of GPUs, here."""
    optimizer = make(params, policy, **options)
    optimizer._backend = GpuBackend(optimizer._backend.head)
    return optimizer


def graphs():
    """How many torch.compile has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("policy", BOTH)
def test_kernels_and_plain_operations_agree_on_all_shapes(policy):
    plain = leaves(*SHAPES)
    params = copies(plain)
    optimizers = make(plain, policy), with_kernels(params, policy)
    for optimizer, ps in zip(optimizers, (plain, params), strict=True):
        run(optimizer, ps, 3)
    assert optimizers[1].backend == "compiled"
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        for name, value in optimizers[0].state[b].items():
            torch.testing.assert_close(optimizers[1].state[a][name], value, rtol=1e-4, atol=1e-5, msg=name)


#: Shapes and keys of what holds several tensors: aligned and not, whole pieces and not, cut by columns.
HELD = [
    ((3, PIECE), {"stacked": 1}), ((3, 5, 33), {"stacked": 1}), ((3 * PIECE,), {"split": 3}), ((9, 64), {"split": 3}),
    ((20, 24), {"split": 3, "transposed": True}), ((5, 4, 3, 3), {"transposed": True, "role": "conv"}),
    ((64, 3), {"role": "matrix"}),
]  # fmt: skip


def test_kernels_and_plain_operations_agree_on_tensors_that_a_parameter_holds():
    plain = leaves(*[shape for shape, _ in HELD])
    params = copies(plain)
    by_backend = [
        maker([{"params": [p], **keys} for p, (_, keys) in zip(ps, HELD, strict=True)], "orthogonal")
        for maker, ps in ((make, plain), (with_kernels, params))
    ]
    for optimizer, ps in zip(by_backend, (plain, params), strict=True):
        run(optimizer, ps, 2)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        for name, value in by_backend[0].state[b].items():
            torch.testing.assert_close(by_backend[1].state[a][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "layout",
    [lambda p: p.t(), lambda p: p[:, ::2], lambda p: p[1:, 3:], lambda p: p.view(6, 4, 3, 8).permute(0, 3, 1, 2)],
    ids=["transposed", "strided", "cut", "channels_last"],
)
@pytest.mark.parametrize("policy", BOTH)
def test_kernels_and_plain_operations_agree_on_tensors_with_other_strides(layout, policy):
    def made():
        return [layout(torch.randn(24, 24, generator=torch.Generator().manual_seed(0))).requires_grad_()]

    plain, params = made(), made()
    for optimizer, ps in ((make(plain, policy), plain), (with_kernels(params, policy), params)):
        run(optimizer, ps, 3)
    torch.testing.assert_close(params[0], plain[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("policy", BOTH)
def test_kernels_and_plain_operations_agree_on_several_buckets_and_on_complex_tensors(policy, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(gpu, "COPIED", 700)
    plain = leaves((3, 300), (40, 20), (900,), (13, 4))
    plain.append(torch.randn(5, 8, dtype=torch.complex64, generator=generator).requires_grad_())
    params = copies(plain)
    for optimizer, ps in ((make(plain, policy), plain), (with_kernels(params, policy), params)):
        run(optimizer, ps, 2)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("policy", BOTH)
def test_a_step_of_a_tensor_does_not_depend_on_the_tensors_beside_it_or_on_their_order(policy):
    together, alone = leaves(*SHAPES), leaves(*SHAPES)
    run(with_kernels(together, policy), together, 3)
    order = list(reversed(range(len(SHAPES))))
    reordered = leaves(*SHAPES)
    groups = [{"params": [reordered[i]]} for i in order[:4]] + [{"params": [reordered[i] for i in order[4:]]}]
    grouped = with_kernels(groups, policy)
    separate = [with_kernels([p], policy) for p in alone]
    for step in range(3):
        for params, optimizers in ((alone, separate), (reordered, [grouped])):
            give_gradients(params, step)
            for optimizer in optimizers:
                optimizer.step()
    assert_same_bits(alone, together)
    assert_same_bits(reordered, together)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_other_tensors_alone(bad):
    assert_bad_gradients_stay_apart(with_kernels, SHAPES, bad)


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not data_of_another_dtype])
def test_a_step_goes_by_what_is_there_now(change):
    """As that of plain operations does."""
    results = []
    for made in (make, with_kernels):
        params = leaves((10, 10), (16, 16), (7,), (), (60, 10), (4, 4, 3, 3))
        optimizer = made(params, lr=1e-2)
        for step in range(4):
            give_gradients(params, step)
            if step in (2, 3):
                change(optimizer, params)
            optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-4)  # some of the changes make steps of 0.25


@pytest.mark.parametrize("policy", BOTH)
def test_a_step_of_many_tensors_is_one_launch_per_pass(policy, monkeypatch):
    launched = []

    def recorded(kind):
        return gpu_kernels.Kernels(
            lambda table, *rest, **options: launched.append(("measure", len(table))) or rest[-1].zero_(),
            lambda table, *rest, **options: launched.append(("apply", len(table))) or rest[-1].zero_(),
        )

    monkeypatch.setattr(gpu, "kernels", recorded)
    params = leaves(*SHAPES, *[(n, 17 + n % 5) for n in range(1, 60)])
    groups = [{"params": params[i::3], "lr": 1e-3 * (i + 1), "weight_decay": 0.1 * i} for i in range(3)]
    run(with_kernels(groups, policy), params, 2)
    filled = len(params) - 1
    assert launched == [("measure", filled), ("apply", filled)] * 2


def test_directions_and_copies_of_a_launch_are_bounded(monkeypatch):
    monkeypatch.setattr(gpu, "COPIED", 1000)
    backend = GpuBackend(make(leaves((3,)), "orthogonal")._backend.head)
    optimizer = make(leaves(*[(20, 20)] * 7, (5000,)), "orthogonal")
    optimizer._backend = backend
    seen = []
    monkeypatch.setattr(gpu, "_GpuBucket", lambda backend, form, flats, *rest: seen.append(flats))
    give_gradients(optimizer.param_groups[0]["params"], 0)
    list(backend.buckets(optimizer._collector.collect(optimizer.param_groups, optimizer.state)))
    assert [sum(flat.copied for flat in flats) for flats in seen] == [800, 800, 800, 400]


@pytest.mark.parametrize("offset", [0, 1])
def test_addresses_that_are_not_aligned_are_launched_by_themselves(offset):
    """A view of a larger parameter may begin anywhere; what lies beside it keeps its bits."""
    (alone,), plain = leaves((300,)), torch.randn(301, generator=torch.Generator().manual_seed(1))
    (beside,) = copies([alone])
    view = plain.clone()[offset : offset + 300].requires_grad_()
    reference = plain[offset : offset + 300].clone().requires_grad_()
    both, single, eager = with_kernels([beside, view]), with_kernels([alone]), make([reference])
    for step in range(2):
        for params, optimizer in (([beside, view], both), ([alone], single)):
            give_gradients(params, step)
            optimizer.step()
        reference.grad = view.grad.clone()
        eager.step()
    assert_same_bits([alone], [beside])
    torch.testing.assert_close(view, reference, rtol=2e-5, atol=2e-6)
    assert len(both._backend._tables) == 1 + offset


# --- tables of addresses, and graphs ----------------------------------------------------------------------------------

HERE = torch.device("cpu")


def test_a_table_is_sent_when_it_has_changed():
    table = gpu._Table()
    first = table.holding([(1, 2), (3, 4)], HERE)
    assert first.tolist() == [[1, 2], [3, 4]]
    assert table.holding([(1, 2), (3, 4)], HERE) is first
    second = table.holding([(1, 2), (3, 5)], HERE)
    assert (first.tolist(), second.tolist()) == ([[1, 2], [3, 4]], [[1, 2], [3, 5]])


def test_what_a_graph_reads_is_not_written_again(monkeypatch):
    table = gpu._Table()
    before = table.holding([(1, 2)], HERE)
    monkeypatch.setattr(gpu, "is_capturing", lambda device: True)
    assert table.holding([(1, 2)], HERE) is before  # no copy is captured where nothing has moved
    with pytest.raises(RuntimeError, match=r"captured in a CUDA graph again, or with other parameters"):
        table.holding([(7, 8)], HERE)
    table._spare = torch.empty(1, 2, dtype=torch.int64)
    moved = table.holding([(7, 8)], HERE)
    (host,) = (t for t in table._captured.values() if t is not before and t is not moved)
    monkeypatch.setattr(gpu, "is_capturing", lambda device: False)
    assert table.holding([(9, 9)], HERE).tolist() == [[9, 9]]
    assert (before.tolist(), moved.tolist(), host.tolist()) == ([[1, 2]], [[7, 8]], [[7, 8]])
    assert table._spare is None
    table.release()
    assert not table._captured


def test_how_tensors_are_cut_stays_as_long_as_a_graph_that_reads_it(monkeypatch):
    table = gpu._Table()
    monkeypatch.setattr(gpu, "is_capturing", lambda device: True)
    pieces = table.pieces((3, 2 * PIECE + 1), HERE)
    assert pieces.table.tolist() == [[0, 0], [1, 0], [1, PIECE], [1, 2 * PIECE]]
    monkeypatch.setattr(gpu, "is_capturing", lambda device: False)
    assert table.pieces((5,), HERE).table.tolist() == [[0, 0]]
    assert list(table._captured.values()) == [pieces]
    assert table.pieces((5,), HERE) is table.pieces((5,), HERE)


def test_a_parameter_that_is_given_twice_is_moved_twice_one_after_the_other():
    (p,), (q,) = leaves((300,)), leaves((300,))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice, reference = with_kernels([p, p], lr=0.1), make([q, q], lr=0.1)
    for params, optimizer in (([p], twice), ([q], reference)):
        give_gradients(params, 0)
        optimizer.step()
    assert [len(table._rows) for table in twice._backend._tables.values()] == [1, 1]


def test_copies_of_tensors_that_do_not_share_an_order_are_made_bucket_by_bucket(monkeypatch):
    monkeypatch.setattr(gpu, "COPIED", 700)
    alive = []

    class Counted(gpu.FlatViews):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(gpu, "FlatViews", Counted)
    params = leaves(*[(300,)] * 8)
    optimizer = with_kernels(params)
    for p in params:
        p.grad = torch.randn(()).expand(300)
    most = 0
    for _ in optimizer._backend.buckets(optimizer._collector.collect(optimizer.param_groups, optimizer.state)):
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == 8
    assert most <= 6  # of this bucket, of the one before, and the first of the next


@pytest.mark.parametrize("policy", BOTH)
def test_a_gradient_with_the_negative_bit_is_read_as_what_it_is(policy):
    plain, params = leaves((5, 8), (7,)), leaves((5, 8), (7,))
    for ps, optimizer in ((plain, make(plain, policy)), (params, with_kernels(params, policy))):
        for p in ps:
            p.grad = torch.randn(p.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
            assert p.grad.is_neg()
            if ps is plain:
                p.grad = p.grad.clone()
        held = [p.grad for p in ps]
        optimizer.step()
        assert all(p.grad is grad for p, grad in zip(ps, held, strict=True))
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def compile_for_a_gpu():
    """What :func:`test_kernels_compile_for_a_gpu` runs where Triton does not interpret."""
    from torch._inductor.codecache import PyCodeCache
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config, f32 = Policy.from_pretrained("default").config, torch.float32
    for dtypes in ((f32,) * 5, (torch.bfloat16, torch.bfloat16, torch.bfloat16, f32, torch.bfloat16)):
        module = PyCodeCache.load(gpu_kernels.source(gpu_kernels.Kind(HERE, config, dtypes, f32)))
        for kernel in (module.measure, module.apply):
            constants = {"PIECE": gpu_kernels.PIECE, "BLOCK": gpu_kernels.BLOCK, "ALIGNED": True}
            types = {name: "*i64" if name in ("table", "pieces") else "*fp32" for name in kernel.arg_names}
            attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(types) - len(constants))}
            made = compiled(
                ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants, attributes),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": gpu_kernels.WARPS, "enable_fp_fusion": True},
            )
            code = made.asm["ptx"]
            print(kernel.__name__, dtypes[0], code.count("ld.global.v4"), code.count("st.global.v4"))  # noqa: T201


def test_kernels_compile_for_a_gpu():
    """For a Hopper card, which need not be there; tensors are read and written 16 bytes at a time."""
    code = "import sys; sys.path.insert(0, 'tests'); from engine import test_gpu; test_gpu.compile_for_a_gpu()"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_kernel = [line.split() for line in done.stdout.splitlines()]
    assert [(name, int(loads), int(stores)) for name, dtype, loads, stores in by_kernel if "float32" in dtype] == [
        ("measure", 5, 0), ("apply", 5, 5),
    ]  # fmt: skip
    assert len(by_kernel) == 4


@pytest.mark.parametrize("where", ["source", "_launcher"])  # made of the rule; compiled by Triton, at a launch
def test_a_failed_compilation_is_said_once_and_the_step_is_made_all_the_same(where, monkeypatch):
    """Of ``auto``, where a GPU would take these kernels."""

    def fail(*args):
        raise OSError("no space left\nmore")

    monkeypatch.setattr(
        gpu_kernels, where, fail if where == "source" else lambda kernel: lambda *args, **options: fail()
    )
    monkeypatch.setattr(AutoBackend, "_of", lambda self, form: self._gpu)
    plain, params = leaves((40, 40)), leaves((40, 40))
    run(make(plain), plain, 2)
    auto._warn_once.cache_clear()
    optimizer = make(params, backend="compiled")
    with pytest.warns(RuntimeWarning, match=r"could not be compiled.*OSError: no space left$") as caught:
        run(optimizer, params, 2)
    assert len(caught) == 1
    assert optimizer.backend == "eager (compilation failed: OSError: no space left)"
    assert_same_bits(params, plain)


@needs_compiler
@pytest.mark.parametrize("safeguard", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_head_does_the_same_for_any_number_of_tensors_and_is_made_once(safeguard):
    counts = []
    for shapes in (SHAPES, [(3, 5)] * 70, SHAPES[4:]):
        plain, params = leaves(*shapes), leaves(*shapes)
        optimizers = [make(ps, safeguard=safeguard) for ps in (plain, params)]
        optimizers[1]._backend.head.compiled[torch.device("cpu")] = kernels.compiled_head(head_pass)
        for optimizer, ps in zip(optimizers, (plain, params), strict=True):
            run(optimizer, ps, 3)
        counts.append(graphs())
        for a, b in zip(params, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert counts[0] == counts[2]


def test_a_head_that_cannot_be_compiled_is_run_as_it_is(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no compiler")

    plain, params = leaves(*SHAPES), leaves(*SHAPES)
    run(make(plain), plain, 3)
    optimizer = make(params)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
    optimizer._backend.head.compiled[torch.device("cpu")] = kernels.compiled_head.__wrapped__(head_pass)
    with pytest.warns(RuntimeWarning, match="the tensor head could not be compiled: OSError: no compiler") as caught:
        run(optimizer, params, 3)
    assert len(caught) == 1
    assert_same_bits(params, plain)


@pytest.mark.parametrize("policy", ["random", "gru"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernels_and_plain_operations_agree_on_all_dtypes(dtype, state_dtype, policy):
    plain = leaves((20, 30), (7,), (), dtype=dtype)
    params = copies(plain)
    optimizers = make(plain, policy, state_dtype=state_dtype), with_kernels(params, policy, state_dtype=state_dtype)
    for optimizer, ps in zip(optimizers, (plain, params), strict=True):
        run(optimizer, ps, 2)
    low = dtype in (torch.bfloat16, torch.float16) or state_dtype is not None
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-2 if low else 2e-5, atol=2e-3 if low else 2e-6)
