"""One step and what surrounds it: closures, missing gradients, grouping, hooks, errors in the middle."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from helpers.support import (
    POLICIES,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    copies,
    give_gradients,
    leaves,
    make,
    peak_bytes_of_a_step,
    regression,
    run,
    snapshot,
    train,
)
from learned_optim import LearnedOptimizer
from learned_optim.engine import eager

#: Many small tensors, side by side in a few vectors, and two large ones, in chunks.
MANY = [(3,), (5, 7), (), (2, 3, 3, 3), (64,), (40, 30), (129,), (8, 8), (17,), (1, 1), (100,), (33, 3)] * 2
LARGE = [(70_001,), (300, 250)]


# --- direction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("options", [{}, {"lr": 0.01}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}])
def test_it_goes_in_the_right_direction(policy, contiguous, options):
    if contiguous:
        weight, bias = torch.randn(10, 5).requires_grad_(), torch.randn(10).requires_grad_()
    else:
        weight = torch.randn(10, 5, 2)[..., 0].requires_grad_()
        bias = torch.randn(10, 2)[..., 0].requires_grad_()
    x = torch.randn(5)
    optimizer = make([weight, bias], policy, **options)

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    assert (closure().item() > first) == options.get("maximize", False)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_trains_a_network(policy):
    model, loss = regression()
    losses = train(model, loss, make(model.parameters(), policy, lr=0.01), 100)
    assert losses[-1] < {"gru": 0.8}.get(policy, 0.4) * losses[0]


@pytest.mark.parametrize("policy", ["base", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_descends_the_rosenbrock_valley(policy, dtype):
    p = torch.tensor([1.5, 1.5], dtype=dtype, requires_grad=True)
    optimizer = make([p], policy, lr=0.01, weight_decay=0.0)
    for _ in range(500):
        optimizer.zero_grad()
        ((1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2).backward()
        optimizer.step()
    assert p.detach().dist(torch.ones(2, dtype=dtype)) < 0.6


# --- closures ------------------------------------------------------------------------------------------------------


def test_a_closure_is_taken_by_position_and_by_keyword_and_its_value_is_returned():
    results = []
    for call in (lambda o, c: o.step(c), lambda o, c: o.step(closure=c)):
        model, loss = regression()
        optimizer = make(model.parameters())

        def closure(loss=loss, optimizer=optimizer):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        expected = loss().item()
        assert call(optimizer, closure).item() == expected
        results.append(list(model.parameters()))
    assert_same_bits(*results)
    model, loss = regression()
    optimizer = make(model.parameters())
    loss().backward()
    assert optimizer.step() is None
    assert_same_bits(list(model.parameters()), results[0])


def test_a_closure_that_raises_changes_nothing():
    (p,) = leaves((3,))
    optimizer = make([p])
    run(optimizer, [p], 1)
    before = snapshot(optimizer)

    def closure():
        raise ArithmeticError("broken model")

    with pytest.raises(ArithmeticError, match="broken model"):
        optimizer.step(closure)
    assert_unchanged(optimizer, before)


def test_the_mode_of_autograd_is_left_as_it_was():
    (p,) = leaves((3,))
    optimizer = make([p])
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        optimizer.step()
        assert not torch.is_grad_enabled()
    assert p.requires_grad
    assert p.grad_fn is None


def test_under_inference_mode_or_not_state_never_requires_a_gradient():
    (p,) = leaves((3,))
    optimizer = make([p])
    run(optimizer, [p], 2)
    assert not any(v.requires_grad for v in optimizer.state[p].values())


# --- parameters without gradients, frozen, added, tied ---------------------------------------------------------------


def test_a_parameter_without_gradient_is_left_alone_and_gets_no_state():
    p, q = leaves((3,), (4,))
    before = q.detach().clone()
    optimizer = make([p, q])
    give_gradients([p], 0)
    optimizer.step()
    assert_same_bits([q], [before])
    assert q not in optimizer.state
    assert p in optimizer.state


def test_step_is_noop_when_params_have_no_grad():
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    optimizer = make(params)
    assert optimizer.step(lambda: torch.tensor([1.0])).item() == 1.0
    assert_same_bits(params, before)
    assert len(optimizer.state) == 0


def test_zero_grad_to_none_and_to_zero_both_work():
    (p,) = leaves((3,))
    optimizer = make([p], weight_decay=0.0)
    give_gradients([p], 0)
    optimizer.zero_grad()
    assert p.grad is None
    optimizer.step()
    give_gradients([p], 0)
    optimizer.zero_grad(set_to_none=False)
    assert p.grad.eq(0).all()
    before = p.detach().clone()
    optimizer.step()
    assert_same_bits([p], [before])


def test_each_parameter_counts_its_own_steps():
    """A frozen parameter takes up where it was: its t does not run on, and it does not disturb the others."""
    together = leaves((3,), (4,))
    alone = copies(together)
    optimizer = make(together)
    each = [make([p]) for p in alone]
    for step in range(6):
        for params in (together, alone):
            give_gradients(params, step)
        if 2 <= step < 4:
            together[1].grad = alone[1].grad = None
        optimizer.step()
        for o in each:
            o.step()
    assert_same_bits(together, alone)
    assert optimizer.state[together[0]]["step"] == 6
    assert optimizer.state[together[1]]["step"] == 4


def test_frozen_thawed_and_added_layers():
    model, loss = regression()
    optimizer = make(model[0].parameters())
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    train(model, loss, optimizer, 2)
    assert torch.equal(model[0].weight, frozen)
    model[0].weight.requires_grad_(True)
    train(model, loss, optimizer, 2)
    assert not torch.equal(model[0].weight, frozen)
    head = model[2].weight.detach().clone()
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    train(model, loss, optimizer, 2)
    assert not torch.equal(model[2].weight, head)
    assert optimizer.state[model[2].weight]["step"] == 2
    assert optimizer.state[model[0].bias]["step"] == 6


def test_tied_parameters_are_updated_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(4, 4, bias=False)
            self.decoder = torch.nn.Linear(4, 4, bias=False)
            self.decoder.weight = self.encoder.weight

        def forward(self, x):
            return self.decoder(self.encoder(x).tanh())

    model = Tied()
    optimizer = make(model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 1
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert model.decoder.weight is model.encoder.weight
    assert optimizer.state[model.encoder.weight]["step"] == 3


def test_gradients_are_never_written_to():
    params = leaves(*MANY[:6], LARGE[0])
    for maximize in (False, True):
        optimizer = make(params, maximize=maximize)
        give_gradients(params, 0)
        grads = [p.grad for p in params]
        before = [g.clone() for g in grads]
        versions = [g._version for g in grads]
        optimizer.step()
        assert_same_bits(grads, before)
        assert [g._version for g in grads] == versions
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))


def test_autograd_notices_that_a_step_changed_the_parameters():
    (p,) = leaves((3,))
    optimizer = make([p])
    loss = (p * p).sum()
    give_gradients([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- nothing crosses tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "dtype", "threads"),
    [
        *((policy, dtype, 1) for policy in POLICIES for dtype in (torch.float32, torch.float64, torch.bfloat16)),
        ("random", torch.float32, 2),
    ],
)
def test_order_and_grouping_do_not_change_a_bit(policy, dtype, threads):
    together = leaves(*(MANY if threads == 1 else MANY[:5]), *LARGE, dtype=dtype)
    alone, backwards, grouped = (copies(together) for _ in range(3))
    optimizers = [
        [make(together, policy)],
        [make([p], policy) for p in alone],
        [make(backwards[::-1], policy)],
        [make([{"params": grouped[i::3]} for i in range(3)], policy)],
    ]
    torch.set_num_threads(threads)
    try:
        for step in range(3):
            for params in (together, alone, backwards, grouped):
                give_gradients(params, step)
            for optimizer in (o for os in optimizers for o in os):
                optimizer.step()
    finally:
        torch.set_num_threads(1)
    for params in (alone, backwards, grouped):
        assert_same_bits(params, together)
    for p, o in zip(together, optimizers[1], strict=True):
        values = optimizers[0][0].state[p]
        others = next(iter(o.state.values()))
        assert_same_bits(list(values.values()), list(others.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_optimizer_in_the_backward_pass_gives_the_same_bits_as_one_for_all(dtype):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 300), torch.nn.Tanh(), torch.nn.Linear(300, 150)).to(dtype)

    model, other = network(), network()
    optimizer = make(model.parameters(), lr=0.01)
    own = {p: make([p], lr=0.01) for p in other.parameters()}

    def hook(p):
        own[p].step()
        own[p].zero_grad()

    for p in other.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for step in range(4):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        other(x).square().mean().backward()
    assert_same_bits(list(other.parameters()), list(model.parameters()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_gradient_leaves_every_other_tensor_bit_identical(policy, bad):
    broken = leaves(*MANY, *LARGE)
    healthy = copies(broken)
    optimizers = make(broken, policy), make(healthy, policy)
    victims = (1, 7, len(MANY))
    for step in range(3):
        for params in (broken, healthy):
            give_gradients(params, step)
        if step == 1:
            for i in victims:
                broken[i].grad.view(-1)[-1] = bad
        for optimizer in optimizers:
            optimizer.step()
    others = [i for i in range(len(broken)) if i not in victims]
    assert_same_bits([broken[i] for i in others], [healthy[i] for i in others])
    for i in others:
        ours, theirs = optimizers[0].state[broken[i]], optimizers[1].state[healthy[i]]
        assert_same_bits(list(ours.values()), list(theirs.values()))
    assert not torch.equal(broken[1], healthy[1])


def test_groups_have_their_own_hyperparameters():
    p, q = leaves((4,), (4,))
    q.data.copy_(p.data)
    optimizer = make([{"params": [p]}, {"params": [q], "lr": 0.5, "weight_decay": 0.0, "betas": (0.5, 0.9)}], lr=0.1)
    alone = copies([p, q])
    each = [
        make([alone[0]], lr=0.1),
        make([alone[1]], lr=0.5, weight_decay=0.0, betas=(0.5, 0.9)),
    ]
    for step in range(3):
        give_gradients([p, q], step)
        give_gradients(alone, step)
        optimizer.step()
        for o in each:
            o.step()
    assert_same_bits([p, q], alone)
    assert not torch.equal(p, q)


def test_param_groups_with_almost_no_lr_do_not_move():
    p, q = leaves((4,), (2,))
    start = q.detach().clone()
    optimizer = make([{"params": [p], "lr": 1e-3}, {"params": [q]}], lr=1e-28)
    run(optimizer, [p, q], 20)
    torch.testing.assert_close(q.detach(), start)


def test_a_changed_lr_counts_from_the_next_step():
    (p,) = leaves((4,))
    (q,) = copies([p])
    one, two = make([p], lr=0.1, weight_decay=0.0), make([q], lr=torch.tensor(0.1), weight_decay=0.0)
    for step, lr in enumerate((0.1, 0.01, 0.0, 0.3)):
        one.param_groups[0]["lr"] = lr
        two.param_groups[0]["lr"].fill_(lr)
        give_gradients([p], step)
        give_gradients([q], step)
        before = p.detach().clone()
        one.step()
        two.step()
        assert torch.equal(p, before) == (lr == 0.0)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_changed_betas_count_from_the_next_step():
    (p,) = leaves((4,))
    (q,) = copies([p])
    one, two = make([p]), make([q])
    for step in range(4):
        two.param_groups[0]["betas"] = (0.9, 0.999) if step != 2 else (0.5, 0.99)
        give_gradients([p], step)
        give_gradients([q], step)
        one.step()
        two.step()
        assert torch.equal(p, q) == (step < 2)


# --- hooks ---------------------------------------------------------------------------------------------------------


def test_hooks_run_in_torchs_order():
    calls = []
    params = [torch.ones(2)]
    optimizer = make(params)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
    ]
    try:
        optimizer.step()
        assert calls == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(calls) == 4


def test_a_step_hook_may_change_the_gradients():
    (p,) = leaves((3,))
    (q,) = copies([p])
    optimizer, plain = make([p]), make([q])

    def flip(opt, args, kwargs):
        p.grad.neg_()

    optimizer.register_step_pre_hook(flip)
    give_gradients([p], 0)
    give_gradients([q], 0)
    q.grad.neg_()
    optimizer.step()
    plain.step()
    assert_same_bits([p], [q])


def test_clipping_between_backward_and_step_is_seen():
    model, loss = regression()
    optimizer = make(model.parameters())
    loss().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    squares = sum(optimizer.state[p]["exp_avg"].square().sum() for p in model.parameters())
    assert squares.sqrt().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_state_is_made_on_the_first_step_in_the_parameters_shape(policy):
    (p,) = leaves((6, 5))
    optimizer = make([p], policy)
    assert len(optimizer.state) == 0
    run(optimizer, [p], 1)
    state = optimizer.state[p]
    tensors = [key for key, value in state.items() if value.shape == p.shape]
    assert tensors == ["exp_avg", "exp_avg_sq", "hidden_0", "hidden_1", "hidden_2", "hidden_3"]
    assert {key for key in state if key not in tensors} == {"step", "cosine_fast", "cosine_slow", "log_pace", "age"}
    assert all(state[key].ndim == 0 for key in state if key not in tensors)
    assert state["step"] == 1


@pytest.mark.parametrize(("state_dtype", "limit"), [(None, 24), (torch.bfloat16, 14), (torch.float16, 14)])
def test_state_takes_no_more_bytes_per_parameter_than_promised(state_dtype, limit):
    (p,) = leaves((1000,))
    optimizer = make([p], state_dtype=state_dtype)
    run(optimizer, [p], 1)
    tensors = [v for v in optimizer.state[p].values() if v.shape == p.shape]
    others = [v for v in optimizer.state[p].values() if v.shape != p.shape]
    assert sum(v.untyped_storage().nbytes() for v in tensors) <= limit * 1000
    assert sum(v.untyped_storage().nbytes() for v in others) <= 64


def test_state_tensors_do_not_share_memory():
    (p,) = leaves((10,))
    optimizer = make([p])
    run(optimizer, [p], 1)
    pointers = [v.untyped_storage().data_ptr() for v in optimizer.state[p].values()]
    assert len(set(pointers)) == len(pointers)


def test_a_step_allocates_no_more_than_a_few_megabytes_at_a_time():
    """The memory allocated and not yet freed, followed over a step on a tensor of 16 MB."""
    (p,) = leaves((2000, 2000))
    optimizer = make([p])
    run(optimizer, [p], 1)
    assert 1e5 < peak_bytes_of_a_step(optimizer) < 12e6


@pytest.mark.parametrize("policy", POLICIES)
def test_two_equal_runs_are_bit_identical(policy):
    first, second = leaves(*MANY[:8], *LARGE), leaves(*MANY[:8], *LARGE)
    optimizers = make(first, policy), make(second, policy)
    run(optimizers[0], first, 3)
    run(optimizers[1], second, 3)
    assert_same_bits(first, second)
    assert_same_state(*optimizers)


def test_the_policy_given_is_not_changed_by_training_and_later_changes_to_it_do_not_matter():
    policy = POLICIES["random"]
    fingerprint = policy.fingerprint()
    (p,) = leaves((4,))
    optimizer = make([p], policy)
    run(optimizer, [p], 3)
    assert policy.fingerprint() == fingerprint
    assert all(w.grad is None for w in policy.parameters())


def test_sizes_around_the_limit_of_small_tensors_are_all_right(monkeypatch):
    shapes = [(n,) for n in (63, 64, 65, 127, 128, 129)]
    plain = leaves(*shapes)
    run(make(plain), plain, 3)
    for small in (64, 128):
        monkeypatch.setattr(eager, "SMALL", small)
        params = leaves(*shapes)
        run(make(params), params, 3)
        for a, b in zip(params, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_it_is_a_torch_optimizer():
    optimizer = LearnedOptimizer(leaves((3,)))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults["lr"] == 1e-3
    assert type(optimizer).step.hooked
