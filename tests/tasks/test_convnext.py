"""Depthwise convolutions with layer scale, and the batches they are trained on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.convnext import LayerScale, convnext
from learned_optim.tasks.nets import Residual


def network(scale: float | None, kernel: int = 5) -> nn.Sequential:
    return convnext(
        3, [8, 16], 2, 7, patch=2, kernel=kernel, expansion=3, activation=nn.GELU, scale=scale
    )  # fmt: skip


def test_blocks_begin_as_nearly_the_identity():
    images, changes = torch.randn(4, 8, 6, 6, dtype=torch.float64), []
    for scale in (1e-6, 1e-1):
        torch.manual_seed(3)
        block = next(m for m in network(scale).double().modules() if isinstance(m, Residual))
        changes.append(block(images) - images)
    torch.testing.assert_close(1e5 * changes[0], changes[1], rtol=1e-4, atol=1e-8)
    assert 0.001 < float(changes[1].detach().std()) < 0.1


def test_convolutions_of_blocks_are_depthwise():
    model = network(0.1)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [(m.groups, m.weight.shape) for m in depthwise] == [(w, (w, 1, 5, 5)) for w in (8, 8, 16, 16)]
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert not [m for m in network(None).modules() if isinstance(m, LayerScale)]


def test_targets_are_distributions_and_blends_follow_their_images():
    blended = 0
    for seed in range(6):
        task = FAMILIES["convnext_images"].task(seed)
        images, targets = next(task.batches(torch.Generator().manual_seed(0)))
        _, held_out = task._eval_source()  # type: ignore[attr-defined]
        torch.testing.assert_close(targets.sum(1), torch.ones(len(images)))
        torch.testing.assert_close(held_out.sum(1), torch.ones(len(held_out)))
        sharpest = held_out.amax(1)
        assert bool((sharpest == sharpest[0]).all())  # smoothed at most
        assert bool((targets.amax(1) <= sharpest[0] + 1e-6).all())
        blended += bool((targets.amax(1) < sharpest[0] - 0.01).any())
    assert 0 < blended < 6


def test_layer_scales_of_many_magnitudes_are_drawn():
    values = []
    for seed in range(12):
        params, _ = FAMILIES["convnext_images"].task(seed).init(torch.Generator().manual_seed(0))
        factors = [p for k, p in params.items() if k.endswith("factor")]
        values += [float(factors[0][0])] if factors else []
    assert len(values) < 12  # some have none
    assert min(values) < 1e-4 < 1e-2 < max(values) <= 0.1 + 1e-9


@pytest.mark.parametrize("kernel", [3, 7])
def test_kernels_keep_the_size(kernel):
    block = next(m for m in network(0.1, kernel).modules() if isinstance(m, Residual))
    assert block(torch.randn(1, 8, 6, 6)).shape == (1, 8, 6, 6)
