"""Parameters spread over two processes: the update is that of one process which holds them all."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from helpers.processes import two_processes
from helpers.support import assert_same_bits, give_gradients, leaves, make, random_policy
from learned_optim import PolicyConfig
from learned_optim.engine import collect, cut_matrices, sharding
from learned_optim.rule.types import TensorSums

pytestmark = pytest.mark.usefixtures("kernel_cache")  # before the processes are started, which inherit its folder
ranks = pytest.fixture(scope="module")(two_processes)

#: Even; uneven; one row, so that the second process has nothing; 1-d; larger than a chunk; convolution; long rows.
SHAPES = [(4, 3), (7, 5), (1, 6), (1,), (3,), (260, 300), (9, 3, 3, 3), (2, 512)]
STEPS = 4


def trained(params, gradients=lambda p, g: g, groups=1, **options):
    """The optimizer after some steps. All runs see the same gradients, cut as ``gradients`` says."""
    whole = leaves(*[p.shape for p in params])
    optimizer = make([{"params": params[i::groups], "lr": 0.05 * (i + 1)} for i in range(groups)], **options)
    for step in range(STEPS):
        give_gradients(whole, step)
        for p, q in zip(params, whole, strict=True):
            p.grad = gradients(p, q.grad)
        optimizer.step()
    return optimizer


def contents(params, optimizer):
    """Parameters and state tensors, gathered, and the 0-d state."""
    state = [optimizer.state[p] for p in params]
    tensors = [s[key] for s in state for key in ("exp_avg", "exp_avg_sq", "hidden_0", "hidden_3")]
    gathered = [t.detach().full_tensor() if isinstance(t, DTensor) else t.detach() for t in (*params, *tensors)]
    return gathered, [s[key] for s in state for key in ("step", "cosine_fast", "cosine_slow", "log_pace")]


def in_one_process(shapes=SHAPES, **options):
    params = leaves(*shapes)
    return contents(params, trained(params, **options))


def cut(p, g):
    return distribute_tensor(g, p.device_mesh, p.placements)


def in_two_processes(rank, placements, mesh_shape=(2,), shapes=SHAPES, plain=0, gradients=cut, **options):
    """As :func:`contents`, and how many all-reduces there were; the first ``plain`` parameters are ordinary ones."""
    mesh = init_device_mesh("cpu", mesh_shape)
    params = leaves(*shapes)
    params[plain:] = [nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in params[plain:]]
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = torch.distributed.all_reduce
        patch.setattr(torch.distributed, "all_reduce", lambda t, *a, **k: (calls.append(t.shape), original(t, *a, **k)))
        optimizer = trained(params, lambda p, g: gradients(p, g) if isinstance(p, DTensor) else g, **options)
    return *contents(params, optimizer), len(calls)


def with_keywords(rank, function, keywords):
    return function(rank, **keywords)


def assert_as_in_one_process(ranks, placements, all_reduces=STEPS, run=in_two_processes, where=None, **options):
    first, second = ranks(with_keywords, run, {"placements": placements, **(where or {}), **options})
    shapes = {"shapes": where["shapes"]} if where and "shapes" in where else {}
    for actual, expected in zip(first, in_one_process(**shapes, **options), strict=False):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)
    for mine, theirs in zip(first[:2], second[:2], strict=True):
        assert_same_bits(mine, theirs)  # what is not cut is the same in all processes
    assert (first[2], second[2]) == (all_reduces, all_reduces)


#: ``matrices``: of the shapes, whose updates are added up one by one.
@pytest.mark.parametrize(("policy", "matrices"), [("random", 0), ("orthogonal", 1)])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_shards_uneven_and_empty_ones_among_them_get_the_update_of_the_whole(ranks, backend, policy, matrices):
    assert_as_in_one_process(ranks, [Shard(0)], STEPS * (1 + matrices), backend=backend, policy=policy)


def test_one_all_reduce_serves_all_groups(ranks):
    assert_as_in_one_process(ranks, [Shard(0)], groups=3, maximize=True)


def test_state_of_two_bytes_is_sharded_too(ranks):
    first, second = ranks(with_keywords, in_two_processes, {"placements": [Shard(0)], "state_dtype": torch.bfloat16})
    assert_same_bits(first[0] + first[1], second[0] + second[1])
    expected = in_one_process(state_dtype=torch.bfloat16)[0][: len(SHAPES)]
    torch.testing.assert_close(
        first[0][: len(SHAPES)], expected, rtol=1e-3, atol=5e-3
    )  # a rounding may go the other way


@pytest.mark.parametrize(("policy", "matrices"), [("random", 0), ("orthogonal", 1)])
def test_tensors_cut_by_columns_and_ordinary_ones_beside_them(ranks, policy, matrices):
    shapes = [(7, 5), (3,), (4, 3), (200, 301), (6, 1), (4, 5, 3)]
    where = {"shapes": shapes, "plain": 2}
    assert_as_in_one_process(ranks, [Shard(1)], STEPS * (1 + matrices), where=where, policy=policy)


@pytest.mark.parametrize(
    ("mesh_shape", "placements", "all_reduces"),
    [
        ((2,), [Replicate()], 0),
        ((2, 1), [Replicate(), Shard(0)], 0),
        ((2, 1), [Shard(0), Replicate()], STEPS),
        ((1, 2), [Shard(0), Shard(0)], STEPS),
    ],
)
def test_only_dimensions_of_the_mesh_that_cut_are_added_up(ranks, mesh_shape, placements, all_reduces):
    assert_as_in_one_process(ranks, placements, all_reduces, where={"mesh_shape": mesh_shape})


def partial(p, g):
    return DTensor.from_local(g / 2, p.device_mesh, [Partial()])


def test_a_gradient_that_is_yet_to_be_added_up_is(ranks):
    assert_as_in_one_process(ranks, [Replicate()], 0, where={"gradients": partial})


def with_little_memory(rank, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("learned_optim.engine.step.COPIED", 300)
        return in_two_processes(rank, **options)


def test_buckets_that_are_made_a_second_time_do_the_same(ranks):
    assert_as_in_one_process(ranks, [Shard(0)], run=with_little_memory)


def missing_gradients(rank, policy):
    """One process has no gradient at all, then neither has, then both."""
    mesh = init_device_mesh("cpu", (2,))
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in leaves((4, 3), (3,))]
    optimizer = make(params, policy)
    for who in ((0,), (), (0, 1)):
        for p in params:
            p.grad = torch.ones_like(p) if rank in who else None
        optimizer.step()
    return [int(optimizer.state[p]["step"]) for p in params]


@pytest.mark.parametrize("policy", ["random", "orthogonal"])
def test_a_process_without_gradients_does_not_keep_the_others_waiting(ranks, policy):
    assert ranks(missing_gradients, policy) == [[2, 2], [1, 1]]


#: Shape, keys of its group, and how many of its matrices are cut: between two processes, unevenly.
HELD = [
    ((5, 4, 6), {"stacked": 1}, 0),  # 3 matrices and 2
    ((1, 4, 6), {"stacked": 1}, 0),  # the second process has nothing
    ((2, 6, 4), {"stacked": 1, "split": 2}, 0),
    ((9, 5), {"split": 3}, 1),  # rows 0 to 4, and the rest
    ((9,), {"split": 3}, 0),
    ((5, 12), {"split": 3, "transposed": True}, 3),
    ((7, 4, 3), {"transposed": True, "role": "conv"}, 1),
    ((64, 4), {"role": "matrix"}, 1),
    ((6, 5), {"role": "head"}, 0),
]


def with_groups(rank, backend, shard=0, skip_nonfinite=False):
    """Parameters of :data:`HELD` after some steps in two processes, or in one; per-tensor state; all-reduced sizes."""
    mesh = None if rank is None else init_device_mesh("cpu", (2,))
    whole = leaves(*[shape for shape, _, _ in HELD])
    params = [
        q if mesh is None else nn.Parameter(distribute_tensor(q.detach(), mesh, [Shard(min(shard, q.ndim - 1))]))
        for q in leaves(*[shape for shape, _, _ in HELD])
    ]
    groups = [{"params": [p], **keys} for p, (_, keys, _) in zip(params, HELD, strict=True)]
    optimizer = make(groups, "orthogonal", lr=0.05, backend=backend, skip_nonfinite=skip_nonfinite)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = torch.distributed.all_reduce
        patch.setattr(
            torch.distributed, "all_reduce", lambda t, *a, **k: (calls.append(t.numel()), original(t, *a, **k))
        )
        for step in range(STEPS):
            give_gradients(whole, step)
            if skip_nonfinite and step == 1:
                whole[0].grad[4, 0, 0] = whole[3].grad[4, 0] = float("nan")
            for p, q in zip(params, whole, strict=True):
                p.grad = q.grad if mesh is None else cut(p, q.grad)
            optimizer.step()
    gathered = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]
    numbers = [optimizer.state[p][key] for p in params for key in ("step", "cosine_fast", "log_pace", "age")]
    return gathered, numbers, calls


@pytest.mark.parametrize("options", [{}, {"shard": 1}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_shards_of_what_holds_several_tensors_get_the_update_of_the_whole(ranks, backend, options):
    first, second = ranks(with_keywords, with_groups, {"backend": backend, **options})
    for actual, expected in zip(first[:2], with_groups(None, backend, **options)[:2], strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)
    for mine, theirs in zip(first[:2], second[:2], strict=True):
        assert_same_bits(mine, theirs)


def test_matrices_that_lie_in_one_process_are_not_sent(ranks):
    first, _ = ranks(with_keywords, with_groups, {"backend": "eager"})
    tensors = 5 + 1 + 4 + 3 + 3 + 3 + 1 + 1 + 1
    sums = len(TensorSums._fields) * tensors
    # Of the matrices that are cut, as HELD counts them: one whose smaller side is, and Gram matrices of the others'.
    sent = [3 * 5, *[4 * 4] * 3, 4 * 4, 4 * 4]
    assert len(sent) == sum(count for _, _, count in HELD)
    assert first[2] == [sums, sum(sent)] * STEPS


#: Shapes, and how many coordinates of each are sent where blocks have up to 8 rows and pieces half of the rows.
BLOCKS = {
    (32, 48): 4 * 8 * 8,  # two blocks in each process
    (48, 20): 3 * 8 * 8,  # blocks of columns, of which each process has half the coordinates
    (30, 40): 30 * 40,  # 15 rows are no whole blocks
    (24, 3, 9): 24 * 27,  # nor are 12
    (12, 80): 12 * 80,  # nor are 6
    (27, 5, 3): 2 * 8 * 8,
    (31, 64): 4 * 8 * 8,  # 16 rows and 15: the last block ends in zeros
}


def with_blocks(rank, together=True):
    config = PolicyConfig(orthogonal=0.7, orthogonal_damping=1.5, orthogonal_block=8)
    policy = random_policy(config)
    if rank is None:
        return in_one_process(list(BLOCKS), policy=policy)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        add_up = sharding.Shards.add_up
        patch.setattr(sharding.Shards, "add_up", lambda self, x: (sizes.append(x.numel()), add_up(self, x)))
        if not together:
            patch.setattr(cut_matrices, "COPIED", 1)
        return *in_two_processes(rank, [Shard(0)], shapes=list(BLOCKS), policy=policy)[:2], sizes


@pytest.mark.parametrize("together", [True, False])
def test_where_processes_hold_whole_blocks_or_columns_of_all_only_gram_matrices_are_sent(ranks, together):
    first, second = ranks(with_blocks, together)
    for actual, expected in zip(first[:2], with_blocks(None), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)
    for mine, theirs in zip(first[:2], second[:2], strict=True):
        assert_same_bits(mine, theirs)
    sent = [sum(BLOCKS.values())] if together else BLOCKS.values()
    assert first[2] == [len(TensorSums._fields) * len(BLOCKS), *sent] * STEPS


def mixed_kinds(rank):
    (p,) = leaves((4, 3))
    mesh = init_device_mesh("cpu", (2,))
    q = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
    q.grad = torch.ones_like(q)
    optimizer = make([q])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in saved["state"][0].items()}
    with pytest.raises(ValueError, match=r"whole.*set_optimizer_state_dict"):
        optimizer.load_state_dict(saved)


def test_whole_state_is_not_loaded_into_shards(ranks):
    ranks(mixed_kinds)


#: Of each parameter, in which step an entry of its gradient is not finite: in one process's part, or the other's.
BAD_STEPS = {0: 1, 2: 1, 4: 2, 5: 0, 6: 3}


def left_out(rank, **options):
    """In two processes, or in one where the rank is ``None``; gradients are spoilt before they are cut."""
    mesh = None if rank is None else init_device_mesh("cpu", (2,))
    params = leaves(*SHAPES)
    if mesh is not None:
        params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
    whole = leaves(*SHAPES)
    optimizer = make(params, skip_nonfinite=True, lr=0.05, **options)
    for step in range(STEPS):
        give_gradients(whole, step)
        for i, (p, q) in enumerate(zip(params, whole, strict=True)):
            if BAD_STEPS.get(i) == step:
                q.grad.view(-1)[-1 if i % 4 == 0 else 0] = float("nan") if i % 2 else float("inf")
            p.grad = q.grad if mesh is None else cut(p, q.grad)
        optimizer.step()
    skipped = [optimizer.state[p]["skipped"] for p in params]
    return *contents(params, optimizer), skipped


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("policy", ["random", "orthogonal"])
def test_all_processes_leave_out_a_tensor_of_which_one_has_a_bad_gradient(ranks, backend, policy):
    options = {"backend": backend, "policy": policy}
    first, second = ranks(with_keywords, left_out, options)
    for mine, theirs in zip(first, second, strict=True):
        assert_same_bits(mine, theirs)
    for actual, expected in zip(first, left_out(None, **options), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)
    assert [int(s) for s in first[2]] == [int(i in BAD_STEPS) for i in range(len(SHAPES))]


def without_all_reduce(rank, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.Shards, "add_up", lambda self, sums: None)
        return in_two_processes(rank, **options)


def with_local_numel(rank, **options):
    original = collect.ParamState

    def faulty(*args):
        made = original(*args)
        made.shape = made.param.shape
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "ParamState", faulty)
        return in_two_processes(rank, **options)


def orthogonalized_by_shards(rank, **options):
    """Every process as if its part were all of the matrix."""
    add_up = sharding.Shards.add_up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding.Shards, "add_up", lambda self, x: add_up(self, x if x.dtype == torch.float64 else x.clone())
        )
        return in_two_processes(rank, **options)


def test_orthogonalizing_each_shard_alone_is_caught(ranks):
    with pytest.raises(AssertionError, match="not close"):
        assert_as_in_one_process(ranks, [Shard(0)], run=orthogonalized_by_shards, policy="orthogonal")


def with_the_gradient_of_another_shard(rank, **options):
    return in_two_processes(rank, **{**options, "gradients": lambda p, g: cut(p, g.flip(0))})


@pytest.mark.parametrize("fault", [without_all_reduce, with_local_numel, with_the_gradient_of_another_shard])
def test_a_fault_is_caught_by_the_comparison_with_one_process(ranks, fault):
    with pytest.raises(AssertionError, match="not close"):
        assert_as_in_one_process(ranks, [Shard(0)], run=fault)


def test_nothing_of_torch_distributed_is_imported_with_the_library():
    code = "import sys, learned_optim.engine.sharding; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
