"""Tensors that a parameter holds: they move as they would one by one, in every backend."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from helpers.support import POLICIES, assert_same_bits, assert_unchanged, give_gradients, leaves, make, snapshot
from learned_optim import LearnedOptimizer
from learned_optim.engine.kinds import TensorKind
from learned_optim.rule.layouts import ShapeContext

STEPS = 4

#: Shape of a parameter, its group's keys, and how the tensors it holds are cut from it, outputs first, and their role.
CASES = {
    "stack": ((3, 8, 6), {"stacked": 1}, lambda p: list(p)),
    "stack of stacks": ((2, 3, 4, 5), {"stacked": 2}, lambda p: list(p.flatten(0, 1))),
    "stack of one": ((1, 4, 5), {"stacked": 1}, lambda p: list(p)),
    "stack of vectors": ((3, 5), {"stacked": 1}, lambda p: list(p)),
    "stack of convolutions": ((2, 4, 3, 3, 2), {"stacked": 1}, lambda p: list(p)),
    "packed": ((24, 8), {"split": (8, 8, 8)}, lambda p: list(p.split(8))),
    "packed, by number": ((24, 8), {"split": 3}, lambda p: list(p.split(8))),
    "packed, of different sizes": ((16, 8), {"split": (8, 6, 2)}, lambda p: list(p.split((8, 6, 2)))),
    "packed, large": ((384, 128), {"split": 3}, lambda p: list(p.split(128))),
    "packed vectors": ((12,), {"split": 3}, lambda p: list(p.split(4))),
    "packed experts": ((2, 8, 6), {"stacked": 1, "split": 2}, lambda p: [m for e in p for m in e.split(4)]),
    "stored transposed": ((6, 4), {"transposed": True}, lambda p: [p.mT]),
    "square, stored transposed": ((128, 128), {"transposed": True}, lambda p: [p.mT]),
    "packed, stored transposed": ((8, 24), {"split": 3, "transposed": True}, lambda p: list(p.mT.split(8))),
    "large, stored transposed": ((80, 600), {"transposed": True}, lambda p: [p.mT]),
    "experts, stored transposed": ((2, 6, 8), {"stacked": 1, "transposed": True}, lambda p: list(p.mT)),
    "transposed convolution": ((5, 4, 3, 3), {"transposed": True, "role": "conv"}, lambda p: [p.transpose(0, 1)]),
    "bias of what is stored transposed": ((6,), {"transposed": True}, lambda p: [p]),
    "grouped convolution": ((8, 3, 5), {"split": 2, "role": "conv"}, lambda p: list(p.split(4))),
}
BACKENDS = ["eager", "compiled"]


def moved_together(shape, keys, steps=STEPS, **options):
    """The parameter, what it was at the start, and the optimizer."""
    (p,) = leaves(shape)
    start = p.detach().clone()
    optimizer = make([{"params": [p], **keys}], lr=0.05, **options)
    for step in range(steps):
        give_gradients([p], step)
        optimizer.step()
    return p, start, optimizer


def moved_one_by_one(shape, keys, start, cut, **options):
    """The tensors that the parameter holds, as parameters of their own, and their optimizer."""
    whole = start.clone().requires_grad_()
    params = [t.detach().clone().contiguous().requires_grad_() for t in cut(whole)]
    optimizer = make([{"params": params, "role": keys.get("role")}], lr=0.05, **options)
    for step in range(STEPS):
        give_gradients([whole], step)
        for q, g in zip(params, cut(whole.grad), strict=True):
            q.grad = g.clone().contiguous()
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", [{}, {"safeguard": True, "state_dtype": torch.bfloat16}], ids=["", "options"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("kernel_cache")
def test_tensors_of_a_parameter_move_as_they_would_one_by_one(name, backend, options):
    shape, keys, cut = CASES[name]
    options = {"policy": "orthogonal", "backend": backend, **options}
    p, start, together = moved_together(shape, keys, **options)
    params, apart = moved_one_by_one(shape, keys, start, cut, **options)
    exact = not keys.get("transposed")  # sums in another order, else
    for mine, q in zip(cut(p.detach()), params, strict=True):
        if exact:
            assert_same_bits([mine], [q])
        tolerance = 2e-2 if "state_dtype" in options and not exact else 2e-6
        torch.testing.assert_close(mine, q.detach(), rtol=tolerance, atol=tolerance)
    state = together.state[p]
    for key in ("step", "cosine_fast", "cosine_slow", "log_pace", "age"):
        expected = torch.stack([apart.state[q][key] for q in params])
        torch.testing.assert_close(state[key].view(-1), expected, rtol=1e-5, atol=1e-6)
        assert state[key].shape == (() if set(keys) <= {"transposed", "role"} else (len(params),))


def test_the_comparison_notices_tensors_that_are_taken_for_one():
    shape, _, cut = CASES["stack"]
    p, start, _ = moved_together(shape, {}, policy="orthogonal")
    params, _ = moved_one_by_one(shape, {}, start, cut, policy="orthogonal")
    assert not torch.allclose(p[0], params[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "role", "context", "orthogonal"),
    [
        ((64, 4), None, (0, 0), False),  # 16 rows per column: taken for an embedding
        ((64, 4), "matrix", (0, 0), True),
        ((8, 4), "embedding", (0, 0), False),
        ((8, 4), "head", (0, 0), False),
        ((8, 4), None, (0, 0), True),
        ((8, 1, 3), "vector", (1, 0), False),
        ((8, 4, 3), None, (0, 1), True),
        ((8, 4, 3), "matrix", (0, 0), True),
        ((8, 4), "conv", (0, 1), True),
        ((1, 9, 4), "matrix", (0, 0), False),  # one row
    ],
)
def test_a_role_goes_before_the_shape(shape, role, context, orthogonal):
    seen = ShapeContext.of(shape, role)
    assert (seen.is_vector, seen.is_convolution) == context
    settings = POLICIES["orthogonal"].config.orthogonalization
    assert (settings.matrix_shape(shape, role) is not None) == orthogonal


def test_groups_without_these_keys_have_the_bits_of_ever():
    p, _, _ = moved_together((6, 4, 3), {}, policy="orthogonal")
    q, _, _ = moved_together((6, 4, 3), {"stacked": 0, "split": None, "role": None}, policy="orthogonal")
    r, _, _ = moved_together((6, 4, 3), {"role": "conv"}, policy="orthogonal")
    assert_same_bits([q, r], [p, p])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("kernel_cache")
def test_a_run_resumed_from_a_file_ends_with_the_same_bits(backend):
    shape, keys, _ = CASES["packed experts"]
    p, _, optimizer = moved_together(shape, keys, policy="orthogonal", backend=backend)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    q = p.detach().clone().requires_grad_()
    resumed = make([{"params": [q], **keys}], lr=0.05, policy="orthogonal", backend=backend)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    other = copy.deepcopy(optimizer)
    for step in range(STEPS, STEPS + 3):
        for params, opt in (([p], optimizer), ([q], resumed), (other.param_groups[0]["params"], other)):
            give_gradients(params, step)
            opt.step()
    assert_same_bits([q, *other.param_groups[0]["params"]], [p, p])


def test_what_tensors_are_stays_when_a_state_is_loaded_and_must_fit_it():
    _, _, plain = moved_together((6, 4), {"role": "matrix"})
    (p,) = leaves((6, 4))
    optimizer = make([{"params": [p], "role": "embedding", "transposed": True}])
    optimizer.load_state_dict(plain.state_dict())
    assert (optimizer.param_groups[0]["role"], optimizer.param_groups[0]["transposed"]) == ("embedding", True)
    split = make([{"params": [p], "split": 2}])
    before = snapshot(split)
    with pytest.raises(ValueError, match=r"cosine_fast.*shape \(\).*\(2,\).*stacked and split"):
        split.load_state_dict(plain.state_dict())
    assert_unchanged(split, before)
    _, _, two = moved_together((6, 4), {"split": 2})
    with pytest.raises(ValueError, match=r"cosine_fast.*shape \(2,\).*one tensor"):
        optimizer.load_state_dict(two.state_dict())


@pytest.mark.parametrize(
    ("keys", "shape", "error", "match"),
    [
        ({"stacked": 2}, (3, 4), ValueError, r"stacked=2 needs 3 dimensions.*\(3, 4\)"),
        ({"split": (2, 3)}, (6, 4), ValueError, r"split=\(2, 3\) does not add up to the 6 outputs"),
        ({"split": 4}, (6, 4), ValueError, "split=4 does not add up to the 6"),
        ({"split": (6,), "transposed": True}, (6, 4), ValueError, r"split=\(6,\) does not add up to the 4"),
        ({"split": 2}, (), ValueError, r"split=2 needs 1 dimensions.*\(\) \(parameter '[01]\.0'; nothing was changed"),
        ({"split": 2}, (0, 4), ValueError, r"\(0, 4\) is empty"),
        ({"split": 0}, (6,), TypeError, "Invalid split: 0"),
        ({"split": (3, 3.0)}, (6,), TypeError, "Invalid split"),
        ({"split": ()}, (6,), TypeError, "Invalid split"),
        ({"split": "3"}, (6,), TypeError, "Invalid split"),
        ({"stacked": True}, (6, 4), TypeError, "Invalid stacked: True"),
        ({"stacked": -1}, (6, 4), TypeError, "Invalid stacked"),
        ({"role": "heads"}, (6, 4), ValueError, "Invalid role: 'heads'; choose one of"),
        ({"transposed": 2}, (6, 4), TypeError, "Invalid transposed"),
        ({"transposed": torch.ones(2)}, (6, 4), TypeError, "Invalid transposed"),
    ],
    ids=str,
)
def test_groups_that_cannot_be_are_refused_when_they_are_added_and_before_a_step(keys, shape, error, match):
    p, q = leaves(shape, (2, 2))
    with pytest.raises(error, match=match):
        make([{"params": [p], **keys}])
    optimizer = make([q])
    with pytest.raises(error, match=match):
        optimizer.add_param_group({"params": [p], **keys})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [p]})
    optimizer.param_groups[1].update(keys)
    give_gradients([p, q], 0)
    before = snapshot(optimizer)
    for look_or_move in (optimizer.summary, optimizer.step):
        with pytest.raises(error, match=match):
            look_or_move()
    assert_unchanged(optimizer, before)


def test_a_group_that_is_changed_between_steps_is_seen():
    p, _, optimizer = moved_together((8, 4), {})
    optimizer.param_groups[0]["split"] = 2
    give_gradients([p], 9)
    with pytest.raises(RuntimeError, match=r"cosine_fast has shape \(\).*expected shape \(2,\)"):
        optimizer.step()
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["step"].tolist() == [1.0, 1.0]
    optimizer.param_groups[0]["role"] = "embedding"
    before = p.detach().clone()
    optimizer.step()
    assert not torch.equal(p, before)


def test_one_tensor_of_a_parameter_with_a_bad_gradient_is_left_out_by_itself():
    (p,) = leaves((3, 4, 4))
    optimizer = make([("experts", p)], skip_nonfinite=True)
    optimizer.param_groups[0]["stacked"] = 1
    for step in range(3):
        give_gradients([p], step)
        if step == 1:
            p.grad[1, 0, 0] = float("nan")
        before = p.detach().clone()
        optimizer.step()
        assert [bool(torch.equal(a, b)) for a, b in zip(p, before, strict=True)] == [False, step == 1, False]
    assert optimizer.state[p]["step"].tolist() == [3.0, 2.0, 3.0]
    assert optimizer.state[p]["skipped"].tolist() == [0.0, 1.0, 0.0]
    assert {name: row["skipped"] for name, row in optimizer.diagnostics().items()} == {
        "experts[0]": 0.0, "experts[1]": 1.0, "experts[2]": 0.0,
    }  # fmt: skip


def test_a_tensor_does_not_see_its_neighbours_in_the_parameter():
    (p,) = leaves((2, 6, 5))
    q = p.detach().clone().requires_grad_()
    for params, factor in (([p], 1.0), ([q], 100.0)):
        optimizer = make([{"params": params, "stacked": 1}], policy="orthogonal")
        for step in range(3):
            give_gradients(params, step)
            params[0].grad[1] *= factor
            optimizer.step()
    assert_same_bits([q[0]], [p[0]])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.bfloat16])
def test_other_dtypes_hold_tensors_too(dtype):
    (p,) = leaves((2, 6, 4), dtype=dtype)
    parts = [t.detach().clone().requires_grad_() for e in p for t in e.split(3)]
    together = make([{"params": [p], "stacked": 1, "split": 2}], policy="orthogonal")
    apart = make(parts, policy="orthogonal")
    for step in range(3):
        give_gradients([p], step)
        for q, g in zip(parts, [t for e in p.grad for t in e.split(3)], strict=True):
            q.grad = g.clone()
        together.step()
        apart.step()
    for mine, q in zip([t for e in p.detach() for t in e.split(3)], parts, strict=True):
        torch.testing.assert_close(mine, q.detach())


def test_state_replaced_by_hand_is_seen():
    p, _, optimizer = moved_together((3, 4, 4), {"stacked": 1})
    optimizer.state[p]["log_pace"].data = torch.full((3,), 0.1)
    other = copy.deepcopy(optimizer)
    (q,) = other.param_groups[0]["params"]
    for params, opt in (([p], optimizer), ([q], other)):
        give_gradients(params, 7)
        opt.step()
    assert_same_bits([q, *other.state[q].values()], [p, *optimizer.state[p].values()])


def test_from_adamw_each_tensor_goes_on_from_the_parameters_step_count():
    (p,) = leaves((6, 4))
    adamw = torch.optim.AdamW([{"params": [p], "split": 2}])
    for step in range(3):
        give_gradients([p], step)
        adamw.step()
    optimizer = LearnedOptimizer.from_adamw(adamw)
    assert optimizer.state[p]["step"].tolist() == optimizer.state[p]["age"].tolist() == [3.0, 3.0]
    give_gradients([p], 3)
    optimizer.step()
    assert optimizer.state[p]["step"].tolist() == [4.0, 4.0]


def test_kinds_are_read_from_lists_too():
    assert TensorKind.of({"split": [2, 3]}) == TensorKind(split=(2, 3))
