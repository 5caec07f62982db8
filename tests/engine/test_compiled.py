"""Compiled C++ on CPUs against plain torch operations: same rule, same checkpoints, nothing compiled twice."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch

from helpers.command_line import run_command
from helpers.optimizer_checks import assert_bad_gradients_stay_apart, assert_resumes_bit_exactly
from helpers.param_changes import CHANGES, assert_a_step_goes_by_what_is_there_now
from helpers.support import (
    DTYPES,
    POLICIES,
    assert_same_bits,
    copies,
    give_gradients,
    leaves,
    make,
    peak_bytes_of_a_step,
    random_policy,
    run,
)
from learned_optim import LearnedOptimizer, PolicyConfig
from learned_optim.engine import auto, kernels, native_library, packing

pytestmark = [
    pytest.mark.skipif(kernels.find_compiler("cpu") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("kernel_cache"),
]

#: Coordinates of a chunk, and so many that several threads share them.
CHUNK, FEW = 1 << 14, 1 << 17
#: With and without matrices that are orthogonalised.
BOTH = ("random", "orthogonal")
#: 0-d, empty, tiny, one more than a SIMD vector has, around the length of a chunk, several dimensions.
SHAPES = [(), (0,), (3,), (17,), (CHUNK - 1,), (CHUNK,), (2 * CHUNK + 1,), (40, 130), (8, 3, 3, 3), (64, 128)]


def compile_(params, policy="random", **options):
    return make(params, policy, backend="compiled", **options)


def state_tensors(optimizer, params):
    return [t for p in params for t in optimizer.state[p].values()]


def assert_agree(plain, steps, policy, **options):
    """Steps of compiled kernels, and those of plain operations, on other tensors of the same strides."""
    params = copies(plain)
    for p, q in zip(params, plain, strict=True):
        p.data = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype).copy_(q.detach())
    for optimizer, ps in ((make(plain, policy, **options), plain), (compile_(params, policy, **options), params)):
        run(optimizer, ps, steps)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    return params


# --- the same update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_all_shapes(policy):
    plain = leaves(*SHAPES)
    params = copies(plain)
    optimizers = make(plain, policy), compile_(params, policy)
    for optimizer, ps in zip(optimizers, (plain, params), strict=True):
        run(optimizer, ps, 5)
    assert optimizers[1].backend.startswith("compiled")
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        for name, value in optimizers[0].state[b].items():
            torch.testing.assert_close(optimizers[1].state[a][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert optimizers[1].diagnostics().keys() == optimizers[0].diagnostics().keys()
    for name, figures in optimizers[1].diagnostics().items():
        assert figures == pytest.approx(optimizers[0].diagnostics()[name], rel=1e-3, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize("policy", BOTH)
def test_chunks_leave_no_seam(policy):
    """In float64, where a wrong sum or a coordinate left out would stand out."""
    plain = leaves((CHUNK - 1,), (CHUNK + 1,), (3 * CHUNK + 17,), (130, 400), dtype=torch.float64)
    params = copies(plain)
    for optimizer, ps in ((make(plain, policy), plain), (compile_(params, policy), params)):
        run(optimizer, ps, 4)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "layout", [lambda p: p.t(), lambda p: p[:, ::2], lambda p: p[1:, 3:]], ids=["transposed", "strided", "cut"]
)
@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_tensors_with_other_strides(layout, policy):
    base = torch.randn(48, 120, generator=torch.Generator().manual_seed(0))
    plain = [layout(base).requires_grad_()]
    strides = plain[0].stride()
    (p,) = assert_agree(plain, 3, policy)
    assert p.stride() == plain[0].stride() == strides


@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_large_matrices(policy):
    """Wide and tall ones, some larger than what is copied at once, beside vectors."""
    assert_agree(leaves((3, packing.COPIED // 2), (1000, 777), (5_000,), (130, 40)), 2, policy)


@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_channels_last_tensors(policy):
    plain = [leaves((16, 8, 5, 5))[0].detach().to(memory_format=torch.channels_last).requires_grad_()]
    params = assert_agree(plain, 3, policy)
    assert params[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("policy", BOTH)
def test_gradients_with_other_strides_than_their_parameters(policy):
    plain = [leaves((16, 8, 5, 5))[0].detach().to(memory_format=torch.channels_last).requires_grad_(), *leaves((6, 7))]
    params = copies(plain)
    for optimizer, ps in ((make(plain, policy), plain), (compile_(params, policy), params)):
        for step in range(3):
            give_gradients(ps, step)
            ps[0].grad = ps[0].grad.contiguous()
            ps[1].grad = torch.full((1, 1), 0.5).expand(6, 7) if step == 1 else ps[1].grad.t().contiguous().t()
            optimizer.step()
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_complex_tensors(policy):
    generator = torch.Generator().manual_seed(0)
    assert_agree([torch.randn(30, 40, dtype=torch.complex64, generator=generator).requires_grad_()], 3, policy)


def test_a_negated_view_without_gaps_is_read_with_its_sign():
    p = torch.nn.Parameter(torch.ones(8, 6))
    moved = {}
    for backend in ("eager", "compiled"):
        mine = p.detach().clone().requires_grad_()
        optimizer = LearnedOptimizer([mine], backend=backend)
        mine.grad = torch._neg_view(torch.ones(8, 6))
        optimizer.step()
        moved[backend] = mine.detach() - 1.0
    assert bool((moved["eager"] > 0.0).all())
    torch.testing.assert_close(moved["compiled"], moved["eager"])


@pytest.mark.parametrize("shape", [(), (1, 1), (3,)])
def test_gradients_that_torch_keeps_negated_or_conjugated(shape):
    """As autograd makes them of imaginary parts."""
    results = []
    for backend in ("eager", "compiled"):
        imaginary = torch.full(shape, 0.5, requires_grad=True)
        whole = torch.full(shape, 0.5 + 1j, requires_grad=True)
        optimizer = make([imaginary, whole], backend=backend)
        for _ in range(2):
            optimizer.zero_grad()
            (torch.complex(torch.ones(shape), imaginary).conj() * (1 + 2j) * whole.conj()).real.sum().backward()
            assert imaginary.grad.is_neg() or shape == (3,)
            optimizer.step()
        results.append((imaginary.detach(), whole.detach()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("policy", ["random", "gru"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_and_eager_agree_on_all_dtypes(dtype, state_dtype, policy):
    shapes = [(40, 130), (7,), ()]
    plain = leaves(*shapes, dtype=dtype)
    params = copies(plain)
    optimizers = make(plain, policy, state_dtype=state_dtype), compile_(params, policy, state_dtype=state_dtype)
    for optimizer, ps in zip(optimizers, (plain, params), strict=True):
        run(optimizer, ps, 4)
    assert optimizers[1].backend.startswith("compiled")
    low = dtype in (torch.bfloat16, torch.float16) or state_dtype is not None
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-2 if low else 2e-5, atol=2e-3 if low else 2e-6)
        for (name, mine), theirs in zip(optimizers[1].state[a].items(), optimizers[0].state[b].values(), strict=True):
            assert mine.dtype == theirs.dtype, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_byte_parameters_are_read_and_rounded_as_torch_does(dtype):
    """All of them; with gradients of zero they are multiplied by one number."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.float().abs() < 1e15]
    for lr, weight_decay in ((0.0, 0.0), (0.1, 3.0), (0.1, 9.999), (0.1, 31.0)):
        p = every.clone().requires_grad_()
        p.grad = torch.zeros_like(p)
        optimizer = compile_([p], lr=lr, weight_decay=weight_decay)
        optimizer.step()
        assert optimizer.backend.startswith("compiled")
        expected = (every.float() * (1.0 - lr * weight_decay)).to(dtype)
        assert torch.equal(p + 0.0, expected + 0.0)
        assert int((expected == every).sum()) < 0.01 * len(every) or lr == 0.0


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gradient_of_another_dtype_than_its_parameter(grad_dtype):
    dtype = torch.bfloat16 if grad_dtype == torch.float32 else torch.float32
    results = []
    for backend in ("eager", "compiled"):
        params = leaves((40, 40), (7,), dtype=grad_dtype)
        optimizer = make(params, backend=backend)
        for step in range(3):
            for p in params:
                p.data = p.data.to(grad_dtype)
            give_gradients(params, step)
            for p in params:
                p.data = p.data.to(dtype)
                assert (p.dtype, p.grad.dtype) == (dtype, grad_dtype)
            optimizer.step()
        results.append(params)
    low = torch.bfloat16 in (dtype, grad_dtype)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2 if low else 2e-5, atol=2e-3 if low else 2e-6)


def test_a_gradient_of_zero_and_a_learning_rate_of_zero_change_nothing():
    params = leaves((40, 40), (9,))
    before = copies(params)
    optimizer = compile_(params, lr=0.0)
    run(optimizer, params, 2)
    assert_same_bits(params, before)
    optimizer = compile_(params, weight_decay=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(params, before)


# --- bits that depend on the tensor alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"safeguard": True}], ids=str)
@pytest.mark.parametrize("policy", BOTH)
def test_a_step_of_a_tensor_does_not_depend_on_the_tensors_beside_it_or_on_their_order(policy, options):
    together, alone = leaves(*SHAPES), leaves(*SHAPES)
    optimizer = compile_(together, policy, **options)
    run(optimizer, together, 3)
    order = list(reversed(range(len(SHAPES))))
    reordered = leaves(*SHAPES)
    groups = [{"params": [reordered[i]]} for i in order[:4]] + [{"params": [reordered[i] for i in order[4:]]}]
    grouped = compile_(groups, policy, **options)
    separate = [compile_([p], policy, **options) for p in alone]
    for step in range(3):
        for params, optimizers in ((alone, separate), (reordered, [grouped])):
            give_gradients(params, step)
            for one in optimizers:
                one.step()
    assert_same_bits(alone, together)
    assert_same_bits(reordered, together)
    assert_same_bits(state_tensors(grouped, reordered), state_tensors(optimizer, together))
    for p, one, q in zip(alone, separate, together, strict=True):
        assert_same_bits(state_tensors(one, [p]), state_tensors(optimizer, [q]))


@pytest.mark.parametrize("policy", BOTH)
def test_groups_of_other_hyperparameters_and_tensors_at_other_steps_side_by_side(policy):
    shapes = [(40, 30), (7,), (), (33,), (20, 50), (2 * CHUNK,)]
    options = [{"lr": 1e-2 / (i + 1), "weight_decay": 0.2 * i, "betas": (0.5 + 0.1 * i, 0.99)} for i in range(3)]
    options[1].update(maximize=True, eps=0.1)
    together, alone, plain = (leaves(*shapes) for _ in range(3))
    groups = [[{"params": ps[i::3], **options[i]} for i in range(3)] for ps in (together, plain)]
    optimizer, eager = compile_(groups[0], policy), make(groups[1], policy)
    separate = [compile_([p], policy, **options[i % 3]) for i, p in enumerate(alone)]
    for step in range(4):
        for params, optimizers in ((together, [optimizer]), (plain, [eager]), (alone, separate)):
            give_gradients(params, step)
            for i, p in enumerate(params):
                p.grad = p.grad if i % 4 <= step else None
            for one in optimizers:
                one.step()
    assert_same_bits(together, alone)
    for a, b in zip(together, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=4e-6)


def test_bits_do_not_depend_on_how_many_tensors_there_are():
    """The head's loop over tensors, for numbers that are no multiple of a SIMD vector's."""
    shapes = [(n % 37 + 1,) if n % 3 else (n, 7) for n in range(1, 36)]
    alone = leaves(*shapes)
    for p, grad in zip(alone, leaves(*shapes, seed=1), strict=True):
        p.grad = grad.detach()
        compile_([p], safeguard=True).step()
    for count in (2, 7, 9, 17, 33):
        params = leaves(*shapes)[:count]
        for p, q in zip(params, alone, strict=False):
            p.grad = q.grad
        compile_(params, safeguard=True).step()
        assert_same_bits(params, alone[:count])


def test_bits_do_not_depend_on_the_number_of_threads_nor_on_its_changes():
    shapes = [(700, 401), (5,), (2 * FEW + 3,), (64, 64)]
    threads = torch.get_num_threads()
    results = []
    try:
        for numbers in ((1, 1, 1), (2, 2, 2), (3, 1, 2)):
            params = leaves(*shapes)
            optimizer = compile_(params)
            for step, number in enumerate(numbers):
                torch.set_num_threads(number)
                run(optimizer, params, 1, start=step)
            results.append([*params, *state_tensors(optimizer, params)])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert_same_bits(others, results[0])


@pytest.mark.parametrize("policy", BOTH)
def test_bits_do_not_depend_on_where_the_memory_begins(policy):
    def at(offset, values):
        memory = torch.zeros(values.numel() + 32, dtype=values.dtype)
        return memory[offset : offset + values.numel()].view(values.shape).copy_(values.detach())

    results = []
    for offset in (0, 1, 3, 8):
        params = [at(offset, p).requires_grad_() for p in leaves((1003,), (CHUNK + 40,), (37, 43))]
        optimizer = compile_(params, policy)
        for step in range(3):
            give_gradients(params, step)
            for i, p in enumerate(params):
                p.grad = at(offset * 5 % (7 + i), p.grad)
            optimizer.step()
            for i, p in enumerate(params):
                state = optimizer.state[p]
                for j, (key, value) in enumerate(state.items()):
                    state[key] = at(offset * j % (5 + i), value) if value.ndim else value
        results.append([*params, *state_tensors(optimizer, params)])
    for others in results[1:]:
        assert_same_bits(others, results[0])


@pytest.mark.parametrize("policy", BOTH)
def test_tensors_that_are_copied_in_several_buckets_get_the_same_bits(policy, monkeypatch):
    def strided():
        return [p[:, ::2].requires_grad_() for p in (q.detach() for q in leaves(*[(n, 200) for n in range(20, 40)]))]

    plain, params = strided(), strided()
    run(compile_(plain, policy), plain, 2)
    for module in ("step", "native"):
        monkeypatch.setattr(f"learned_optim.engine.{module}.COPIED", 10_000)
    run(compile_(params, policy), params, 2)
    assert_same_bits(params, plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("policy", BOTH)
def test_a_gradient_that_is_not_finite_leaves_other_tensors_alone(bad, policy):
    assert_bad_gradients_stay_apart(lambda params: compile_(params, policy), SHAPES, bad)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [("eager", "compiled"), ("compiled", "eager")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpoint_moves_between_backends(way, dtype):
    shapes = [(70, 90), (5,)]
    reference = leaves(*shapes, dtype=dtype)
    run(make(reference), reference, 6)
    params = leaves(*shapes, dtype=dtype)
    optimizer = make(params, backend=way[0])
    run(optimizer, params, 3)
    resumed = make(params, backend=way[1])
    resumed.load_state_dict(optimizer.state_dict())
    run(resumed, params, 3, start=3)
    for a, b in zip(params, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"safeguard": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_resumed_bit_for_bit(dtype, options):
    assert_resumes_bit_exactly(dtype, backend="compiled", **options)


def test_resuming_is_exact_also_after_the_state_was_replaced():
    shapes = [(70, 90), (5,)]
    straight, params = leaves(*shapes), leaves(*shapes)
    run(compile_(straight), straight, 6)
    optimizer = compile_(params)
    run(optimizer, params, 3)
    saved, values = copy.deepcopy(optimizer.state_dict()), copies(params)
    run(optimizer, params, 2, start=50)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    params[0].data = params[0].data.clone()
    run(optimizer, params, 3, start=3)
    assert_same_bits(params, straight)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_state_that_was_saved_in_another_precision_goes_on(dtypes):
    """Per-tensor state keeps the dtype in which it was saved."""
    first, second = dtypes
    params = leaves((70, 90), (5,), dtype=first)
    saved = compile_(params, "orthogonal")
    run(saved, params, 3)
    results = []
    for backend in ("eager", "compiled"):
        others = [p.detach().to(second).requires_grad_() for p in params]
        optimizer = make(others, "orthogonal", backend=backend)
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        run(optimizer, others, 3, start=3)
        results.append([*others, *state_tensors(optimizer, others)])
    assert results[1][2:][-1].dtype == first
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_a_copied_or_pickled_optimizer_goes_on_with_the_same_bits():
    params = leaves((60, 40))
    optimizer = compile_(params)
    run(optimizer, params, 2)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    run(optimizer, params, 2, start=2)
    for twin in twins:
        others = twin.param_groups[0]["params"]
        run(twin, others, 2, start=2)
        assert_same_bits(others, params)


# --- what changes between steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"safeguard": True, "policy": "orthogonal"}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_goes_by_what_is_there_now(change, options):
    assert_a_step_goes_by_what_is_there_now(change, backend="compiled", **options)


def test_per_tensor_state_whose_memory_was_replaced_is_used_where_it_lies_now():
    results = []
    for backend in ("eager", "compiled"):
        (p,) = leaves((40, 40))
        optimizer = make([p], "orthogonal", backend=backend)
        run(optimizer, [p], 2)
        optimizer.state[p]["log_pace"].data = torch.tensor(0.5)
        optimizer.state[p]["cosine_fast"].data = torch.tensor(0.25, dtype=torch.float64)
        run(optimizer, [p], 1, start=2)
        results.append([float(optimizer.state[p][key]) for key in ("log_pace", "cosine_fast")])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize("rows", [39, 80])
def test_state_of_another_shape_than_its_parameter_is_refused_before_memory_beyond_it_is_touched(rows):
    params = leaves((40, 40), (7,))
    optimizer = compile_(params)
    run(optimizer, params, 1)
    params[0].data = torch.ones(rows, 40)
    before = copies(params)
    with pytest.raises(RuntimeError, match=rf"gradient .* shape \(40, 40\) .* shape \({rows}, 40\)"):
        optimizer.step()
    params[0].grad = torch.ones(rows, 40)
    with pytest.raises(RuntimeError, match=rf"exp_avg has shape \(40, 40\), .* shape \({rows}, 40\)"):
        optimizer.step()
    assert_same_bits(params, before)


def test_two_optimizers_of_one_policy_keep_apart():
    """In turn, on tensors of the same shapes."""
    expected, params = ([leaves((40, 30), (5,), seed=i) for i in (0, 1)] for _ in range(2))
    for i, ps in enumerate(expected):
        run(compile_(ps, lr=10.0**-i), ps, 3)
    optimizers = [compile_(ps, lr=10.0**-i) for i, ps in enumerate(params)]
    for step in range(3):
        for optimizer, ps in zip(optimizers, params, strict=True):
            run(optimizer, ps, 1, start=step)
    for mine, theirs in zip(params, expected, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("shape", [(7,), (40, 40), (600, 700), (8, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("policy", BOTH)
def test_autograd_sees_that_parameters_have_changed(policy, shape):
    """A second pass back through a graph that has saved them must not give gradients of half old, half new values."""
    params = leaves(shape)
    loss = params[0].square().sum()
    loss.backward(retain_graph=True)
    optimizer = compile_(params, policy)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("policy", BOTH)
def test_steps_in_inference_mode_and_of_tensors_made_there(policy):
    plain, params = leaves((40, 40), (7,)), leaves((40, 40), (7,))
    run(make(plain, policy), plain, 2)
    give_gradients(params, 0)
    optimizer = compile_(params, policy)
    with torch.inference_mode():
        optimizer.step()
        give_gradients(params, 1)
        optimizer.step()
        inner = leaves((40, 40), (7,))
        run(compile_(inner, policy), inner, 2)
    for a, b, c in zip(params, plain, inner, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(c, b.detach(), rtol=2e-5, atol=2e-6)


def test_another_default_device_changes_nothing():
    plain, params = leaves((40, 40), (7,)), leaves((40, 40), (7,))
    run(compile_(plain, "orthogonal"), plain, 2)
    optimizer = compile_(params, "orthogonal")
    run(optimizer, params, 1)
    give_gradients(params, 1)
    with torch.device("meta"):
        optimizer.step()
    assert_same_bits(params, plain)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_gradient_is_released_after_a_step():
    params = leaves((40, 40), (7,))
    optimizer = compile_(params)
    run(optimizer, params, 2)
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [ref() for ref in grads] == [None, None]


@pytest.mark.parametrize("way", ["load_state_dict", "state", "add_param_group"])
def test_state_that_is_no_longer_used_is_released_at_once(way):
    params = leaves((40, 40), (7,))
    optimizer = compile_(params)
    run(optimizer, params, 2)
    old = [weakref.ref(optimizer.state[p][key]) for p in params for key in ("exp_avg", "hidden_3")]
    if way == "load_state_dict":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "state":
        optimizer.state.clear()
        run(optimizer, params, 1)
    else:
        optimizer.param_groups.clear()
        optimizer.state.clear()
        (other,) = leaves((3,))
        optimizer.add_param_group({"params": [other]})
        run(optimizer, [other], 1)
    gc.collect()
    assert [ref() for ref in old] == [None] * 4


@pytest.mark.parametrize("policy", BOTH)
def test_a_step_takes_little_memory_besides_the_state(policy):
    params = leaves((2000, 1000), *[(100, 100)] * 50, *[(n,) for n in range(1, 300)])
    optimizer = compile_(params, policy)
    run(optimizer, params, 2)
    most = 8e6 * 4 * 2 if policy == "orthogonal" else 0  # directions of the largest matrix, and its products
    assert 0 < peak_bytes_of_a_step(optimizer) < 0.05 * 24 * sum(p.numel() for p in params) + 16e6 + most


def test_a_step_copies_few_of_many_strided_tensors_at_once():
    plain = [p.detach() for p in leaves(*[(30, 50, 10, 10)] * 30)]
    params = [p.to(memory_format=torch.channels_last).requires_grad_() for p in plain]
    optimizer = compile_(params)
    run(optimizer, params, 1)
    for p in params:
        p.grad = p.grad.contiguous()
    most = 3 * packing.COPIED + params[0].numel()  # three buckets, and the tensor that did not fit into the last
    assert 0 < peak_bytes_of_a_step(optimizer) < 28 * most < 0.5 * 28 * sum(p.numel() for p in params)


# --- compiled once --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_compilation(monkeypatch):
    """Fails the test if a kernel is made."""

    def refuse(*args):
        raise AssertionError("a kernel was compiled")

    monkeypatch.setattr(native_library, "_compile", refuse)


def test_nothing_is_compiled_again_for_schedules_groups_clipping_steps_or_a_hundred_shapes(no_compilation):
    params = leaves(*[(n, 17 + n % 5) for n in range(1, 101)])
    optimizer = compile_(
        [{"params": params[i::3], "lr": 1e-3 * (i + 1), "weight_decay": 0.1 * i, "betas": (0.8, 0.9 + 0.03 * i)}
         for i in range(3)]
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    frames = dict(torch._dynamo.utils.counters["frames"])
    for step in range(5):
        give_gradients(params, step)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
    other = leaves((50, 50))
    run(compile_(other, random_policy(seed=9)), other, 2)
    assert optimizer.backend.startswith("compiled")
    assert dict(torch._dynamo.utils.counters["frames"]) == frames


def test_loading_kernels_from_the_disk_takes_less_than_half_a_second_in_a_new_process():
    (p,) = leaves((40, 3))
    run(compile_([p], POLICIES["base"]), [p], 1)
    code = (
        "import time, torch; from learned_optim import LearnedOptimizer, Policy\n"
        "from learned_optim.engine import native_library\n"
        "def refuse(*a, **k): raise SystemExit('compiled again')\n"
        "native_library._compile = native_library._source = refuse\n"
        "p = torch.nn.Parameter(torch.ones(40, 3)); p.grad = torch.ones_like(p)\n"
        "opt = LearnedOptimizer([p], policy=Policy(), backend='compiled')\n"
        "t = time.process_time(); opt.step(); print(time.process_time() - t, opt.backend)"
    )
    done = run_command(code=code)
    assert done.returncode == 0, done.stderr
    seconds, backend = done.stdout.split(" ", 1)
    assert backend.startswith("compiled")
    assert float(seconds) < 0.5


def test_a_step_inside_the_users_own_compiled_function_works():
    (a,), (b,) = leaves((40, 40)), leaves((40, 40))
    plain, inside = compile_([a]), compile_([b])
    run(plain, [a], 2)
    step = torch.compile(lambda: inside.step(), backend="eager")
    for i in range(2):
        give_gradients([b], i)
        step()
    assert_same_bits([b], [a])


class TestAuto:
    def test_small_models_are_compiled_too(self):
        params = leaves((100, 100))
        optimizer = LearnedOptimizer(params, policy=POLICIES["random"])
        assert optimizer.backend == "not chosen before the first step"
        run(optimizer, params, 1)
        assert optimizer.backend == "compiled (10,000 parameters)"

    def test_so_are_their_few_parameters_of_another_dtype(self):
        params, plain = (leaves((100, 100)) + leaves((50,), dtype=torch.float64) for _ in range(2))
        optimizer = LearnedOptimizer(params, policy=POLICIES["random"])
        run(optimizer, params, 2)
        run(make(plain), plain, 2)
        expected = "compiled (10,000 torch.float32 parameters); compiled (50 torch.float64 parameters)"
        assert optimizer.backend == expected
        for a, b in zip(params, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)

    def test_a_gru_is_not_unless_asked_for(self):
        params = leaves((100, 100))
        optimizer = LearnedOptimizer(params, policy=POLICIES["gru"])
        run(optimizer, params, 1)
        assert optimizer.backend == "eager (10,000 parameters; only the gated cell is compiled)"

    def test_without_a_compiler_it_is_eager_and_says_once_what_to_install(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        auto._warn_once.cache_clear()
        params, plain, more = leaves((100, 100)), leaves((100, 100)), leaves((100, 100))
        optimizer = LearnedOptimizer(params, policy=POLICIES["random"])
        with pytest.warns(RuntimeWarning, match=r"slower: no C\+\+ compiler: install g\+\+ or clang") as caught:
            run(optimizer, params, 1)
        assert len(caught) == 1
        run(LearnedOptimizer(more, policy=POLICIES["random"]), more, 1)  # where warnings are errors
        run(make(plain), plain, 1)
        assert optimizer.backend == "eager (10,000 parameters; no compiler for cpu)"
        assert_same_bits(params, plain)

    @pytest.mark.parametrize(("size", "compiled"), [(999_999, False), (1_000_000, True)])
    def test_on_gpus_large_models_are(self, size, compiled, monkeypatch):
        monkeypatch.setattr(auto, "find_compiler", lambda device: "triton")
        backend = LearnedOptimizer(leaves((3,)), policy=POLICIES["random"])._backend
        assert backend._choice("cuda", size) == (compiled, "" if compiled else ", compiled from 1,000,000")
        assert backend._choice("cpu", 1) == (True, "")

    def test_a_failed_compilation_is_said_once_and_the_step_is_made_all_the_same(self, monkeypatch):
        def fail(*args):
            raise OSError("read-only file system\nmore")

        monkeypatch.setattr(native_library, "_compile", fail)
        policy = random_policy(PolicyConfig(eps=3e-8))  # of no other test
        plain, params, more = leaves((40, 40)), leaves((40, 40)), leaves((40, 40))
        run(make(plain, policy), plain, 2)
        optimizer = LearnedOptimizer(params, policy=policy)
        with pytest.warns(RuntimeWarning, match=r"could not be compiled.*OSError: read-only file system$") as caught:
            run(optimizer, params, 2)
        assert len(caught) == 1
        assert optimizer.backend == "eager (compilation failed: OSError: read-only file system)"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(compile_(more, policy), more, 2)
        assert_same_bits(params, plain)
        assert_same_bits(more, plain)

    def test_what_fails_in_the_middle_of_a_run_leaves_it_going_on(self, monkeypatch):
        """A gradient of another dtype needs another kernel."""
        policy = random_policy(PolicyConfig(eps=4e-8))  # of no other test
        results = []
        for backend in ("eager", "compiled"):
            params = leaves((40, 40), (7,))
            optimizer = make(params, policy, backend=backend)
            run(optimizer, params, 2)
            if backend == "compiled":
                assert optimizer.backend == "compiled (1,607 parameters)"
                monkeypatch.setattr(native_library, "_source", lambda kind: 1 / 0)
            params[1].data = params[1].data.bfloat16()
            give_gradients(params, 2)
            if backend == "compiled":
                with pytest.warns(RuntimeWarning, match="ZeroDivisionError: division by zero"):
                    optimizer.step()
            else:
                optimizer.step()
            results.append(params)
        assert optimizer.backend == "eager (compilation failed: ZeroDivisionError: division by zero)"
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)
