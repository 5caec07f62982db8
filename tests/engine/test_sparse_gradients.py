"""Sparse gradients: the rows that have one move as a tensor of their own would, the others stay where they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.support import (
    assert_same_bits,
    assert_unchanged,
    leaves,
    make,
    peak_bytes_of_a_step,
    snapshot,
)

BACKENDS = ["eager", "compiled"]
COORDINATE = ("exp_avg", "exp_avg_sq", "hidden_0")


def give_rows(p, rows, step, scale=1.0):
    """A sparse gradient, the first of the rows in two parts that add up, as autograd gives it."""
    values = torch.randn(len(rows), p.shape[1], generator=torch.Generator().manual_seed(step)).to(p.dtype) * scale
    twice = torch.cat([values, 0.5 * values[:1]])
    p.grad = torch.sparse_coo_tensor([[*rows, rows[0]]], twice, p.shape, check_invariants=False)
    values[0] += 0.5 * values[0]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return values[order]


@pytest.mark.parametrize("options", [{}, {"safeguard": True, "state_dtype": torch.bfloat16}], ids=["", "options"])
@pytest.mark.parametrize("policy", ["base", "orthogonal"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("kernel_cache")
def test_rows_with_a_gradient_move_as_a_tensor_and_the_others_stay(policy, backend, options):
    """Exactly so where the policy's head sees nothing of the shape."""
    (p,) = leaves((50, 6))
    rows = [7, 3, 40]
    apart = p.detach()[sorted(rows)].clone().requires_grad_()
    start = p.detach().clone()
    options = {"policy": policy, "backend": backend, "lr": 0.05, **options}
    optimizer = make([p], **options)
    other = make([{"params": [apart], "role": "embedding"}], **options)
    for step in range(4):
        apart.grad = give_rows(p, rows, step)
        optimizer.step()
        other.step()
    rest = sorted(set(range(50)) - set(rows))
    assert_same_bits([p[rest]], [start[rest]])
    assert not any(optimizer.state[p][key][rest].any() for key in COORDINATE)
    assert not torch.equal(p[rows], start[rows])
    if policy == "base":
        assert_same_bits([p[sorted(rows)]], [apart])
        for key in COORDINATE:
            assert_same_bits([optimizer.state[p][key][sorted(rows)]], [other.state[apart][key]])
        for key in ("step", "cosine_fast", "log_pace", "age"):
            assert_same_bits([optimizer.state[p][key]], [other.state[apart][key]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("kernel_cache")
def test_where_every_row_has_one_it_is_the_dense_step(backend):
    p, q = leaves((5, 4)), leaves((5, 4))
    optimizers = [make([{"params": params, "role": "embedding"}], "orthogonal", backend=backend) for params in (p, q)]
    for step in range(3):
        q[0].grad = give_rows(p[0], [0, 1, 2, 3, 4], step)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(p, q)


def test_a_model_with_sparse_embeddings_learns_and_can_be_resumed():
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(40, 8, sparse=True), nn.Linear(8, 1))
        return model, make(model.parameters(), "orthogonal", lr=0.01)

    def train(model, optimizer, steps):
        losses = []
        for step in steps:
            words = torch.randint(20, (16,), generator=torch.Generator().manual_seed(step))
            loss = (model(words).squeeze(1) - words.float().sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer = made()
    losses = train(model, optimizer, range(60))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    resumed, other = made()
    start = resumed[0].weight.detach().clone()
    train(resumed, other, range(30))
    saved = other.state_dict()
    third, last = made()
    third.load_state_dict(resumed.state_dict())
    last.load_state_dict(saved)
    train(third, last, range(30, 60))
    assert_same_bits(list(third.parameters()), list(model.parameters()))
    assert_same_bits([model[0].weight[20:]], [start[20:]])


def test_a_step_allocates_for_the_rows_alone():
    (p,) = leaves((100_000, 8))
    optimizer = make([p])
    for step in range(3):
        give_rows(p, [5, 9], step)
        peak = peak_bytes_of_a_step(optimizer) if step else optimizer.step()
    assert peak < p.numel()  # bytes: a quarter of the parameter


def test_steps_count_diagnostics_and_skipping_go_on():
    (p,) = leaves((9, 4))
    optimizer = make([("words", p)], skip_nonfinite=True)
    give_rows(p, [1, 2], 0)
    optimizer.step()
    before = p.detach().clone()
    give_rows(p, [1, 2], 1, scale=float("nan"))
    optimizer.step()
    assert_same_bits([p], [before])
    assert optimizer.diagnostics()["words"]["skipped"] == 1.0
    p.grad = torch.sparse_coo_tensor(
        torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 4), p.shape, check_invariants=False
    )
    optimizer.step()
    assert_same_bits([p], [before])
    assert optimizer.state[p]["step"] == 2.0
    give_rows(p, [3], 2)
    optimizer.step()
    figures = optimizer.diagnostics()["words"]
    assert figures["step"] == 3.0
    assert figures["rms_parameter"] == pytest.approx(before[3].square().mean().sqrt().item(), rel=1e-5)


def test_maximize_goes_the_other_way():
    p, q = leaves((6, 3)), leaves((6, 3))
    give_rows(p[0], [2, 4], 0)
    q[0].grad = -p[0].grad
    make(p, weight_decay=0.0).step()
    make(q, weight_decay=0.0, maximize=True).step()
    assert_same_bits(p, q)


@pytest.mark.parametrize(
    ("shape", "keys", "gradient", "match"),
    [
        ((5, 3), {}, lambda p: torch.ones_like(p).to_sparse(), "layout torch.sparse_coo"),
        ((5,), {}, lambda p: torch.ones_like(p).to_sparse(), "layout torch.sparse_coo"),
        ((6, 3), {"split": 2}, lambda p: torch.ones_like(p).to_sparse(1), "nor stacked nor split"),
    ],
)
def test_other_sparse_gradients_are_refused_by_name_and_nothing_has_changed(shape, keys, gradient, match):
    p, q = leaves(shape, (4,))
    optimizer = make([{"params": [("words", p)], **keys}, {"params": [("rest", q)]}])
    p.grad, q.grad = gradient(p.detach()), torch.ones(4)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"'words'.*{match}.*sparse=False"):
        optimizer.step()
    assert_unchanged(optimizer, before)
