"""torch's own ways to train in several processes, against one process; two processes, gloo."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh

from helpers.processes import two_processes
from helpers.support import assert_same_bits, assert_same_state, make
from learned_optim import LearnedOptimizer, param_groups

ranks = pytest.fixture(scope="module")(two_processes)
# Torch's warnings about torch's own code; ours would be errors.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:torch", "ignore::UserWarning:torch", "ignore::DeprecationWarning:torch"
)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def network():
    """Rows that two processes cannot halve, and tensors of one row, of which the second process gets none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 1))


def loss_of(model, step, rank=None):
    """Of a whole batch, or of a process's half of it."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator)
    part = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    y = model(x[part]).float()
    return nn.functional.mse_loss(y, x[part].sum(1, keepdim=True))


def train(model, optimizer, steps, rank=None):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()


def in_one_process(steps=6, **options):
    model = network()
    optimizer = make(model.parameters(), lr=0.01, **options)
    train(model, optimizer, range(steps))
    return {name: p.detach() for name, p in model.state_dict().items()}, optimizer


def sharded(mesh=None, **options):
    model = network()
    mesh = mesh or init_device_mesh("cpu", (2,))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def gathered(model):
    return {name: p.full_tensor() for name, p in model.state_dict().items()}


def assert_close(actual, expected, **tolerances):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **({"rtol": 2e-5, "atol": 2e-6} | tolerances))


def fsdp2(rank, options=None):
    model = sharded(**(options or {}))
    optimizer = make(model.named_parameters(), lr=0.01)
    train(model, optimizer, range(6), rank)
    return gathered(model), optimizer.diagnostics()


def test_fsdp2_is_one_process(ranks):
    (first, figures), (second, others) = ranks(fsdp2)
    expected, optimizer = in_one_process()
    assert_close(first, expected)
    assert_same_bits(list(first.values()), list(second.values()))
    assert figures == others  # of the whole tensors, on every process
    alone = optimizer.diagnostics()
    for (name, gathered_values), values in zip(figures.items(), alone.values(), strict=True):
        assert gathered_values == pytest.approx(values, rel=1e-3, abs=1e-4), name


def test_fsdp2_in_mixed_precision_follows_one_process(ranks):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    (first, _), _ = ranks(fsdp2, {"mp_policy": policy})
    assert_close(first, in_one_process()[0], rtol=0.05, atol=0.05)


def test_fsdp2_with_offloading_is_one_process(ranks):
    (first, _), _ = ranks(fsdp2, {"offload_policy": CPUOffloadPolicy(pin_memory=False)})
    assert_close(first, in_one_process()[0])


class Mixture(nn.Module):
    """Attention with packed projections, a stack of three experts, and tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2, bias=False, batch_first=True)  # keys' gets rounding only
        self.w_experts = nn.Parameter(torch.randn(3, 5, 6) * 0.3)
        self.out = nn.Linear(5, 7)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(torch.einsum("btd,eod->bto", x, self.w_experts)).flatten(0, 1).clone()


def trained_mixture(rank, steps, folder=None, full=False):
    """After some steps, and after as many more: in two processes, or in one where the rank is ``None``.

    With a folder the second half is done by new objects, from a checkpoint.
    """

    def made():
        model = Mixture().double()  # what is nearly flat is blown up by orthogonalising, rounding included
        if rank is not None:
            model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        groups = param_groups(model, overrides={"w_experts": {"role": "matrix", "stacked": 1}})
        return model, LearnedOptimizer(groups, lr=0.01, backend="eager")

    def go_on(steps):
        for step in steps:
            optimizer.zero_grad()
            tokens = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(step))
            tokens = tokens if rank is None else tokens[2 * rank : 2 * rank + 2]
            nn.functional.cross_entropy(model(tokens), tokens.flatten()).backward()
            optimizer.step()

    model, optimizer = made()
    go_on(range(steps))
    if folder is not None:
        options = FULL if full else StateDictOptions()
        saved = dict(zip(("model", "optim"), get_state_dict(model, optimizer, options=options), strict=True))
        if full and rank == 0:
            torch.save(saved, f"{folder}/full.pt")
        elif not full:
            dcp.save(saved, checkpoint_id=f"{folder}/sharded")
        dist.barrier()
        model, optimizer = made()
        if full:
            saved = torch.load(f"{folder}/full.pt")
        else:
            saved = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
            dcp.load(saved, checkpoint_id=f"{folder}/sharded")
        states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optim"]}
        set_state_dict(model, optimizer, options=options, **states)
    go_on(range(steps, 2 * steps))
    numbers = {n: optimizer.state[p]["age"].shape for n, p in model.named_parameters()}
    return {n: p.full_tensor() if rank is not None else p for n, p in model.state_dict().items()}, numbers


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_fsdp2_with_packed_and_stacked_matrices_is_one_process_and_resumes_bit_for_bit(ranks, full, tmp_path):
    (first, numbers), (second, _) = ranks(trained_mixture, 3)
    assert_same_bits(list(first.values()), list(second.values()))
    assert_close(first, trained_mixture(None, 3)[0])
    (resumed, _), _ = ranks(trained_mixture, 3, str(tmp_path), full)
    assert_same_bits(list(resumed.values()), list(first.values()))
    assert (numbers["w_experts"], numbers["attention.in_proj_weight"], numbers["out.weight"]) == ((3,), (3,), ())


def fsdp2_resumed(rank, folder, full):
    """Three steps, a checkpoint through torch.distributed.checkpoint, and three more in new objects."""
    model = sharded()
    optimizer = make(model.parameters(), lr=0.01)
    train(model, optimizer, range(3), rank)
    options = FULL if full else StateDictOptions()
    saved = dict(zip(("model", "optim"), get_state_dict(model, optimizer, options=options), strict=True))
    if full:
        if rank == 0:
            torch.save(saved, f"{folder}/full.pt")
        dist.barrier()
    else:
        dcp.save(saved, checkpoint_id=f"{folder}/sharded")
    train(model, optimizer, range(3, 6), rank)

    resumed = sharded()
    other = make(resumed.parameters(), lr=0.01)
    if full:
        saved = torch.load(f"{folder}/full.pt")
    else:
        saved = dict(zip(("model", "optim"), get_state_dict(resumed, other), strict=True))
        dcp.load(saved, checkpoint_id=f"{folder}/sharded")
    set_state_dict(resumed, other, model_state_dict=saved["model"], optim_state_dict=saved["optim"], options=options)
    train(resumed, other, range(3, 6), rank)
    return gathered(model), gathered(resumed)


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_a_checkpoint_of_fsdp2_is_resumed_bit_for_bit_and_also_by_one_process(ranks, full, tmp_path):
    (whole, resumed), _ = ranks(fsdp2_resumed, str(tmp_path), full)
    assert_same_bits(list(resumed.values()), list(whole.values()))

    model = network()
    optimizer = make(model.parameters(), lr=0.01)
    if full:
        saved = torch.load(tmp_path / "full.pt")
    else:
        saved = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.load(saved, checkpoint_id=tmp_path / "sharded")
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optim"])
    train(model, optimizer, range(3, 6))
    assert_close(dict(model.state_dict()), whole)


def resumed_in_shards(rank, folder):
    model = sharded()
    optimizer = make(model.parameters(), lr=0.01)
    saved = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optim"])
    train(model, optimizer, range(3, 6), rank)
    return gathered(model)


def test_a_checkpoint_of_one_process_goes_on_in_shards(ranks, tmp_path):
    model = network()
    optimizer = make(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    saved = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path)
    first, _ = ranks(resumed_in_shards, str(tmp_path))
    assert_close(first, in_one_process()[0])


def data_parallel(rank):
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = make(model.parameters(), lr=0.01)
    train(model, optimizer, range(6), rank)
    return dict(model.module.state_dict()), optimizer.diagnostics()


def test_ddp_is_one_process(ranks):
    (first, figures), (second, others) = ranks(data_parallel)
    assert_close(first, in_one_process()[0])
    assert_same_bits(list(first.values()), list(second.values()))
    assert figures == others


def zero_redundancy(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns about torch's own code

    model, plain = (nn.parallel.DistributedDataParallel(network()) for _ in range(2))
    policy = make(plain.parameters()).policy
    optimizer = ZeroRedundancyOptimizer(model.parameters(), LearnedOptimizer, policy=policy, backend="eager", lr=0.01)
    every = make(plain.parameters(), lr=0.01)
    train(model, optimizer, range(3), rank)
    train(plain, every, range(3), rank)
    optimizer.consolidate_state_dict(0)
    saved = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved, 0)
    resumed = nn.parallel.DistributedDataParallel(network())
    resumed.load_state_dict(model.state_dict())
    other = ZeroRedundancyOptimizer(resumed.parameters(), LearnedOptimizer, policy=policy, backend="eager", lr=0.01)
    other.load_state_dict(copy.deepcopy(saved[0]))  # it keeps what it is given
    for m, o in ((model, optimizer), (plain, every), (resumed, other)):
        train(m, o, range(3, 6), rank)
    assert_same_bits(list(model.parameters()), list(plain.parameters()))
    assert_same_bits(list(resumed.parameters()), list(plain.parameters()))


def test_with_the_zero_redundancy_optimizer_the_bits_are_those_of_ddp_also_after_a_resume(ranks):
    ranks(zero_redundancy)


def classic_fsdp(rank, original):
    def start():
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=original)
        return model, make(model.parameters(), lr=0.01)

    model, optimizer = start()
    train(model, optimizer, range(3), rank)
    saved = model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, optimizer)
    resumed, other = start()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(resumed, other, saved[1]))
    for m, o in ((model, optimizer), (resumed, other)):
        train(m, o, range(3, 6), rank)
    return [loss_of(m, 100).item() for m in (network(), model, resumed)]


def test_classic_fsdp_trains_and_resumes_though_its_statistics_are_those_of_shards(ranks):
    for start, whole, resumed in ranks(classic_fsdp, False):
        assert whole < start
        assert resumed == pytest.approx(whole, rel=1e-2)


def test_classic_fsdp_with_original_parameters_trains_and_can_be_saved(ranks):
    # Not resumed: on CPUs torch 2.13 gathers one tensor's state for all of them, AdamW's as well.
    for start, whole, _ in ranks(classic_fsdp, True):
        assert whole < start


def test_in_one_process_a_state_goes_through_torchs_functions_unchanged():
    model, other = network(), network()
    optimizer, resumed = make(model.parameters(), lr=0.01), make(other.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    states = get_state_dict(model, optimizer, options=FULL)
    set_state_dict(other, resumed, model_state_dict=states[0], optim_state_dict=states[1])
    assert_same_state(resumed, optimizer)
