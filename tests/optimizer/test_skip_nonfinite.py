"""``skip_nonfinite=True``: a tensor whose gradient is not finite is left out, counted, and nothing else changes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from helpers.optimizer_checks import assert_same_compiled, through_a_file
from helpers.support import assert_same_bits, assert_same_state, copies, give_gradients, leaves, make, run
from learned_optim import LearnedOptimizer
from learned_optim.engine import gpu, gpu_kernels, step

BAD = [math.nan, math.inf, -math.inf]
#: Matrices, a vector, a scalar, one that is run in chunks, strides of its own.
SHAPES = [(4, 3), (64, 40), (5,), (), (40_000,), (6, 4, 3, 3), (3, 4)]
BACKENDS = ["eager", "compiled"]


def with_backend(params, backend, policy="orthogonal", **options):
    optimizer = make(params, policy, backend="eager" if backend == "gpu" else backend, **options)
    if backend == "gpu":  # what GPUs use
        optimizer._backend = gpu.GpuBackend(optimizer._backend.head)
    return optimizer


def spoil(p, value, seed=0):
    index = torch.randint(p.numel(), (1,), generator=torch.Generator().manual_seed(seed))
    flat = p.grad.reshape(-1).clone()
    flat[index] = value
    p.grad = flat.view(p.shape)


def state_of(optimizer, p):
    return [p.detach().clone(), *(v.clone() for k, v in optimizer.state[p].items() if k != "skipped")]


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        *((backend, {}) for backend in BACKENDS),
        *((backend, {"maximize": True, "policy": "random", "safeguard": True}) for backend in BACKENDS),
        ("gpu", {"policy": "random"}),
    ],
    ids=str,
)
def test_what_is_left_out_stays_to_the_bit_and_the_others_move_as_if_it_had_no_gradient(backend, options, monkeypatch):
    if backend == "gpu":
        pytest.importorskip("triton")
        monkeypatch.setattr(gpu_kernels, "BLOCK", 8192)  # takes the interpreter as long as a small one
    params = leaves(*SHAPES)
    params[6].data = params[6].data.t().contiguous().t()
    others = copies(params)
    optimizer, reference = (with_backend(ps, backend, skip_nonfinite=True, **options) for ps in (params, others))
    counts = [0] * len(params)
    for t in range(6):
        bad = [i for i in range(len(params)) if (i + t) % 3 == 0 and t > 0]
        give_gradients(params, t)
        give_gradients(others, t)
        for i in bad:
            spoil(params[i], BAD[(i + t) % 3], seed=t)
            others[i].grad = None
            counts[i] += 1
        before = {i: state_of(optimizer, params[i]) for i in bad}
        optimizer.step()
        reference.step()
        for i in bad:
            assert_same_bits(state_of(optimizer, params[i]), before[i])
        assert_same_bits(params, others)
        for p, q, count in zip(params, others, counts, strict=True):
            assert_same_bits(state_of(optimizer, p), state_of(reference, q))
            assert optimizer.state[p]["skipped"] == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bad_gradients_it_changes_no_bit(backend):
    params = leaves(*SHAPES)
    others = copies(params)
    run(with_backend(params, backend, skip_nonfinite=True), params, 4)
    run(with_backend(others, backend), others, 4)
    assert_same_bits(params, others)


def test_by_default_a_bad_gradient_is_seen_in_the_parameter_and_nothing_is_counted():
    params = leaves((4, 3), (5,))
    optimizer = make(params)
    give_gradients(params, 0)
    spoil(params[0], math.nan)
    optimizer.step()
    assert params[0].isnan().any()
    assert params[1].isfinite().all()
    assert "skipped" not in optimizer.state[params[0]]
    assert "skipped" not in optimizer.diagnostics()["0.0"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("value", BAD)
def test_in_every_dtype(dtype, value):
    p, q = (torch.randn(6, 5).to(dtype).requires_grad_() for _ in range(2))
    optimizer = make([p, q], skip_nonfinite=True)
    run(optimizer, [p, q], 2)
    give_gradients([p, q], 2)
    spoil(p, value)
    before = p.detach().clone(), q.detach().clone()
    optimizer.step()
    assert_same_bits([p], before[:1])
    assert not torch.equal(q, before[1])
    assert q.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_whose_first_gradient_is_bad_starts_with_the_next(backend):
    params = leaves((4, 3), (7,))
    others = copies(params)
    optimizer, fresh = (with_backend(ps, backend, skip_nonfinite=True) for ps in (params, others))
    give_gradients(params, 9)
    for p in params:
        spoil(p, math.nan)
    optimizer.step()
    assert_same_bits(params, others)
    run(optimizer, params, 2)
    run(fresh, others, 2)
    assert_same_bits(params, others)
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2]


def test_gradients_and_state_that_are_large_but_finite_are_not_left_out():
    (p,) = leaves((8,))
    optimizer = make([p], skip_nonfinite=True)
    for scale in (1e30, 3e38, 1e-30, 1.0):  # squares overflow
        p.grad = torch.full((8,), scale)
        optimizer.step()
    p.data[0] = math.nan  # what was NaN before is no matter of the gradient
    p.grad = torch.ones(8)
    optimizer.step()
    assert optimizer.state[p]["step"] == 5
    assert optimizer.state[p]["skipped"] == 0


def test_diagnostics_say_what_was_left_out_and_how_often():
    params = leaves((4, 3), (5,), (6,))
    optimizer = make(zip("abc", params, strict=True), lr=0.5, skip_nonfinite=True)
    for t in range(4):
        give_gradients(params, t)
        for p in params[: (0, 2, 1, 2)[t]]:
            spoil(p, math.nan)
        optimizer.step()
    figures = optimizer.diagnostics()
    assert {name: row["skipped"] for name, row in figures.items()} == {"a": 3, "b": 2, "c": 0}
    assert {name: row["step"] for name, row in figures.items()} == {"a": 1, "b": 2, "c": 4}
    assert {name: math.isnan(row["step_size"]) for name, row in figures.items()} == {"a": True, "b": True, "c": False}
    assert {row["lr"] for row in figures.values()} == {0.5}
    assert len({tuple(row) for row in figures.values()}) == 1
    give_gradients(params, 6)
    for p in params:
        spoil(p, math.inf)
    optimizer.step()
    assert [row["skipped"] for row in optimizer.diagnostics().values()] == [4, 3, 1]


def test_option_and_counts_survive_copies_and_files():
    params = leaves((4, 3), (5,))
    optimizer = make(params, skip_nonfinite=True)
    run(optimizer, params, 2)
    give_gradients(params, 3)
    spoil(params[0], math.nan)
    optimizer.step()
    loaded = make(copies(params), skip_nonfinite=True)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), loaded):
        assert_same_state(other, optimizer)
        theirs = other.param_groups[0]["params"]
        assert other.skip_nonfinite
        assert other.state[theirs[0]]["skipped"] == 1
        give_gradients(theirs, 4)
        spoil(theirs[0], math.nan)
        other.step()
        assert [other.state[p]["skipped"].item() for p in theirs] == [2, 0]


@pytest.mark.parametrize("options", [(True, False), (False, True)])
def test_states_with_and_without_the_option_can_be_exchanged(options):
    first, second = leaves((4, 3)), leaves((4, 3))
    one, other = (make(ps, skip_nonfinite=o) for ps, o in zip((first, second), options, strict=True))
    run(one, first, 2)
    other.load_state_dict(through_a_file(one.state_dict()))
    second[0].data.copy_(first[0].data)
    run(one, first, 2, start=2)
    run(other, second, 2, start=2)
    assert_same_bits(first, second)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_another_value_than_a_bool_is_refused(value):
    with pytest.raises(TypeError, match="Invalid skip_nonfinite"):
        LearnedOptimizer(leaves((3,)), skip_nonfinite=value)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loop_makes_the_same_steps():
    assert_same_compiled(lambda optimizer: torch.compile(optimizer.step), skip_nonfinite=True)


def test_gradients_are_looked_at_only_where_sums_are_not_finite(monkeypatch):
    looked_at = []
    monkeypatch.setattr(step, "is_finite", lambda p: looked_at.append(p.param_index) or False)
    params = leaves((4, 3), (5,), (6,))
    optimizer = make(params, skip_nonfinite=True)
    run(optimizer, params, 2)
    assert looked_at == []
    give_gradients(params, 2)
    spoil(params[1], math.inf)
    optimizer.step()
    assert looked_at == [(0, 1, 0)]
