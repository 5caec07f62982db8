"""State in two bytes: right on average, odd, and never at a standstill."""

from __future__ import annotations

import pytest
import torch

from learned_optim.rule.stochastic_rounding import rounded_state
from learned_optim.rule.types import CoordinateState

pytestmark = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def rounded(x, noise_of, dtype):
    state = CoordinateState(x, noise_of, (x,))
    return rounded_state(state, [dtype, torch.float32, dtype]).exp_avg.double()


def test_it_is_right_on_average_and_to_one_of_the_two_neighbours(dtype):
    x = torch.full((100_000,), 1.0 + 0.3 * torch.finfo(dtype).eps)
    noise = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    y = rounded(x, noise, dtype)
    assert set(y.unique().tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}
    assert (y.mean() - 1.0) / torch.finfo(dtype).eps == pytest.approx(0.3, abs=0.01)


def test_it_is_odd_and_leaves_what_fits_and_what_is_not_finite(dtype):
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rounded(-x, noise, dtype), -rounded(x, noise, dtype))
    fits = x.to(dtype).float()
    assert torch.equal(rounded(fits, noise, dtype), fits.double())
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    after = rounded(special, noise[:4], dtype)
    assert torch.equal(after.isnan(), special.isnan())
    assert torch.equal(after[[0, 1, 3]], special[[0, 1, 3]].double())


def test_a_slow_average_does_not_stand_still(dtype):
    target, v = torch.full((2000,), 1.0), torch.full((2000,), 0.5)
    slow = torch.zeros(2000)
    nearest = torch.zeros(2000, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        v = 0.999 * v + 0.001 * torch.rand(2000, generator=generator)
        slow = rounded(slow.float() + 1e-3 * (target - slow.float()), v, dtype)
        nearest = (nearest.float() + 1e-3 * (target - nearest.float())).to(dtype)
    exact = 1.0 - (1.0 - 1e-3) ** 3000
    assert slow.mean() == pytest.approx(exact, abs=0.01)
    assert abs(nearest.double().mean() - exact) > 5 * abs(slow.mean() - exact)
