"""Every dtype, shape and memory layout a parameter can have, and the borders between chunks."""

from __future__ import annotations

import pytest
import torch

from helpers.optimizer_checks import assert_arithmetic_is_float32, assert_chunks_leave_no_seam
from helpers.support import (
    DTYPES,
    POLICIES,
    assert_same_bits,
    assert_same_state,
    copies,
    give_gradients,
    leaves,
    make,
    run,
)
from learned_optim.engine import eager

# --- dtypes --------------------------------------------------------------------------------------------------------


def expected_state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_state_is_at_least_float32(dtype, policy):
    params = leaves((5, 4), (70_000,), dtype=dtype)
    optimizer = make(params, policy)
    run(optimizer, params, 2)
    for p in params:
        assert p.dtype == dtype
        for key, value in optimizer.state[p].items():
            assert value.dtype == (torch.float32 if key == "step" else expected_state_dtype(dtype)), key


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dtype_is_honoured_and_the_second_moment_stays_precise(dtype, state_dtype):
    (p,) = leaves((5, 4), dtype=dtype)
    optimizer = make([p], state_dtype=state_dtype)
    run(optimizer, [p], 2)
    state = optimizer.state[p]
    assert state["exp_avg"].dtype == state["hidden_0"].dtype == state["hidden_3"].dtype == state_dtype
    assert state["exp_avg_sq"].dtype == torch.promote_types(state_dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
def test_arithmetic_is_float32_whatever_the_parameter(dtype, policy):
    params = leaves((5, 4), (), (70_000,), dtype=dtype)
    reference = [p.detach().float().requires_grad_() for p in params]
    assert_arithmetic_is_float32(params, reference, policy, lr=0.05)


@pytest.mark.parametrize("policy", POLICIES)
def test_float64_is_computed_in_float64(policy):
    fine, coarse = leaves((5, 4), dtype=torch.float64), leaves((5, 4))
    run(make(fine, policy, lr=0.05), fine, 5)
    run(make(coarse, policy, lr=0.05), coarse, 5)
    torch.testing.assert_close(coarse[0].double(), fine[0], rtol=1e-3, atol=1e-4)
    assert not torch.equal(fine[0].float().double(), fine[0])


def test_two_byte_state_changes_the_result_little():
    plain, small = leaves((30, 30)), leaves((30, 30))
    run(make(plain, lr=0.01), plain, 20)
    run(make(small, lr=0.01, state_dtype=torch.bfloat16), small, 20)
    start = leaves((30, 30))[0]
    moved = (plain[0] - start).norm()
    assert 0 < (plain[0] - small[0]).norm() < 0.05 * moved


def test_dtypes_may_be_mixed_in_one_group():
    together = [leaves((6,), (4, 4), dtype=dtype) for dtype in DTYPES]
    alone = [copies(params) for params in together]
    optimizer = make([p for params in together for p in params])
    each = [make(params) for params in alone]
    for step in range(3):
        for params in (*together, *alone):
            give_gradients(params, step)
        optimizer.step()
        for o in each:
            o.step()
    for a, b in zip(together, alone, strict=True):
        assert_same_bits(a, b)


# --- complex -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(5, 4), (7,), (), (190, 200)])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_complex_parameter_is_the_pair_of_its_parts(policy, shape, maximize):
    complex_param = torch.randn(shape, dtype=torch.complex64).requires_grad_()
    real_param = torch.view_as_real(complex_param.detach()).clone().requires_grad_()
    optimizer, real = (make([p], policy, lr=0.01, maximize=maximize) for p in (complex_param, real_param))
    for step in range(3):
        give_gradients([complex_param], step)
        real_param.grad = torch.view_as_real(complex_param.grad).clone()
        optimizer.step()
        real.step()
    assert_same_bits([torch.view_as_real(complex_param.detach())], [real_param])
    for key, value in real.state[real_param].items():
        ours = optimizer.state[complex_param][key]
        assert ours.shape == (complex_param.shape if value.shape == real_param.shape else ())
        assert torch.equal(torch.view_as_real(ours) if ours.is_complex() else ours, value)


def test_with_zero_weights_a_complex_parameter_is_like_two_real_ones():
    z = torch.randn(4, dtype=torch.complex64).requires_grad_()
    parts = [z.real.detach().clone().requires_grad_(), z.imag.detach().clone().requires_grad_()]
    one, two = make([z], "base"), make(parts, "base")
    for step in range(5):
        give_gradients([z], step)
        parts[0].grad, parts[1].grad = z.grad.real.clone(), z.grad.imag.clone()
        one.step()
        two.step()
    torch.testing.assert_close(z.real, parts[0])
    torch.testing.assert_close(z.imag, parts[1])


def test_a_complex_gradient_may_be_a_lazy_conjugate():
    z = torch.randn(4, dtype=torch.complex64).requires_grad_()
    (w,) = copies([z])
    one, two = make([z]), make([w])
    g = torch.randn(4, dtype=torch.complex64)
    z.grad, w.grad = g.conj(), g.conj().resolve_conj()
    assert z.grad.is_conj()
    one.step()
    two.step()
    assert_same_bits([z], [w])


# --- shapes and strides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_and_empty_tensors(policy, dtype):
    shapes = [(), (0,), (3, 0, 2), (1,), (1, 1, 1)]
    params = leaves(*shapes, (4,), dtype=dtype)
    alone = leaves(*shapes, (4,), dtype=dtype)[-1]
    optimizer, single = make(params, policy, lr=0.1), make([alone], policy, lr=0.1)
    run(optimizer, params, 3)
    for step in range(3):
        # The gradients that the last tensor was given, which came after the others'.
        give_gradients([*leaves(*shapes, dtype=dtype), alone], step)
        single.step()
    assert_same_bits([params[-1]], [alone])
    assert [p.shape for p in params[:-1]] == shapes
    assert all(bool(p.isfinite().all()) for p in params)
    assert optimizer.state[params[1]]["step"] == 3
    optimizer.load_state_dict(optimizer.state_dict())


LAYOUTS = {
    "transposed": lambda n: torch.randn(n, 2 * n).t(),
    "every second": lambda n: torch.randn(n, 4 * n)[:, ::2],
    "a column of a table": lambda n: torch.randn(n, 2 * n, 2)[..., 0],
    "channels_last": lambda n: torch.randn(n, 5, 3, 2).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda n: torch.randn(n, 2, 3, 2, 2).to(memory_format=torch.channels_last_3d),
    "permuted": lambda n: torch.randn(n, 5, 6).permute(2, 0, 1),
    "with an offset": lambda n: torch.randn(2 * n * n + 1)[1:].view(n, 2 * n),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_make_no_difference(policy, large, layout):
    n = {"channels_last": 2500, "channels_last_3d": 3000, "permuted": 2500}.get(layout, 200) if large else 6
    values = LAYOUTS[layout](n)
    assert (values.numel() > eager.SMALL) == large
    strided = values.detach().requires_grad_()
    strides = strided.stride()
    plain = values.detach().contiguous().clone().requires_grad_()
    one, two = make([strided], policy, lr=0.05), make([plain], policy, lr=0.05)
    for step in range(3):
        give_gradients([strided], step)
        plain.grad = strided.grad.contiguous()
        one.step()
        two.step()
    assert strided.stride() == strides
    # A large dense tensor is summed in the order of its memory.
    torch.testing.assert_close(strided.detach(), plain.detach(), rtol=1e-4, atol=1e-5)
    if not large:
        assert_same_bits([strided], [plain])


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("param_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_layout", [torch.contiguous_format, torch.channels_last, "expanded"])
def test_gradient_and_parameter_may_differ_in_layout(large, param_layout, grad_layout):
    shape = (2500, 5, 3, 2) if large else (4, 5, 3, 2)
    values = torch.randn(shape)
    strided = values.clone().contiguous(memory_format=param_layout).requires_grad_()
    plain = values.clone().requires_grad_()
    one, two = make([strided], lr=0.05), make([plain], lr=0.05)
    for _ in range(3):
        if grad_layout == "expanded":
            grad = torch.randn(shape[1:]).expand(shape)
        else:
            grad = torch.randn(shape).contiguous(memory_format=grad_layout)
        strided.grad, plain.grad = grad, grad.contiguous()
        one.step()
        two.step()
    torch.testing.assert_close(strided.detach(), plain.detach(), rtol=1e-4, atol=1e-5)


def test_a_parameter_that_is_a_slice_leaves_the_rest_of_its_memory_alone():
    for n in (10, 300):
        table = torch.zeros(n, 2 * n)
        p = table[:, ::2].requires_grad_()
        run(make([p]), [p], 2)
        assert bool(p.detach().any())
        assert not bool(table[:, 1::2].any())


# --- chunks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("chunk", "numel"), [(16, 15), (16, 16), (16, 17), (16, 100), (1, 5), (64, 1000)])
def test_a_tensor_in_chunks_equals_the_rule_on_the_whole(policy, chunk, numel, monkeypatch):
    assert_chunks_leave_no_seam(policy, chunk, numel, monkeypatch)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tensor_of_several_chunks_of_the_real_size_equals_the_rule_on_the_whole(policy, monkeypatch):
    assert_chunks_leave_no_seam(policy, eager.CHUNK, 2 * eager.CHUNK + 37, monkeypatch, steps=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_of_chunks_is_not_visible(dtype, monkeypatch):
    results = []
    for chunk in (eager.CHUNK, 1 << 12, 10_007):
        monkeypatch.setattr(eager, "CHUNK", chunk)
        params = leaves((70_000,), (300, 250), dtype=dtype)
        optimizer = make(params, lr=0.01)
        run(optimizer, params, 3)
        results.append([p.detach() for p in params])
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 0.1)
            assert (a == b).float().mean() > (0.99 if dtype in (torch.bfloat16, torch.float16) else 0.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_large_tensor_equals_itself_run_as_a_small_one(policy, monkeypatch):
    large = leaves((40_000,), dtype=torch.float64)
    run(make(large, policy, lr=0.01), large, 3)
    monkeypatch.setattr(eager, "SMALL", 1 << 20)
    small = leaves((40_000,), dtype=torch.float64)
    run(make(small, policy, lr=0.01), small, 3)
    torch.testing.assert_close(large[0], small[0], rtol=1e-11, atol=1e-13)


def test_a_different_dtype_of_state_is_kept_over_many_steps():
    (p,) = leaves((70_000,), dtype=torch.bfloat16)
    optimizer = make([p], state_dtype=torch.bfloat16)
    run(optimizer, [p], 3)
    other = make(copies([p]), state_dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, other)
