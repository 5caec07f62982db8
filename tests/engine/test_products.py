"""Products as GPUs make them, padded and of two-byte numbers, on the CPU: against those of each size by itself."""

from __future__ import annotations

import pytest
import torch

from helpers.support import copies, leaves, make, random_policy, run
from learned_optim import PolicyConfig
from learned_optim.engine import products, step
from learned_optim.engine.gpu import GpuBackend
from learned_optim.engine.products import gram, padded, padded_together

#: Equal rows and columns of many lengths, tall and wide; cut into blocks of 16.
SHAPES = [(32, 40), (32, 47), (50, 32), (32, 47), (16, 20), (20, 16), (16, 30), (3,), (32, 8, 3, 2)]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(products, "ON", ("cpu", "cuda"))


def policy(safeguard=False):
    return random_policy(
        PolicyConfig(orthogonal=1.0 if safeguard else 0.7, orthogonal_block=16, orthogonal_damping=1.5)
    )


def blocks_of(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, r, c, generator=generator) for n, r, c in sizes]


def test_columns_of_zeros_change_no_product():
    blocks = blocks_of((2, 8, 5), (3, 8, 12), (1, 8, 7))
    whole = padded(blocks)
    assert whole.shape == (6, 8, 12)
    for x, a, cut in zip(blocks, gram(whole).split([2, 3, 1]), whole.split([2, 3, 1]), strict=True):
        torch.testing.assert_close(a, x @ x.mT)
        assert torch.equal(cut[..., : x.shape[2]], x)
        assert not cut[..., x.shape[2] :].any()


def test_on_a_cpu_each_size_is_multiplied_by_itself():
    assert padded_together(blocks_of((2, 8, 5), (3, 8, 5)), 1 << 16) == [[0], [1]]


def test_batches_hold_everything_once_and_waste_little(as_on_a_gpu):
    blocks = blocks_of((2, 8, 10), (3, 8, 12), (1, 8, 100), (4, 8, 11), (5, 8, 90), (9, 8, 1))
    batches = padded_together(blocks, 1 << 16)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert len(batches) == 3
    for batch in batches:
        together = [blocks[i] for i in batch]
        assert padded(together).numel() <= products.WASTE * sum(x.numel() for x in together)


def test_a_batch_is_no_larger_than_allowed(as_on_a_gpu):
    blocks = blocks_of(*[(1, 8, 10)] * 7)
    assert [len(batch) for batch in padded_together(blocks, 250)] == [3, 3, 1]


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_padded_steps_agree_with_plain_ones(dtype, safeguard, monkeypatch):
    plain = leaves(*SHAPES, dtype=dtype)
    params = copies(plain)
    reference, optimizer = (make(ps, policy(), safeguard=safeguard) for ps in (plain, params))
    run(reference, plain, 4)
    monkeypatch.setattr(products, "ON", ("cpu",))
    batches = []

    def counted(blocks, most):
        batches.append(padded_together(blocks, most))
        return batches[-1]

    monkeypatch.setattr("learned_optim.engine.step.padded_together", counted)
    run(optimizer, params, 4)
    assert max(len(batch) for one in batches for batch in one) > 1
    rtol, atol = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-2, 1e-3), torch.float64: (1e-12, 1e-12)}[dtype]
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    for name, figures in optimizer.diagnostics().items():
        assert figures == pytest.approx(reference.diagnostics()[name], rel=1e-2 if dtype is torch.bfloat16 else 1e-4)


def relative_change(params, plain, before):
    """How far updates of matrices differ, over their length."""
    changes = [(a - b).norm() / (b - c).norm() for a, b, c in zip(params, plain, before, strict=True) if a.ndim > 1]
    return [float(change.detach()) for change in changes]


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_directions_of_two_bytes_change_updates_by_their_rounding(dtype, most, as_on_a_gpu, monkeypatch):
    plain = leaves(*SHAPES)
    params, before = copies(plain), copies(plain)
    run(make(plain, policy(), weight_decay=0.0), plain, 1)
    apply = step._apply
    monkeypatch.setattr(step, "_apply", lambda *args: (m._replace(d=m.d.to(dtype)) for m in apply(*args)))
    run(make(params, policy(), weight_decay=0.0), params, 1)
    assert {p.dtype for p in params} == {torch.float32}
    changes = relative_change(params, plain, before)
    assert 1e-5 < min(changes) <= max(changes) < most


def test_kernels_write_directions_of_two_bytes(as_on_a_gpu, monkeypatch):
    pytest.importorskip("triton")
    plain = leaves(*SHAPES)
    params, before = copies(plain), copies(plain)
    optimizer = make(params, policy(), weight_decay=0.0)
    optimizer._backend = GpuBackend(optimizer._backend.head)
    run(make(plain, policy(), weight_decay=0.0), plain, 3)
    monkeypatch.setattr(products, "DIRECTIONS", torch.bfloat16)
    run(optimizer, params, 3)
    changes = relative_change(params, plain, before)
    assert 1e-5 < min(changes) <= max(changes) < 0.05


def test_two_byte_directions_are_for_float32_arithmetic_on_gpus(monkeypatch):
    monkeypatch.setattr(products, "DIRECTIONS", torch.bfloat16)
    assert products.directions_dtype(torch.float32, torch.device("cuda")) == torch.bfloat16
    assert products.directions_dtype(torch.float64, torch.device("cuda")) == torch.float64
    assert products.directions_dtype(torch.float32, torch.device("cpu")) == torch.float32
