"""What orthogonalising does to a matrix, by its singular values; and where it stays out of the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.support import POLICIES, assert_same_bits, copies, give_gradients, leaves, make
from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.rule.orthogonalize import POLAR_METHODS, as_blocks, from_blocks, orthogonalize


def with_factor(d, share, iterations, damping=0.0, block=0):
    config = PolicyConfig(
        orthogonal=share, orthogonal_iterations=iterations, orthogonal_damping=damping, orthogonal_block=block
    )
    (moved,), factor = orthogonalize(config.orthogonalization, d.unsqueeze(0), share)
    return moved, factor


def orthogonalized(*args):
    return with_factor(*args)[0]


sizes = st.tuples(st.integers(2, 12), st.integers(2, 12))
seeds = st.integers(0, 10_000)


def matrix(size, seed, spread=1.0):
    """With singular values between 1 and exp(-spread)."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(size, dtype=torch.float64, generator=rng)
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    return u @ torch.diag(torch.linspace(0.0, -spread, len(s), dtype=torch.float64).exp()) @ v


@given(sizes, seeds, st.floats(1e-12, 1e12))
def test_five_iterations_bring_all_singular_values_together_and_keep_the_length(size, seed, scale):
    d = matrix(size, seed, spread=2.0) * scale
    moved = orthogonalized(d, 1.0, 5)
    assert float(moved.norm()) == pytest.approx(float(d.norm()), rel=1e-9)
    values = torch.linalg.svdvals(moved)
    assert values.max() / values.min() < 2.0 < torch.linalg.svdvals(d).max() / torch.linalg.svdvals(d).min()


@given(sizes, seeds)
def test_its_singular_vectors_are_those_of_the_matrix(size, seed):
    d = matrix(size, seed)
    u, _, v = torch.linalg.svd(d, full_matrices=False)
    inside = u.T @ orthogonalized(d, 0.8, 3) @ v.T
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-9)


@given(sizes, seeds, st.sampled_from([0.3, 1.0]), st.integers(1, 5))
def test_rotations_and_transposition_go_through_it(size, seed, share, iterations):
    d = matrix(size, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=rng)).Q for n in size)
    moved = orthogonalized(d, share, iterations)
    torch.testing.assert_close(orthogonalized(left @ d @ right, share, iterations), left @ moved @ right)
    torch.testing.assert_close(orthogonalized(d.T, share, iterations), moved.T)


large = st.tuples(st.integers(8, 12), st.integers(8, 12))


@given(large, seeds, st.floats(0.0, 8.0), st.floats(1e-12, 1e12), st.sampled_from([0.5, 1.0]), st.floats(0.1, 4.0))
def test_a_matrix_moves_less_the_further_its_update_is_turned(size, seed, spread, scale, share, power):
    d = matrix(size, seed, spread) * scale
    o = orthogonalized(d, 1.0, 5)
    cosine = float((d * o).sum() / (d.norm() * o.norm()))
    moved, longer = orthogonalized(d, share, 5, power), orthogonalized(d, share, 5)
    torch.testing.assert_close(moved, longer * min(1.0, cosine / 0.7) ** (power * share), rtol=1e-9, atol=0)
    factor = with_factor(d, share, 5, power)[1]
    assert float(factor) == pytest.approx(float(moved.norm() / d.norm()))


def test_updates_of_few_directions_are_those_that_are_damped():
    """By their cosine, near 1/sqrt(n) for one direction out of n when noise is made as strong."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 64, dtype=torch.float64, generator=rng)
    one = torch.outer(noise[0], noise[1]) + 0.01 * noise
    alike = matrix((64, 64), 0, spread=0.0)
    of_one, of_noise, of_alike = (
        0.7 * float(orthogonalized(d, 1.0, 5, 1.0).norm() / d.norm()) for d in (one, noise, alike)
    )
    assert 0.12 < of_one < 0.2
    assert [of_noise, of_alike] == pytest.approx([0.7, 0.7])


def test_more_of_it_is_nearer_to_equal_singular_values():
    d = matrix((8, 20), 0, spread=3.0)

    def spread(share, iterations):
        values = torch.linalg.svdvals(orthogonalized(d, share, iterations))
        return float(values.max() / values.min())

    by_share = [spread(share, 3) for share in (0.0, 0.3, 0.6, 1.0)]
    by_iterations = [spread(1.0, iterations) for iterations in (1, 2, 3)]
    assert by_share == sorted(by_share, reverse=True)
    assert by_iterations == sorted(by_iterations, reverse=True)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 8), seeds)
def test_blocks_are_orthogonalised_each_by_itself(rows, columns, block, seed):
    """The share of each in the whole is that of its polar factor, whatever the sizes of the blocks in the update."""
    d = matrix((rows, columns), seed)
    d[0] *= 100.0
    moved = orthogonalized(d, 1.0, 5, 0.0, block)
    assert float(moved.norm()) == pytest.approx(float(d.norm()), rel=1e-9)
    lines, blocks = (moved.T, d.T) if rows > columns else (moved, d)
    size = len(lines) if block >= len(lines) else block  # below 8, every block but the last is as large as it may be
    for part, before in zip(lines.split(size), blocks.split(size), strict=True):
        alone = orthogonalized(before, 1.0, 5)
        torch.testing.assert_close(part / part.norm(), alone / alone.norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rows", "size"), [(64, 64), (65, 40), (128, 64), (129, 48), (374, 64), (256, 64)])
def test_blocks_of_a_multiple_of_eight_rows(rows, size):
    settings = PolicyConfig(orthogonal=1.0, orthogonal_block=64).orthogonalization
    d = torch.randn(2, rows, 400)
    for matrices, blocks in ((d, as_blocks(settings, d)), (d.mT, as_blocks(settings, d.mT))):
        assert blocks.shape == (2 * -(-rows // size), size, 400)
        assert_same_bits([from_blocks(blocks, matrices.shape)], [matrices])


def test_blocks_as_large_as_the_matrix_change_nothing():
    d = matrix((7, 9), 0)
    assert_same_bits([orthogonalized(d, 0.8, 3, 1.0, 7)], [orthogonalized(d, 0.8, 3, 1.0)])


def test_none_of_it_leaves_the_bits_and_zeros_stay_zeros():
    d = matrix((5, 7), 3).float()
    assert_same_bits([orthogonalized(d, 0.0, 3)], [d])
    for damping in (0.0, 0.5, 2.0):
        zeros = torch.zeros(4, 3, requires_grad=True)
        moved = orthogonalized(zeros, 1.0, 5, damping)
        moved.sum().backward()
        assert not moved.any()
        assert zeros.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((), None),
        ((5,), None),
        ((1, 5), None),
        ((5, 1), None),
        ((5, 2), (5, 2)),
        ((4, 3, 3, 3), (4, 27)),
        ((0, 3), None),
        ((47, 3), (47, 3)),
        ((48, 3), None),
        ((64, 2, 2, 2), (64, 8)),
        ((128, 2, 2, 2), None),
        ((2, 1000), (2, 1000)),
    ],
)
def test_what_counts_as_a_matrix(shape, size):
    assert PolicyConfig(orthogonal=1.0, orthogonal_aspect=16.0).orthogonalization.matrix_shape(shape) == size


def test_only_matrices_move_otherwise_than_without_and_as_far():
    """By one step from the same state: lengths are those of the rule without it, to rounding."""
    config = PolicyConfig(orthogonal=1.0)
    both = Policy(config), Policy(PolicyConfig())
    starts = leaves((6, 5), (5,), (1, 4), (3, 2, 2, 2), (), (40, 2))
    moved = []
    for policy in both:
        params = copies(starts)
        optimizer = make(params, policy, lr=0.1, weight_decay=0.0)
        give_gradients(params, 0)
        optimizer.step()
        moved.append([(p - start).detach() for p, start in zip(params, starts, strict=True)])
    for with_it, without, start in zip(*moved, starts, strict=True):
        torch.testing.assert_close(with_it.norm(), without.norm(), rtol=1e-5, atol=1e-7)
        same = torch.allclose(with_it, without, rtol=1e-5, atol=1e-7)
        assert same == (config.orthogonalization.matrix_shape(start.shape) is None)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_gradient_that_is_not_finite_hurts_its_own_matrix_only(backend):
    params, alone = leaves((6, 5), (4, 3), (7,)), leaves((6, 5), (4, 3), (7,))
    optimizers = [make(ps, "orthogonal", backend=backend) for ps in (params, alone[1:])]
    for step in range(2):
        give_gradients(params, step)
        for p, q in zip(params, alone, strict=True):
            q.grad = p.grad.clone()
        params[0].grad[2, 2] = torch.nan
        for optimizer in optimizers:
            optimizer.step()
    assert params[0].isnan().all()
    assert_same_bits(params[1:], alone[1:])


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("count", [3, 40])
def test_matrices_of_one_shape_are_multiplied_together_and_keep_the_bits_that_each_has_alone(
    backend, count, monkeypatch
):
    seen = []
    newton_schulz = POLAR_METHODS["newton_schulz"]
    monkeypatch.setitem(
        POLAR_METHODS, "newton_schulz", lambda x, *settings: seen.append(len(x)) or newton_schulz(x, *settings)
    )
    many, one = leaves(*[(24, 3, 5, 6)] * count), leaves(*[(24, 3, 5, 6)] * count)[-1:]
    optimizers = [make(ps, "orthogonal", backend=backend) for ps in (many, one)]
    for step in range(3):
        give_gradients(many, step)
        one[0].grad = many[-1].grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(many[-1:], one)
    if backend == "eager":  # compiled C++ has no use for batches
        assert max(seen) == count


def test_a_step_inside_autocast_is_the_same():
    results = []
    for enabled in (False, True):
        params = leaves((16, 12))
        optimizer = make(params, "orthogonal")
        give_gradients(params, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        results.append(params)
    assert_same_bits(*results)


def test_a_fault_in_the_iteration_is_seen(monkeypatch):
    newton_schulz = POLAR_METHODS["newton_schulz"]
    monkeypatch.setitem(
        POLAR_METHODS, "newton_schulz", lambda x, _, iterations: newton_schulz(x, (3.4445, -4.7750, 1.0), iterations)
    )
    with pytest.raises(AssertionError):
        test_five_iterations_bring_all_singular_values_together_and_keep_the_length.hypothesis.inner_test(
            (6, 6), 0, 1.0
        )


def test_the_policy_under_test_has_it():
    assert POLICIES["orthogonal"].config.orthogonal > 0.0


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("shape", [(6, 8), (64, 1024), (1024, 64), (4, 3, 3, 3)])
def test_coordinates_that_never_had_a_gradient_do_not_move(shape, backend):
    """A pruned weight whose gradient is masked stays pruned; large matrices take another way through the engine."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    param = leaves(shape)[0]
    before = param.detach().clone()
    optimizer = LearnedOptimizer([param], weight_decay=0.0, backend=backend)
    for step in range(3):
        give_gradients([param], step)
        param.grad.mul_(mask)
        optimizer.step()
    assert torch.equal(param[~mask], before[~mask])
    assert not (param == before)[mask].any()
