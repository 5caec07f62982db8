"""Embeddings of which a batch touches few rows, or that begin small: the bundled rule takes larger steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from helpers.rule_checks import assert_follows_reference
from learned_optim import LearnedOptimizer, Policy
from learned_optim.rule.context import ContextInputs, TensorStatistics, tensor_context
from learned_optim.rule.layouts import Segments, TensorShapes, Whole
from learned_optim.rule.types import TensorState, TensorSums

POLICY = Policy.from_pretrained("default")


def some_rows(shapes, steps, generator):
    """Gradients on every seventh row."""
    for _ in range(steps):
        grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for g in grads:
            g[torch.arange(len(g)) % 7 != 0] = 0.0
        yield grads


def test_the_transcription_says_the_same():
    shapes = [(3000, 1), (40, 3), (3000,), (1600, 2), (256, 16), (1100, 17)]
    assert_follows_reference(POLICY, shapes, Segments(shapes), steps=3, gradients=some_rows)


def feature(shape, grad, role=None, counted=None, name="log_rare_rows"):
    """A context number after one step with this gradient, of parameters like it.

    ``counted``: coordinates of the rows that have one.
    """
    layout = Whole(shape, role=role)
    x = grad.flatten()
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    sums = TensorSums(*(layout.inner(x, x) for _ in TensorSums._fields))._replace(abs_b=layout.total(x.abs()))
    shapes = TensorShapes.of([shape], roles=[role])
    shapes = shapes if counted is None else shapes.counting([counted])
    state = TensorState(zero, zero, zero, one)
    context = tensor_context(POLICY.config, ContextInputs.of(shapes, TensorStatistics.of(shapes, sums), state))
    return float(context[POLICY.config.context.index(name)])


def rare(rows, columns, share):
    grad = torch.zeros(rows, columns, dtype=torch.float64)
    grad[: round(rows * share)] = torch.randn(round(rows * share), columns, dtype=torch.float64)
    return grad


def test_what_it_is_large_for():
    assert feature((20_000, 8), rare(20_000, 8, 0.02)) == pytest.approx(math.log(20.0))
    assert feature((20_000, 8), rare(20_000, 8, 1.0)) < 0.3 * math.log(20.0)  # a decoder
    assert feature((1000, 8), rare(1000, 8, 0.02)) == 0.0
    assert feature((20_000, 2000), rare(20_000, 2000, 0.02)) == 0.0  # not tall
    assert feature((20_000,), rare(20_000, 1, 0.02)[:, 0]) == 0.0


def test_a_role_goes_before_the_shape():
    grad = rare(20_000, 8, 0.02)
    assert feature((20_000, 8), grad, "head") == feature((20_000, 8), grad, "matrix") == 0.0
    assert feature((4000, 2000), rare(4000, 2000, 0.02), "embedding") == pytest.approx(math.log(4.0))


def test_rows_of_a_sparse_gradient_count_as_part_of_the_whole():
    rows = torch.randn(3000, 4, dtype=torch.float64) ** 3
    whole = torch.cat([rows, torch.zeros(9000, 4, dtype=torch.float64)])
    assert feature((12_000, 4), rows, "embedding", rows.numel()) == pytest.approx(feature((12_000, 4), whole))


def test_rare_rows_of_a_large_embedding_move_further_than_without_it():
    moved = []
    column = POLICY.config.context.index("log_rare_rows")
    for weight in (0.0, float(POLICY.head[0, column].detach())):
        policy = Policy(dataclasses.replace(POLICY.config))
        policy.load_state_dict(POLICY.state_dict())
        with torch.no_grad():
            policy.head[0, column] = weight
        p = torch.nn.Parameter(torch.zeros(20_000, 8))
        opt = LearnedOptimizer([p], lr=1e-3, policy=policy)
        p.grad = rare(20_000, 8, 0.02).float()
        opt.step()
        moved.append(float(p.detach().square().mean().sqrt()))
    assert moved[1] > 4.0 * moved[0]


def test_small_embeddings_and_heads_are_told_from_the_rest():
    small = torch.full((400, 16), 0.05, dtype=torch.float64)

    def seen(x, role=None):
        return feature(x.shape, x, role, name="log_small_embedding")

    for x, role in ((small, None), (small[:9], "embedding"), (small[:9], "head")):
        assert seen(x, role) == pytest.approx(math.log(20.0))
    for x in (2.0 + small, small[:255], small[:, :15], small[:, 0]):
        assert seen(x) == 0.0
    assert seen(small, "matrix") == 0.0
    assert seen(0.0 * small) == 3.0


def test_of_two_reasons_for_larger_steps_the_stronger_one_counts():
    x = 0.02 * rare(20_000, 16, 0.01)
    both = [feature(x.shape, x, name=name) for name in ("log_rare_rows", "log_small_embedding")]
    assert sum(both) == pytest.approx(3.0)
    x = 100.0 * x
    assert feature(x.shape, x, name="log_small_embedding") == 0.0 < feature(x.shape, x)


def test_an_embedding_that_begins_small_moves_further():
    moved = []
    for size in (0.05, 1.0):
        p = torch.nn.Parameter(torch.full((400, 16), size))
        opt = LearnedOptimizer([p], lr=1e-3)
        p.grad = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
        opt.step()
        moved.append(float((p.detach() - size).square().mean().sqrt()))
    # exp(0.8 * 3), less what smaller numbers of any tensor take off (log_rms_p)
    assert 4.0 < moved[0] / moved[1] < 11.0
