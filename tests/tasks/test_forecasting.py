"""The family of forecasts."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.forecasting import (
    Convolutional,
    Decomposed,
    Panel,
    Patches,
    Recurrent,
    Stacks,
    forecast_loss,
    quantile_loss,
)
from learned_optim.tasks.nets import Style


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(6))
def test_a_panel_is_finite_and_every_series_its_own(seed):
    x = Panel(seeded(seed), 8, 300, 3).make()
    assert x.shape == (8, 300, 3)
    assert bool(x.isfinite().all())
    assert float((x.std(1) - 1).abs().max()) < 0.3
    assert float((x[0] - x[1]).abs().mean()) > 0.2
    assert float(x.diff(dim=1).std()) < 1.9  # that of white noise would be about sqrt(2) and more with chaos


@pytest.mark.parametrize(
    "model",
    [
        Decomposed(24, 6, 5),
        Convolutional(3, 6, 8, 2, Style(norm="layer")),
        Patches(24, 6, 4, 16, 1, 2, Style()),
        Recurrent(3, 6, 8, 2),
        Stacks(24, 6, 16, 2, Style()),
    ],
)
def test_every_network_forecasts_every_channel(model):
    assert model(torch.randn(5, 3, 24)).shape == (5, 3, 6)


def test_the_linear_model_sees_the_mean_of_its_window_and_the_rest():
    model, x = Decomposed(20, 1, 5), torch.randn(1, 1, 20, generator=seeded(0))
    for layer in (model.slow, model.fast):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    with torch.no_grad():
        model.slow.weight[0, 10] = 1.0
    torch.testing.assert_close(model(x).squeeze(), x[0, 0, 8:13].mean())
    with torch.no_grad():
        model.fast.weight[0, 10] = 1.0
    torch.testing.assert_close(model(x).squeeze(), x[0, 0, 10])


def test_convolutions_look_back_only():
    model, x = Convolutional(2, 1, 8, 2, Style()), torch.randn(1, 2, 16, generator=seeded(0))
    late = x.clone()
    late[..., 9:] += 1.0
    before, after = model.body(x), model.body(late)
    torch.testing.assert_close(before[..., :9], after[..., :9])
    assert not torch.allclose(before[..., 9:], after[..., 9:])


def test_the_quantile_loss_is_smallest_at_the_quantiles():
    values = torch.randn(4001, generator=seeded(0))
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    best = values.quantile(quantiles)
    loss = quantile_loss(values[:, None] - best, quantiles)
    for i in range(3):
        for step in (-0.05, 0.05):
            shifted = best.clone()
            shifted[i] += step
            assert quantile_loss(values[:, None] - shifted, quantiles) > loss


@pytest.mark.parametrize("kind", ["mse", "huber", "quantile"])
def test_a_centred_forecast_ignores_the_level(kind):
    past, future = torch.randn(4, 2, 24, generator=seeded(0)), torch.randn(4, 2, 6, generator=seeded(1))
    model = Decomposed(24, 18 if kind == "quantile" else 6, 5)
    for centred in (True, False):
        loss = forecast_loss(kind, centred)
        losses = [loss(model, (past + level, future + level)) for level in (0.0, 3.0)]
        assert torch.allclose(losses[0], losses[1], atol=1e-4) is centred


def test_held_out_windows_come_after_those_trained_on():
    task = FAMILIES["forecasting"].task(0)
    trained = torch.cat([torch.cat(b, 2)[:, 0] for b in islice(task.batches(seeded(0)), 200)])
    held_out = torch.cat(task._eval_source(), 2)[:, 0]  # type: ignore[attr-defined]

    def neighbours(x: torch.Tensor) -> set[tuple[float, ...]]:
        return set(map(tuple, x.unfold(1, 2, 1).flatten(0, 1).tolist()))  # two values never coincide by chance

    assert len(held_out) == 512
    assert len(neighbours(trained)) > 1000
    assert not neighbours(trained) & neighbours(held_out)


@pytest.mark.parametrize("seed", [278, 385])
def test_short_panels_with_long_windows_have_held_out_ones(seed):
    task = FAMILIES["forecasting"].task(seed)
    assert task.eval_loss is not None
    assert bool(task.eval_loss(*task.init(seeded(0))).isfinite())
