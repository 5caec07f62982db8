"""Runs that begin at their solution or near it: where they begin, what gradient they have, what is compared."""

from __future__ import annotations

import itertools
from inspect import getclosurevars

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from learned_optim.tasks import FAMILIES


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(task, params, batch) -> torch.Tensor:
    leaves = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
    grads = torch.autograd.grad(task.loss(leaves, {}, batch), list(leaves.values()))
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("number", range(6))
def test_pure_noise_begins_at_its_lowest_loss_whatever_the_seed(number):
    task = FAMILIES["pure_noise"].task(number)
    (params, _), (again, _) = task.init(seeded(0)), task.init(seeded(1))
    torch.testing.assert_close(params, again, rtol=0, atol=0)
    module, batch = task._make_module(), next(task.batches(seeded()))  # type: ignore[attr-defined]
    module.load_state_dict(params)
    y = module(batch["inputs"]).detach()
    torch.testing.assert_close(y.softmax(1) if "labels" in batch else y, batch["clean"])
    best = float(task.eval_loss(params, {}))  # type: ignore[attr-defined]
    assert best > 0.01
    for seed in range(5):
        rng = seeded(seed)
        moved = {k: p + 0.05 * p.std(correction=0) * torch.randn(p.shape, generator=rng) for k, p in params.items()}
        assert float(task.eval_loss(moved, {})) > best  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", range(6))
def test_gradients_at_the_solution_cancel(number):
    task = FAMILIES["pure_noise"].task(number)
    params, _ = task.init(seeded())
    grads = torch.stack([gradient(task, params, b) for b in itertools.islice(task.batches(seeded(1)), 200)])
    size = grads.square().mean().sqrt()
    assert float(size) > 0.0
    # The mean of 200 independent ones is smaller by the root of 200.
    assert float(grads.mean(0).square().mean().sqrt() / size) == pytest.approx(200**-0.5, rel=0.35)


@pytest.mark.parametrize("name", ["pure_noise", "noise_after_convergence"])
def test_the_gradient_is_that_of_noisy_labels_and_the_value_that_without(name):
    kinds = set()
    for number in range(8):
        task = FAMILIES[name].task(number)
        params, _ = task.init(seeded())
        module = task._make_module()  # type: ignore[attr-defined]
        module.load_state_dict(params)
        batch = next(task.batches(seeded(1)))
        y, clean = module(batch["inputs"]), batch["clean"]
        options = getclosurevars(task._loss_fn).nonlocals  # type: ignore[attr-defined]
        pull = options["pull"]
        if "labels" in batch:
            noisy, value = cross_entropy(y, batch["labels"]), cross_entropy(y, clean)
        else:
            value = mse_loss(y, clean) + options["noise"] ** 2
            # Without a pull the error stays the same wherever the weights go.
            noisy = mse_loss(y, (clean if pull else y.detach()) - (-1 if pull else 1) * batch["errors"])
        assert float(task.loss(params, {}, batch)) == pytest.approx(float(value.detach()), rel=1e-5)
        noisy.backward()
        expected = torch.cat([p.grad.flatten() for p in module.parameters()])
        torch.testing.assert_close(gradient(task, params, batch), expected, rtol=1e-4, atol=1e-6)
        kinds.add(("labels" in batch, pull))
    assert kinds == {(True, True), (False, True)} | ({(False, False)} if name == "pure_noise" else set())


def test_a_run_after_convergence_begins_near_the_solution_and_elsewhere_each_time():
    for number in range(4):
        task = FAMILIES["noise_after_convergence"].task(number)
        losses = {float(task.eval_loss(*task.init(seeded(seed)))) for seed in range(3)}  # type: ignore[attr-defined]
        assert len(losses) == 3


def test_label_noise_has_the_level_that_the_loss_counts():
    for number in range(8):
        task = FAMILIES["noise_after_convergence"].task(number)
        batches = list(itertools.islice(task.batches(seeded()), 40))
        if "errors" in batches[0]:
            noise = getclosurevars(task._loss_fn).nonlocals["noise"]  # type: ignore[attr-defined]
            assert float(torch.cat([batch["errors"] for batch in batches]).std()) == pytest.approx(noise, rel=0.2)
