"""The step as one graph: its bookkeeping, against a fake capture on the CPU that freezes what a real one freezes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from helpers.fake_capture import FakeCapture, is_recording, launched
from helpers.scripts import client_block
from helpers.support import (
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    copies,
    give_gradients,
    leaves,
    make,
    run,
    snapshot,
)
from learned_optim.engine import gpu, gpu_kernels, hyperparameters, step
from learned_optim.engine.gpu import GpuBackend
from learned_optim.engine.graph import MOVES, WARM_UP, StepGraph

SHAPES = [(), (0,), (3,), (12, 7), (8, 3, 3, 3), (40, 30), (40, 30)]
#: With and without matrices that are orthogonalised.
BOTH = ("random", "orthogonal")
STEPS = WARM_UP + 4


def graphed(params, policy="random", **options):
    """An optimizer whose step is captured here, and the fake that does it."""
    optimizer = make(params, policy, **options)
    fake = FakeCapture()
    optimizer._graph = StepGraph(fake, optimizer.capturable)
    return optimizer, fake


def keep_gradients(params, number):
    """New values where the gradients are, as ``zero_grad(set_to_none=False)`` leaves them."""
    held = [p.grad for p in params]
    give_gradients(params, number)
    for p, grad in zip(params, held, strict=True):
        if grad is not None:
            p.grad = grad.copy_(p.grad)


def no_change(number, optimizer, params):
    pass


def assert_graph_changes_nothing(policy="random", steps=STEPS, change=no_change, gradients=keep_gradients, **options):
    """The same training with a graph, and with every step as those before a capture; optimizer and fake of the first.

    Args:
        policy: name of the policy.
        steps: of each training.
        change: ``(step, optimizer, params)``, called before each step.
        gradients: ``(params, step)`` gives them.
        options: of the optimizer.
    """
    results = []
    for captured in (True, False):
        params = leaves(*SHAPES)
        optimizer, fake = graphed(params, policy, **options)
        for number in range(steps):
            gradients(params, number)
            change(number, optimizer, params)
            if not captured:
                optimizer._graph._seen = 0
            optimizer.step()
        results.append((optimizer, fake, params))
    (one, fake, params), (other, never, others) = results
    assert never.recorded == 0
    assert_same_bits(params, others)
    assert_same_state(one, other)
    assert one.diagnostics().keys() == other.diagnostics().keys()
    for name, figures in one.diagnostics().items():
        assert figures == pytest.approx(other.diagnostics()[name], nan_ok=True)
    return one, fake


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"safeguard": True}, {"state_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("policy", BOTH)
def test_replays_give_the_bits_of_steps_that_are_not_captured(policy, options):
    optimizer, fake = assert_graph_changes_nothing(policy, **options)
    assert (fake.recorded, fake.replayed) == (1, STEPS - WARM_UP)
    assert optimizer.backend == "eager; one CUDA graph"


def test_nothing_is_captured_while_a_tensor_has_had_no_gradient_but_zero():
    """Whether its step counts is for the host to say."""
    params = leaves(*SHAPES)
    optimizer, fake = graphed(params)
    for number in range(20):
        keep_gradients(params, number)
        if number < 10:
            params[3].grad.zero_()
        optimizer.step()
        assert bool(fake.recorded) == (number > 10)
    assert [float(optimizer.state[p]["step"]) for p in params] == [20.0, 20.0, 20.0, 11.0, 20.0, 20.0, 20.0]


@pytest.mark.parametrize("policy", BOTH)
def test_a_graph_agrees_with_plain_steps(policy):
    params, plain = leaves(*SHAPES), leaves(*SHAPES)
    optimizer, _ = graphed(params, policy, lr=0.01)
    for one, ps in ((optimizer, params), (make(plain, policy, lr=0.01), plain)):
        for number in range(STEPS):
            keep_gradients(ps, number)
            one.step()
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(float(optimizer.state[p]["step"]) == STEPS for p in params)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("policy", BOTH)
def test_launches_of_kernels_are_replayed(policy, moving, monkeypatch):
    """The step as it is captured on a GPU; gradients that move are found by the next capture."""
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "is_capturing", is_recording)
    made = gpu.kernels
    monkeypatch.setattr(gpu, "kernels", lambda kind: gpu_kernels.Kernels(*map(launched, made(kind))))
    results = []
    for captured in (True, False):
        params = leaves((), (0,), (12, 7), (4, 3, 3, 3), (600,))
        groups = [{"params": params[::2], "lr": 0.01}, {"params": params[1::2], "lr": 0.1, "weight_decay": 0.3}]
        optimizer, fake = graphed(groups, policy)
        optimizer._backend = GpuBackend(optimizer._backend.head)
        optimizer._graph = optimizer._graph if captured else StepGraph(fake, own=False)
        held = []  # so that new gradients lie elsewhere
        for number in range(STEPS):
            if moving and number in (WARM_UP + 1, WARM_UP + 3):
                held += [p.grad for p in params]
                give_gradients(params, number)
            else:
                keep_gradients(params, number)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + number)
            version = params[-1]._version
            optimizer.step()
            assert params[-1]._version > version  # or a backward pass would use what it has saved from before
        results.append((optimizer, fake, params))
    (one, fake, params), (other, _, others) = results
    assert (fake.recorded, fake.replayed) == (1 + 2 * moving, STEPS - WARM_UP)
    assert one.backend == "compiled; one CUDA graph"
    assert_same_bits(params, others)
    assert_same_state(one, other)


def test_a_schedule_reaches_replays():
    def schedule(number, optimizer, params):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.1 / (1 + number), 0.01 * number

    optimizer, fake = assert_graph_changes_nothing("orthogonal", change=schedule)
    assert fake.recorded == 1
    assert {figures["lr"] for figures in optimizer.diagnostics().values()} == {0.1 / STEPS}


def test_schedules_of_two_groups_that_meet_and_part_again():
    params, plain = leaves((4, 3), (5,)), leaves((4, 3), (5,))
    optimizer, fake = graphed([{"params": [p]} for p in params])
    reference = make([{"params": [p]} for p in plain])
    for number in range(STEPS + 3):
        for one, ps in ((optimizer, params), (reference, plain)):
            keep_gradients(ps, number)
            for i, group in enumerate(one.param_groups):
                group["lr"] = 0.0 if number == WARM_UP + 2 else 0.01 + 0.1 * i
            one.step()
    assert fake.recorded == 1
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- what moves -------------------------------------------------------------------------------------------------------


def test_gradients_that_move_now_and_then_are_captured_where_they_are():
    def gradients(params, number):
        (give_gradients if number == WARM_UP + 2 else keep_gradients)(params, number)

    optimizer, fake = assert_graph_changes_nothing(gradients=gradients, steps=WARM_UP + 6)
    assert (fake.recorded, fake.replayed) == (2, 6)
    assert optimizer.backend == "eager; one CUDA graph"


@pytest.mark.parametrize("options", [{}, {"maximize": True}], ids=str)
def test_gradients_that_move_in_every_step_are_copied(options):
    held = []

    def gradients(params, number):
        give_gradients(params, number)
        held.append([p.grad for p in params])  # so that no address comes again

    optimizer, fake = assert_graph_changes_nothing("orthogonal", gradients=gradients, steps=WARM_UP + 9, **options)
    assert (fake.recorded, fake.replayed) == (2 + MOVES, 9)
    assert optimizer.backend == "eager; one CUDA graph, gradients copied"


def test_other_parameters_are_captured_again_after_further_steps():
    late = leaves((4, 3), seed=1)

    def change(number, optimizer, params):
        if number == WARM_UP + 2:
            late[0] = leaves((4, 3), seed=1)[0]
            optimizer.add_param_group({"params": late[:1], "lr": 0.3})
        if number >= WARM_UP + 2:
            keep_gradients(late[:1], number)

    _, fake = assert_graph_changes_nothing(change=change, steps=2 * WARM_UP + 5)
    assert (fake.recorded, fake.replayed) == (2, 5)


def test_a_parameter_without_a_gradient_and_one_whose_data_are_replaced():
    def change(number, optimizer, params):
        if number == WARM_UP + 1:
            params[2].grad = None
        if number == 2 * WARM_UP + 4:
            params[3].data = params[3].data.clone()

    _, fake = assert_graph_changes_nothing("orthogonal", change=change, steps=4 * WARM_UP + 6)
    assert fake.recorded == 3  # before, with one that lags a step behind, with other memory


def test_a_gradient_of_another_dtype_or_other_strides():
    def gradients(params, number):
        keep_gradients(params, number) if number < WARM_UP + 2 else give_gradients(params, number)
        if number == WARM_UP + 2:
            params[3].grad = params[3].grad.t().contiguous().t()
        if number >= WARM_UP + 3:
            params[3].data, params[3].grad = params[3].data.bfloat16(), None
            params[3].grad = torch.full_like(params[3], 0.5 + number)

    assert_graph_changes_nothing(gradients=gradients, steps=2 * WARM_UP + 6)


def test_a_step_count_that_is_written_by_hand():
    def change(number, optimizer, params):
        if number == WARM_UP + 2:
            optimizer.state[params[3]]["step"].fill_(1.0)

    _, fake = assert_graph_changes_nothing("orthogonal", change=change, steps=2 * WARM_UP + 4)
    assert (fake.recorded, fake.replayed) == (2, 4)


def test_a_gradient_of_another_dtype_in_the_same_memory():
    results = []
    for captured in (True, False):
        (p,) = leaves((4,))
        optimizer, _ = graphed([p])
        data, memory = p.data, torch.full((8,), 0.5)
        for number in range(2 * WARM_UP + 4):
            later = number > WARM_UP + 1
            memory.view(torch.float64).fill_(0.25) if later else memory.fill_(0.5)
            p.data, p.grad = data.to(torch.float64 if later else torch.float32), None
            p.grad = memory.view(torch.float64) if later else memory[:4]
            p.data = data
            optimizer._graph._seen = optimizer._graph._seen if captured else 0
            optimizer.step()
        results.append(p)
    assert_same_bits(*[[p] for p in results])


# --- checkpoints and copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, WARM_UP, WARM_UP + 2])
def test_resumed_from_a_checkpoint_bit_by_bit(at):
    params = leaves(*SHAPES)
    optimizer, fake = graphed(params, "orthogonal")
    resumed = saved = None
    for number in range(STEPS + WARM_UP):
        if number == at:
            saved, resumed = copy.deepcopy(optimizer.state_dict()), copies(params)
        keep_gradients(params, number)
        optimizer.step()
    again, other = graphed(resumed, "orthogonal")
    again.load_state_dict(saved)
    for number in range(at, STEPS + WARM_UP):
        keep_gradients(resumed, number)
        again.step()
    assert fake.replayed > other.replayed > 0 or at == 1
    assert_same_bits(resumed, params)
    assert_same_state(again, optimizer)


def test_loading_into_an_optimizer_that_has_a_graph_captures_again():
    def change(number, optimizer, params):
        if number == WARM_UP + 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    _, fake = assert_graph_changes_nothing(change=change, steps=2 * WARM_UP + 3)
    assert (fake.recorded, fake.replayed) == (2, 3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_have_no_graph_and_go_on_alike(duplicate):
    params = leaves(*SHAPES)
    optimizer, fake = graphed(params)
    for number in range(STEPS):
        keep_gradients(params, number)
        optimizer.step()
    other = duplicate(optimizer)
    assert other._graph._captured is None
    others = [p for group in other.param_groups for p in group["params"]]
    fake_of_other = FakeCapture()
    other._graph = StepGraph(fake_of_other)
    for number in range(STEPS, STEPS + 2):
        for one, ps in ((optimizer, params), (other, others)):
            keep_gradients(ps, number)
            one.step()
    assert (fake.recorded, fake_of_other.recorded) == (1, 0)
    assert_same_bits(others, params)


# --- what cannot be captured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype", "why"),
    [
        ({"skip_nonfinite": True}, torch.float32, "skip_nonfinite looks at gradients"),
        ({"capturable": True}, torch.float32, "capturable=True leaves capturing to you"),
        ({}, torch.complex64, "complex parameters"),
    ],
)
def test_what_stands_in_the_way_is_said(options, dtype, why):
    params = [torch.ones(3, 2, dtype=dtype, requires_grad=True)]
    optimizer, fake = graphed(params, **options)
    for number in range(STEPS):
        keep_gradients(params, number)
        optimizer.step()
    assert fake.recorded == 0
    assert optimizer.backend == f"eager; no CUDA graph: {why}"
    assert "lr" in optimizer.diagnostics()["0.0"]


def test_a_capture_that_fails_is_said_once_and_the_step_is_made_without(monkeypatch):
    original = step._orthogonalize_and_move

    def with_a_wait(head, matrices):
        if float(matrices[0].d.sum()) != 0.0:
            yield from original(head, matrices)

    monkeypatch.setattr(step, "_orthogonalize_and_move", with_a_wait)
    params, plain = leaves(*SHAPES), leaves(*SHAPES)
    optimizer, fake = graphed(params, "orthogonal")
    reference = make(plain, "orthogonal")
    for number in range(WARM_UP + 3):
        for one, ps in ((optimizer, params), (reference, plain)):
            keep_gradients(ps, number)
            if one is optimizer and number == WARM_UP:
                with pytest.warns(RuntimeWarning, match="could not be captured as a CUDA graph.*not permitted"):
                    one.step()
            else:
                one.step()
    assert fake.replayed == 0
    assert "no CUDA graph: RuntimeError: operation not permitted" in optimizer.backend
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- a graph of the user's own ----------------------------------------------------------------------------------------


def capturable(params, monkeypatch, policy="random", **options):
    monkeypatch.setattr(hyperparameters, "_is_on_gpu", lambda value: True)
    return graphed(params, policy, capturable=True, **options)


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("policy", BOTH)
def test_a_training_step_that_the_user_captures(policy, safeguard, monkeypatch):
    """Step count, schedule, gradients and update: replayed without a line of Python."""
    params, plain = leaves(*SHAPES), leaves(*SHAPES)
    lr = torch.tensor(0.02)
    optimizer, _ = capturable(params, monkeypatch, policy, lr=lr, safeguard=safeguard)
    reference = make(plain, policy, lr=0.02, safeguard=safeguard)
    run(optimizer, params, 2)
    run(reference, plain, 2)

    def training_step():
        for p in params:
            p.grad = p.detach() * 0.5 + 0.1
        optimizer.step()
        lr.mul_(0.5)

    _, replay = FakeCapture().record(training_step, torch.device("cpu"))
    for _ in range(4):
        replay()
        for p in plain:
            p.grad = p.detach() * 0.5 + 0.1
        reference.step()
        reference.param_groups[0]["lr"] *= 0.5
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(float(optimizer.state[p]["step"]) == 6.0 for p in params)
    figures = optimizer.diagnostics()["2"] if "2" in optimizer.diagnostics() else optimizer.diagnostics()["0.2"]
    assert figures["step"] == 6.0
    assert figures["lr"] == pytest.approx(0.02 / 2**3)


def test_a_capturable_checkpoint_is_like_any_other(monkeypatch):
    params, plain = leaves(*SHAPES), leaves(*SHAPES)
    optimizer, _ = capturable(params, monkeypatch)
    reference = make(plain)
    run(optimizer, params, 2)
    run(reference, plain, 2)
    others = make(plain)
    others.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(others.state[p]["step"], reference.state[p]["step"]) for p in plain)
    optimizer.load_state_dict(reference.state_dict())
    run(optimizer, params, 1, start=2)
    assert all(float(optimizer.state[p]["step"]) == 3.0 for p in params)


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [({}, 2, "capturable=True"), ({"capturable": True}, 0, "before all parameters have state")],
)
def test_a_capture_that_could_not_be_replayed_is_refused_before_anything_changes(options, steps, message):
    params = leaves(*SHAPES)
    optimizer, fake = graphed(params, **options)
    run(optimizer, params, steps)
    before = snapshot(optimizer)
    give_gradients(params, 7)
    fake.user_captures = True
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("steps", [-3.0, float("nan")])
def test_a_step_count_that_cannot_be_is_refused_where_the_host_can_see_it(options, steps):
    params = leaves(*SHAPES)
    optimizer = make(params, **options)
    run(optimizer, params, 2)
    optimizer.state[params[1]]["step"].fill_(steps)
    give_gradients(params, 7)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"'0\.1' has counted {steps} steps, expected 0 or more"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_capturable_counts_steps_on_each_device_of_a_group(monkeypatch):
    # The meta device stands for a second GPU. A step refuses parameters there, since they hold no numbers.
    monkeypatch.setattr("learned_optim.engine.collect.check_param", lambda *_: None)
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "meta")]
    optimizer = make(params, capturable=True)
    for p in params:
        p.grad = torch.ones_like(p)
    collected = optimizer._collector.collect(optimizer.param_groups, optimizer.state)
    assert [p.context.step.device.type for p in collected] == ["cpu", "meta"]


def test_capturable_does_not_go_with_looking_at_gradients():
    with pytest.raises(ValueError, match="skip_nonfinite=True waits"):
        make(leaves((3,)), capturable=True, skip_nonfinite=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_page_shows_how_to_capture_a_training_step():
    space: dict = {}
    exec(compile(client_block("cuda"), "docs/gpu.md", "exec"), space)
    assert {float(state["step"]) for state in space["opt"].state.values()} == {13.0}
