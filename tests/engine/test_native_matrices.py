"""Orthogonalising in C++ against the reference of rule/orthogonalize.py."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from learned_optim import LearnedOptimizer, Policy
from learned_optim.engine.kernels import CompilationError, find_compiler
from learned_optim.engine.native_library import Kind, library
from learned_optim.engine.native_matrices import NativeMatrices
from learned_optim.rule.orthogonalize import orthogonalize

pytestmark = pytest.mark.skipif(find_compiler("cpu") is None, reason="needs a C++ compiler")

CONFIG = Policy.from_pretrained("default").config
SHAPES = [
    (2, 2),
    (3, 5),
    (5, 3),
    (7, 300),
    (64, 64),
    (65, 64),
    (64, 130),
    (100, 100),
    (129, 200),
    (300, 150),
    (9, 3, 3),
]


def native(dtype: torch.dtype = torch.float32, **changes: Any) -> NativeMatrices:
    # The library of the bundled policy: it takes what it needs of the settings at run time.
    made = library(Kind(CONFIG, (dtype,) * 5))
    assert not isinstance(made, CompilationError)
    return NativeMatrices(made, dataclasses.replace(CONFIG, **changes).orthogonalization)


def param(shape: tuple[int, ...], transposed: bool = False, guarded: bool = True) -> Any:
    shape = torch.Size(shape)
    return SimpleNamespace(shape=shape, numel=shape.numel(), transposed=transposed, is_guarded=guarded)


def directions(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """[numel] each, of uneven singular values, some coordinates zero."""
    rng = torch.Generator().manual_seed(1)
    ds = [torch.randn(shape, dtype=dtype, generator=rng).flatten(1) for shape in SHAPES]
    ds = [d * torch.rand(d.shape[1], dtype=dtype, generator=rng) ** 3 for d in ds]
    return [d.masked_fill(torch.rand(d.shape, generator=rng) < 0.1, 0.0).flatten() for d in ds]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize(
    "changes", [{}, {"orthogonal_block": 0}, {"orthogonal_iterations": 1}, {"orthogonal_damping": 0.0}], ids=str
)
def test_reference(dtype: torch.dtype, tolerance: float, changes: dict[str, Any]) -> None:
    one = native(dtype, **changes)
    shares = torch.linspace(0.0, 1.0, len(SHAPES), dtype=torch.float64)
    ours = directions(dtype)
    factors = one([param(shape) for shape in SHAPES], ours, list(shares.split(1)))
    for shape, d, before, share, factor in zip(SHAPES, ours, directions(dtype), shares, factors, strict=True):
        matrix = before.view(1, shape[0], -1)
        expected, damped = orthogonalize(one.settings, matrix, share.to(dtype).view(1))
        torch.testing.assert_close(
            d.view_as(expected), expected, rtol=0.0, atol=tolerance * float(expected.abs().max())
        )
        assert float(factor) == pytest.approx(float(damped), rel=10 * tolerance)
        assert torch.equal(d == 0.0, before == 0.0)


def test_transposed() -> None:
    one = native()
    shapes = [(300, 150), (40, 70)]
    ds = [torch.randn(shape) for shape in shapes]
    stored = [d.mT.contiguous().flatten() for d in ds]
    one([param(shape, transposed=True) for shape in shapes], stored, [torch.ones(1)] * 2)
    for d, s in zip(ds, stored, strict=True):
        expected, _ = orthogonalize(one.settings, d.unsqueeze(0), 1.0)
        torch.testing.assert_close(s.view(d.mT.shape).mT, expected[0], rtol=0.0, atol=2e-5 * float(expected.max()))


def test_bits_depend_on_the_matrix_alone() -> None:
    one, together = native(), directions()
    params = [param(shape, guarded=False) for shape in SHAPES]
    shares = [torch.ones(1)] * len(SHAPES)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        one(params, together, shares)
        torch.set_num_threads(1)
        for p, ours, alone in zip(params, together, directions(), strict=True):
            one([p], [alone], [torch.ones(1)])
            assert torch.equal(ours, alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_zeros_and_what_is_not_finite(value: float) -> None:
    bad, good = torch.full((64 * 80,), value), torch.randn(64 * 80)
    alone = good.clone()
    one, p = native(), param((64, 80))
    one([p, p], [bad, good], [torch.ones(1)] * 2)
    one([p], [alone], [torch.ones(1)])
    assert torch.equal(good, alone)
    assert bool((bad == 0.0).all()) if value == 0.0 else bool(bad.isnan().all())


def test_what_it_takes() -> None:
    one, d = native(), torch.zeros(64 * 64)
    assert one.takes(param((64, 64)), d)
    assert not one.takes(param((64, 64)), torch.zeros(2 * 64 * 64)[::2])
    assert not one.takes(param((16, 16, 16), transposed=True), d)
    assert not native(orthogonal_block=0).takes(param((300, 300)), torch.zeros(300 * 300))


def test_a_step_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    run = NativeMatrices.__call__

    def spy(self: NativeMatrices, params: list, *rest: Any) -> Tensor:
        seen.extend(tuple(p.shape) for p in params)
        return run(self, params, *rest)

    monkeypatch.setattr(NativeMatrices, "__call__", spy)
    weight, bias = torch.nn.Parameter(torch.randn(20, 30)), torch.nn.Parameter(torch.zeros(20))
    opt = LearnedOptimizer([weight, bias], lr=1e-3, backend="compiled")
    weight.grad, bias.grad = torch.randn(20, 30), torch.randn(20)
    opt.step()
    assert seen == [(20, 30)]
