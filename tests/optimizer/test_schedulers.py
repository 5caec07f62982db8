"""Every learning-rate scheduler of torch, and what each of them writes into the groups."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel

from helpers.support import POLICIES, assert_same_bits, copies, give_gradients, leaves, make, regression, train

# Torch 2.6 warns of what its own SequentialLR does.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")

SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 0.95**t),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lrs.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, milestones=[3, 6]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: lrs.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=8),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=8),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: lrs.CyclicLR(o, base_lr=1e-3, max_lr=1e-1, step_size_up=4),
    "CyclicLR without momentum": lambda o: lrs.CyclicLR(
        o, base_lr=1e-3, max_lr=1e-1, step_size_up=4, cycle_momentum=False
    ),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.03, total_steps=20, cycle_momentum=True),
    "OneCycleLR without momentum": lambda o: lrs.OneCycleLR(o, max_lr=0.03, total_steps=20, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=3), lrs.CosineAnnealingLR(o, T_max=6)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, gamma=0.9)]),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_it_trains_under_every_scheduler(policy, name):
    model, loss = regression()
    optimizer = make(model.parameters(), policy, lr=0.01)
    losses = train(model, loss, optimizer, 12, SCHEDULERS[name](optimizer))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_writes_what_it_would_write_for_adamw_and_the_update_follows(name):
    """The same learning rates and betas as AdamW's, and the same result as setting them by hand."""
    (p,) = leaves((4, 3))
    (q,) = copies([p])
    (r,) = copies([p])
    optimizer, manual = make([p], lr=0.01), make([q], lr=0.01)
    adamw = torch.optim.AdamW([r], lr=0.01)
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](adamw)
    rates = []
    for step in range(10):
        for key in ("lr", "betas"):
            assert optimizer.param_groups[0][key] == adamw.param_groups[0][key]
            manual.param_groups[0][key] = adamw.param_groups[0][key]
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        for x in (p, q, r):
            give_gradients([x], step)
        for o in (optimizer, manual, adamw):
            o.step()
        for s in schedulers:
            s.step(1.0) if isinstance(s, lrs.ReduceLROnPlateau) else s.step()
    assert_same_bits([p], [q])
    assert len(set(rates)) > 1
    if name in ("OneCycleLR", "CyclicLR"):
        assert len({betas for _, betas in rates}) > 1


def test_one_cycle_moves_beta1_and_the_update_with_it():
    (p,) = leaves((4, 3))
    (q,) = copies([p])
    one, two = make([p]), make([q])
    with_momentum = lrs.OneCycleLR(one, max_lr=0.1, total_steps=20, cycle_momentum=True)
    without = lrs.OneCycleLR(two, max_lr=0.1, total_steps=20, cycle_momentum=False)
    for step in range(5):
        for x, o, s in ((p, one, with_momentum), (q, two, without)):
            give_gradients([x], step)
            o.step()
            s.step()
    assert one.param_groups[0]["lr"] == two.param_groups[0]["lr"]
    assert one.param_groups[0]["betas"] != two.param_groups[0]["betas"]
    assert not torch.equal(p, q)


def test_a_scheduler_of_a_tensor_lr_is_followed():
    (p,) = leaves((4, 3))
    (q,) = copies([p])
    one, two = make([p], lr=torch.tensor(0.1, dtype=torch.float64)), make([q], lr=0.1)
    schedulers = lrs.CosineAnnealingLR(one, 8), lrs.CosineAnnealingLR(two, 8)
    for step in range(6):
        for x, o, s in zip((p, q), (one, two), schedulers, strict=True):
            give_gradients([x], step)
            o.step()
            s.step()
    assert isinstance(one.param_groups[0]["lr"], torch.Tensor)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingWarmRestarts", "SequentialLR", "ReduceLROnPlateau"])
def test_optimizer_and_scheduler_resume_together_bit_exactly(name):
    def setup():
        params = leaves((4, 3), (5,))
        optimizer = make(params, lr=0.01)
        return params, optimizer, SCHEDULERS[name](optimizer)

    def advance(params, optimizer, scheduler, steps):
        for step in steps:
            give_gradients(params, step)
            optimizer.step()
            scheduler.step(1.0) if isinstance(scheduler, lrs.ReduceLROnPlateau) else scheduler.step()

    params, optimizer, scheduler = setup()
    advance(params, optimizer, scheduler, range(5))
    resumed_params, resumed, resumed_scheduler = setup()
    with torch.no_grad():
        for a, b in zip(resumed_params, params, strict=True):
            a.copy_(b)
    resumed.load_state_dict(optimizer.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    advance(params, optimizer, scheduler, range(5, 10))
    advance(resumed_params, resumed, resumed_scheduler, range(5, 10))
    assert_same_bits(resumed_params, params)


def test_weights_can_be_averaged_beside_it():
    model, loss = regression()
    average = AveragedModel(model)
    optimizer = make(model.parameters(), lr=0.01)
    for _ in range(5):
        train(model, loss, optimizer, 1)
        average.update_parameters(model)
    assert average.n_averaged == 5
    assert not torch.equal(average.module[0].weight, model[0].weight)
