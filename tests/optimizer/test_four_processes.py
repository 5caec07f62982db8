"""Models in four processes against one: FSDP2, and experts that are cut along two dimensions of a mesh."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from helpers.processes import four_processes
from helpers.support import assert_same_bits, give_gradients, leaves, random_policy
from learned_optim import LearnedOptimizer, PolicyConfig, param_groups
from learned_optim.engine import sharding
from learned_optim.rule.types import TensorSums

ranks = pytest.fixture(scope="module")(four_processes)
BLOCK = 8
POLICY = PolicyConfig(orthogonal=0.7, orthogonal_damping=1.5, orthogonal_block=BLOCK)
TOKENS, STEPS = 11, 4
SUMS = len(TensorSums._fields)


class Transformer(nn.Module):
    """Packed projections, and a tensor of three rows, of which the fourth process has none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(TOKENS, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 40, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.gate = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(32, TOKENS)

    def forward(self, tokens):
        x = self.tokens(tokens) * self.gate.mean()
        for layer in self.layers:
            x = layer(x)
        return self.head(x).flatten(0, 1).clone()


def trained(rank):
    """Parameters after some steps, and what was sent: in four processes, or in one where the rank is ``None``."""
    model = Transformer().double()
    if rank is not None:
        for layer in (*model.layers, model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (4,)))
    optimizer = LearnedOptimizer(param_groups(model), policy=random_policy(POLICY), lr=0.01, backend="eager")
    with pytest.MonkeyPatch.context() as patch:
        sent = sizes_sent(patch)
        for step in range(STEPS):
            tokens = torch.randint(TOKENS, (8, 5), generator=torch.Generator().manual_seed(step))
            tokens = tokens if rank is None else tokens[2 * rank : 2 * rank + 2]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens.flip(1).flatten()).backward()
            optimizer.step()
    return {n: p if rank is None else p.full_tensor() for n, p in model.state_dict().items()}, sent


def sizes_sent(patch):
    sizes, add_up = [], sharding.Shards.add_up
    patch.setattr(sharding.Shards, "add_up", lambda self, x: (sizes.append(x.numel()), add_up(self, x)))
    return sizes


def test_fsdp2_in_four_processes_is_one_process(ranks):
    first, *others = ranks(trained)
    for name, value in trained(None)[0].items():
        torch.testing.assert_close(first[0][name], value, rtol=1e-9, atol=1e-10)
    for other in others:
        assert_same_bits(list(first[0].values()), list(other[0].values()))
        assert other[1] == first[1]
    # Of 96 rows, processes hold 24: queries, keys and values of 32 are cut at whole blocks of 8. Of 40 they hold 10, in
    # blocks of columns; 8 of 32 rows are whole blocks.
    assert len(first[1]) == STEPS * 2
    assert first[1][1] == 2 * 6 * 4 * BLOCK * BLOCK


EXPERTS = [(4, 32, 40), (4, 40, 32), (4, 30, 24)]


def of_experts(rank, dim):
    """Stacks cut along the experts and, by FSDP2, along a dimension; or in one process."""
    module = nn.ParameterList(leaves(*EXPERTS))
    if rank is not None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
        module = nn.ParameterList(
            nn.Parameter(distribute_tensor(p.detach(), mesh["experts"], [Shard(0)])) for p in module
        )
        if dim is not None:
            fully_shard(module, mesh=mesh["data"], shard_placement_fn=lambda p: Shard(dim))
    params, whole = list(module.parameters()), leaves(*EXPERTS)
    groups = [{"params": params, "stacked": 1}]
    optimizer = LearnedOptimizer(groups, policy=random_policy(POLICY), lr=0.05, backend="eager")
    with pytest.MonkeyPatch.context() as patch:
        sent = sizes_sent(patch)
        for step in range(STEPS):
            give_gradients(whole, step)
            for p, q in zip(params, whole, strict=True):
                p.grad = q.grad if rank is None else distribute_tensor(q.grad, p.device_mesh, p.placements)
            optimizer.step()
    return [p.detach() if rank is None else p.detach().full_tensor() for p in params], sent


WHOLE, GRAMS = [32 * 40, 40 * 32, 30 * 24], [4 * BLOCK**2, 4 * BLOCK**2, 3 * BLOCK**2]


@pytest.mark.parametrize(
    ("dim", "sent"), [(None, []), (1, GRAMS), (2, WHOLE), (0, WHOLE)], ids=["no", "rows", "columns", "experts"]
)
def test_experts_that_fsdp2_cuts_once_more_are_those_of_one_process(ranks, dim, sent):
    first, *others = ranks(of_experts, dim)
    torch.testing.assert_close(first[0], of_experts(None, dim)[0], rtol=2e-5, atol=2e-6)
    for other in others:
        assert_same_bits(first[0], other[0])
    matrices = [4 * sum(sent)] if sent else []
    assert first[1] == [SUMS * 4 * len(EXPERTS), *matrices] * STEPS


def late(rank, zeros):
    """Rows in four processes, or in one, whose gradient is zero for some steps, then in all processes but the last."""
    whole = leaves((8, 6), (5, 4))
    params = whole
    if rank is not None:
        mesh = init_device_mesh("cpu", (4,))
        params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
    optimizer = LearnedOptimizer(params, policy=random_policy(POLICY), lr=0.05, backend="eager")
    for step in range(zeros + 4):
        give_gradients(whole, step)
        if step <= zeros:
            whole[0].grad[: 6 if step == zeros else 8] = 0.0
        for p, q in zip(params, whole, strict=True):
            p.grad = q.grad if rank is None else distribute_tensor(q.grad, p.device_mesh, p.placements)
        optimizer.step()
    counts = [optimizer.state[p]["step"].item() for p in params]
    return [p.detach() if rank is None else p.detach().full_tensor() for p in params], counts


@pytest.mark.parametrize("zeros", [1, 3])
def test_steps_before_the_first_gradient_in_any_process_do_not_count_in_all(ranks, zeros):
    expected, counts = late(None, zeros)
    assert counts == [5.0, zeros + 4.0]  # the first counts, and four that have a gradient
    for params, found in ranks(late, zeros):
        torch.testing.assert_close(params, expected, rtol=2e-5, atol=2e-6)
        assert found == counts
