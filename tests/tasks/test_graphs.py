"""Families on generated graphs."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.graphs import DEGREE, Graph, GraphLayer


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def few_links(nodes: int = 40, edges: int = 60) -> torch.Tensor:
    pairs = torch.randint(nodes, (edges, 2), generator=seeded(0))
    return pairs[pairs[:, 0] != pairs[:, 1]].sort(1).values.unique(dim=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_graph_is_what_its_lists_say(seed):
    graph = Graph(seeded(seed), 400, 5, 16)
    features, neighbours, present, labels, pairs = graph.made
    assert features.shape == (400, 16)
    assert bool(features.isfinite().all())
    assert torch.equal(neighbours[:, 0], torch.arange(400))
    assert bool(present[:, 0].all())
    assert int(labels.min()) >= 0
    assert int(labels.max()) < 5
    assert bool((pairs[:, 0] < pairs[:, 1]).all())
    edges = {tuple(pair) for pair in pairs.tolist()}
    listed = [(i, int(neighbours[i, k])) for i, k in present.nonzero().tolist() if k > 0]
    assert all((min(a, b), max(a, b)) in edges for a, b in listed)
    assert len(set(listed)) == len(listed)
    degree = torch.bincount(pairs.flatten(), minlength=400)
    assert torch.equal(present.sum(1) - 1, degree.clamp(max=DEGREE))


def test_the_layers_are_the_ones_of_the_papers():
    pairs, x = few_links(), torch.randn(40, 6, generator=seeded(1))
    neighbours, present = Graph(seeded(0), 40, 3, 6).listed(seeded(0), pairs)
    adjacency = torch.zeros(40, 40)
    adjacency[pairs[:, 0], pairs[:, 1]] = adjacency[pairs[:, 1], pairs[:, 0]] = 1.0
    assert int(adjacency.sum(1).max()) <= DEGREE

    gcn = GraphLayer("gcn", 6, 4)
    loops = adjacency + torch.eye(40)
    normal = loops.sum(1).rsqrt().diag() @ loops @ loops.sum(1).rsqrt().diag()
    torch.testing.assert_close(gcn(x, neighbours, present), normal @ gcn.lin(x))

    sage = GraphLayer("sage", 6, 4)
    mean = adjacency / adjacency.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(sage(x, neighbours, present), mean @ sage.lin(x) + sage.own(x))

    gat = GraphLayer("gat", 6, 4)
    h = gat.lin(x)
    mine, theirs = gat.score(h).unbind(1)
    scores = torch.nn.functional.leaky_relu(mine[:, None] + theirs[None, :], 0.2)
    attention = scores.masked_fill(loops == 0, -torch.inf).softmax(1)
    torch.testing.assert_close(gat(x, neighbours, present), attention @ h)


def test_every_batch_is_the_same_and_held_out_nodes_are_others():
    task = FAMILIES["graphs_full_batch"].task(0)
    first, *others = islice(task.batches(seeded(0)), 4)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    held_out = set(task._eval_source()[0].tolist())  # type: ignore[attr-defined]
    assert held_out
    assert not held_out & set(first[0].tolist())


def test_links_asked_for_carry_no_messages_and_are_not_held_out():
    task = FAMILIES["graph_links"].task(0)
    batches = list(islice(task.batches(seeded(0)), 20))
    asked = {tuple(pair) for pairs, linked in batches for pair in pairs[linked == 1].tolist()}
    pairs, linked = task._eval_source()  # type: ignore[attr-defined]
    held_out = {tuple(pair) for pair in pairs[linked == 1].tolist()}
    assert len(held_out) > 30
    assert len(asked) > 100
    assert not asked & held_out
    moved = next(cell.cell_contents for cell in task._loss_fn.__closure__ if isinstance(cell.cell_contents, dict))  # type: ignore[attr-defined]
    params, buffers = task.init(seeded(0))
    task.loss(params, buffers, batches[0])
    _, neighbours, present = moved[torch.device("cpu")]
    messages = {(i, int(neighbours[i, k])) for i, k in present.nonzero().tolist() if k > 0}
    assert messages
    assert not messages & (asked | held_out)
