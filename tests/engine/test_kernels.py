"""The kernels that torch.compile makes for GPUs, as far as a CPU goes: against plain torch operations."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.param_changes import CHANGES, data_of_another_dtype
from helpers.support import assert_same_bits, copies, give_gradients, leaves, make, peak_bytes_of_a_step, run
from learned_optim import PolicyConfig
from learned_optim.engine import auto, compiled, kernels, packing
from learned_optim.engine.auto import AutoBackend
from learned_optim.engine.compiled import CompiledBackend
from learned_optim.engine.head import head_pass

pytestmark = pytest.mark.skipif(kernels.find_compiler("cpu") is None, reason="torch.compile needs a C++ compiler")

W = kernels.WIDTH
#: With and without matrices that are orthogonalised.
BOTH = ("random", "orthogonal")
#: 0-d, empty, tiny, a whole row, rows and a rest, several dimensions.
SHAPES = [(), (0,), (3,), (W,), (2 * W,), (W + 7,), (3 * W + 5,), (40, 130), (8, 3, 3, 3), (64, 128)]


def with_kernels(params, policy="random", **options):
    """An optimizer that runs the kernels of GPUs, here."""
    optimizer = make(params, policy, **options)
    optimizer._backend = CompiledBackend(optimizer._backend.head)
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
        run(optimizer, ps, 5)
    assert optimizers[1].backend == "compiled"
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        for name, value in optimizers[0].state[b].items():
            torch.testing.assert_close(optimizers[1].state[a][name], value, rtol=1e-4, atol=1e-5, msg=name)


#: Shapes and keys of what holds several tensors: aligned and not, in rows of the kernels and not, cut by columns.
HELD = [
    ((3, 2 * W), {"stacked": 1}), ((3, 5, W + 1), {"stacked": 1}), ((3 * W,), {"split": 3}), ((9, 2 * W), {"split": 3}),
    ((40, 96), {"split": 3, "transposed": True}), ((5, 4, 3, 3), {"transposed": True, "role": "conv"}),
    ((W, 3), {"role": "matrix"}),
]  # fmt: skip


def test_kernels_and_plain_operations_agree_on_tensors_that_a_parameter_holds():
    plain = leaves(*[shape for shape, _ in HELD])
    params = copies(plain)
    by_backend = [
        maker([{"params": [p], **keys} for p, (_, keys) in zip(ps, HELD, strict=True)], "orthogonal")
        for maker, ps in ((make, plain), (with_kernels, params))
    ]
    for optimizer, ps in zip(by_backend, (plain, params), strict=True):
        run(optimizer, ps, 4)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        for name, value in by_backend[0].state[b].items():
            torch.testing.assert_close(by_backend[1].state[a][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "layout",
    [lambda p: p.t(), lambda p: p[:, ::2], lambda p: p[1:, 3:], lambda p: p.view(12, 4, 10, 12).permute(0, 3, 1, 2)],
    ids=["transposed", "strided", "cut", "channels_last"],
)
@pytest.mark.parametrize("policy", BOTH)
def test_kernels_and_plain_operations_agree_on_tensors_with_other_strides(layout, policy):
    def made():
        return [layout(torch.randn(48, 120, generator=torch.Generator().manual_seed(0))).requires_grad_()]

    plain, params = made(), made()
    for optimizer, ps in ((make(plain, policy), plain), (with_kernels(params, policy), params)):
        run(optimizer, ps, 3)
    torch.testing.assert_close(params[0], plain[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("policy", BOTH)
def test_kernels_and_plain_operations_agree_on_large_and_on_complex_tensors(policy):
    generator = torch.Generator().manual_seed(0)
    plain = leaves((3, packing.COPIED // 2), (1000, 777), (5_000,), (130, 40))
    plain.append(torch.randn(30, 40, dtype=torch.complex64, generator=generator).requires_grad_())
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


@pytest.mark.parametrize("policy", BOTH)
def test_tensors_that_are_copied_as_a_whole_as_on_gpus_get_the_same_update(policy, monkeypatch):
    in_place, whole = leaves(*SHAPES, (700, 700)), leaves(*SHAPES, (700, 700))
    run(with_kernels(in_place, policy), in_place, 3)
    monkeypatch.setattr(compiled, "IN_PLACE", 600)
    run(with_kernels(whole, policy), whole, 3)
    if policy == "random":
        assert_same_bits(whole, in_place)
    for a, b in zip(whole, in_place, strict=True):  # squares of rows and columns are added up in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_other_tensors_alone(bad):
    clean, dirty = leaves(*SHAPES), leaves(*SHAPES)
    run(with_kernels(clean), clean, 2)
    optimizer = with_kernels(dirty)
    for step in range(2):
        give_gradients(dirty, step)
        for i in (2, 6):
            dirty[i].grad[-1] = bad
        optimizer.step()
    others = [i for i in range(len(SHAPES)) if i not in (2, 6)]
    assert_same_bits([dirty[i] for i in others], [clean[i] for i in others])
    assert not dirty[6].isfinite().all()


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not data_of_another_dtype])
def test_a_step_goes_by_what_is_there_now(change):
    """As that of plain operations does."""
    results = []
    for made in (make, with_kernels):
        params = leaves((40, 40), (64, 64), (7,), (), (600, 100), (8, 4, 3, 3))
        optimizer = made(params, lr=1e-2)
        for step in range(4):
            give_gradients(params, step)
            if step in (2, 3):
                change(optimizer, params)
            optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-4)  # some of the changes make steps of 0.25


def test_nothing_is_compiled_again_for_schedules_groups_steps_or_a_hundred_shapes():
    params = leaves((W, 3))
    run(with_kernels(params), params, 1)
    before = graphs()
    params = leaves(*[(n, 17 + n % 5) for n in range(1, 101)])
    groups = [
        {"params": params[i::3], "lr": 1e-3 * (i + 1), "weight_decay": 0.1 * i, "betas": (0.8, 0.9 + 0.03 * i)}
        for i in range(3)
    ]
    optimizer = with_kernels(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
        schedule.step()
    assert graphs() == before


def test_a_step_takes_little_memory_besides_the_state():
    params = leaves((2000, 1000), *[(100, 100)] * 50, *[(n,) for n in range(1, 300)])
    optimizer = with_kernels(params)
    run(optimizer, params, 2)
    assert 0 < peak_bytes_of_a_step(optimizer) < 0.05 * 24 * sum(p.numel() for p in params) + 16e6


@torch.no_grad()
def test_rows_are_independent_and_the_kernels_are_made_once():
    kind = kernels.Kind(PolicyConfig(), "cpu", (torch.float32,) * 8)
    made = kernels.kernels(kind)
    assert kernels.kernels(kind) is made
    columns = len(kernels.StepScalars._fields), kernels.coefficient_count(kind.config)
    tensors = [*(torch.rand(3000, W) for _ in range(8)), *(torch.rand(3000, n) for n in columns)]
    weights = torch.randn(sum(math.prod(shape) for shape in kind.config.coordinate_weights().values()))
    before = graphs()
    (sums,) = made.measure([*tensors[:5], tensors[8]])
    moved = [t.clone() for t in tensors]
    made.apply([*moved, weights])
    assert not torch.equal(moved[0], tensors[0])
    for rows in (2, 77, 2999):
        some = [t[-rows:].clone() for t in tensors]
        assert_same_bits([made.measure([*some[:5], some[8]])[0]], [sums[:, -rows:]])
        made.apply([*some, weights])
        assert_same_bits(some, [t[-rows:] for t in moved])
    assert graphs() == before


def test_a_failed_compilation_is_said_once_and_the_step_is_made_all_the_same(monkeypatch):
    """Of ``auto``, where a GPU would take these kernels."""

    def fail(*args):
        raise OSError("no space left\nmore")

    monkeypatch.setattr(kernels, "_compiled", fail)
    monkeypatch.setattr(AutoBackend, "_of", lambda self, form: self._compiled)
    plain, params = leaves((40, 40)), leaves((40, 40))
    run(make(plain), plain, 2)
    kernels._made.cache_clear()
    auto._warn_once.cache_clear()
    try:
        optimizer = make(params, backend="compiled")
        with pytest.warns(RuntimeWarning, match=r"could not be compiled.*OSError: no space left$") as caught:
            run(optimizer, params, 2)
    finally:
        kernels._made.cache_clear()
    assert len(caught) == 1
    assert optimizer.backend == "eager (compilation failed: OSError: no space left)"
    assert_same_bits(params, plain)


@pytest.mark.parametrize("safeguard", [False, True])
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


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["random", "gru"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernels_and_plain_operations_agree_on_all_dtypes(dtype, state_dtype, policy):
    plain = leaves((40, 130), (7,), (), dtype=dtype)
    params = copies(plain)
    optimizers = make(plain, policy, state_dtype=state_dtype), with_kernels(params, policy, state_dtype=state_dtype)
    for optimizer, ps in zip(optimizers, (plain, params), strict=True):
        run(optimizer, ps, 4)
    low = dtype in (torch.bfloat16, torch.float16) or state_dtype is not None
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-2 if low else 2e-5, atol=2e-3 if low else 2e-6)
