"""The task protocol, the adapter for modules, and the check for users' tasks."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

from learned_optim.tasks import ModuleTask, Task, TaskFamily, check_task, map_batch, to_device


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(rng: torch.Generator, *shape: int):
    while True:
        yield torch.randn(*shape, generator=rng)


class Line:
    """What a user writes: a task without a base class."""

    name, length = "line", 50

    def init(self, rng):
        return {"w": torch.randn(3, generator=rng), "b": torch.zeros(())}, {}

    def batches(self, rng):
        while True:
            x = torch.randn(16, 3, generator=rng)
            yield x, x.sum(1) + 1

    def loss(self, params, buffers, batch):
        x, y = batch
        return (x @ params["w"] + params["b"] - y).square().mean()


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, tokens):
        return self.output(self.embed(tokens))


class Last(nn.Module):
    """The output of a recurrent layer without its state."""

    def forward(self, pair):
        return pair[0]


class Counter(nn.Module):
    """Replaces a buffer instead of updating it in place."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        self.calls = self.calls + 1
        return x * self.weight


def square(module, batch):
    return module(batch).square().mean()


def token_loss(module, tokens):
    return nn.functional.cross_entropy(module(tokens), tokens.roll(1))


def net_task(**options) -> ModuleTask:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))

    return ModuleTask(make, lambda rng: random_rows(rng, 8, 3), square, **options)


def test_a_plain_object_is_a_task_and_passes_the_check():
    assert isinstance(Line(), Task)
    check_task(Line())


def test_a_module_task_is_a_task_and_passes_the_check():
    task = net_task(name="net", length=7, eval_batch=torch.ones(4, 3))
    assert isinstance(task, Task)
    assert (task.name, task.length) == ("net", 7)
    check_task(task)


def test_loss_equals_the_module_own_loss_and_gradients():
    task = net_task()
    params, buffers = task.init(seeded())
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
    module.load_state_dict({**params, **buffers})
    batch = next(task.batches(seeded()))
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    loss = task.loss(leaves, buffers, batch)
    loss.backward()
    expected = square(module, batch)
    expected.backward()
    assert torch.equal(loss, expected)
    for name, p in module.named_parameters():
        torch.testing.assert_close(leaves[name].grad, p.grad)
    for name, b in module.named_buffers():
        torch.testing.assert_close(buffers[name], b)


def test_init_is_determined_by_the_generator_and_leaves_the_global_state_alone():
    task = net_task()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = task.init(seeded(3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, _ = task.init(seeded(3))
    other, _ = task.init(seeded(4))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_initial_tensors_are_fresh_even_if_the_module_is_not():
    module = nn.Linear(3, 1)
    task = ModuleTask(lambda: module, lambda rng: random_rows(rng, 8, 3), square)
    params, _ = task.init(seeded())
    before = module.weight.detach().clone()
    params["weight"].zero_()
    assert torch.equal(module.weight, before)


def test_the_module_keeps_its_own_tensors_after_a_loss_and_after_an_error():
    module = nn.Linear(3, 1)
    own = module.weight

    def fails(module, batch):
        raise RuntimeError("inside")

    good = ModuleTask(lambda: module, lambda rng: random_rows(rng, 8, 3), square)
    bad = ModuleTask(lambda: module, lambda rng: random_rows(rng, 8, 3), fails)
    for task in (good, bad):
        params, buffers = task.init(seeded())
        if task is bad:
            with pytest.raises(RuntimeError, match="inside"):
                task.loss(params, buffers, torch.ones(2, 3))
        else:
            task.loss(params, buffers, torch.ones(2, 3))
        assert module.weight is own


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 1), lambda: nn.Sequential(nn.LSTM(3, 2), Last())])
def test_a_loss_keeps_no_graph_alive(make):
    task = ModuleTask(make, lambda rng: random_rows(rng, 8, 3), square)
    start, buffers = task.init(seeded())
    values = []
    for scale in (1.0, 2.0, 1.0):
        params = {k: scale * p.requires_grad_() for k, p in start.items()}
        values.append(float(task.loss(params, buffers, torch.ones(4, 3)).detach()))
    assert values[0] == values[2] != values[1]
    last = [weakref.ref(p) for p in params.values()]
    del params
    gc.collect()
    assert not any(ref() is not None for ref in last)
    copy.deepcopy(task)


def test_tied_weights_appear_once_and_get_the_summed_gradient():
    task = ModuleTask(TiedNet, lambda rng: itertools.repeat(torch.arange(7)), token_loss)
    params, buffers = task.init(seeded())
    assert list(params) == ["embed.weight"]
    leaf = {"embed.weight": params["embed.weight"].clone().requires_grad_()}
    task.loss(leaf, buffers, torch.arange(7)).backward()

    untied = TiedNet()
    separate = {k: params["embed.weight"].clone().requires_grad_() for k in ("embed.weight", "output.weight")}

    def apart(tokens):
        return functional_call(untied, separate, (tokens,), tie_weights=False)

    token_loss(apart, torch.arange(7)).backward()
    summed = sum(p.grad for p in separate.values() if p.grad is not None)
    torch.testing.assert_close(leaf["embed.weight"].grad, summed)


def test_batchnorm_buffers_move_in_training_and_not_in_evaluation():
    task = net_task(eval_batch=torch.ones(4, 3))
    params, buffers = task.init(seeded())
    start = {k: b.clone() for k, b in buffers.items()}
    assert task.eval_loss is not None
    task.eval_loss(params, buffers)
    assert all(torch.equal(buffers[k], start[k]) for k in start)
    task.loss(params, buffers, next(task.batches(seeded())))
    assert int(buffers["1.num_batches_tracked"]) == 1
    assert not torch.equal(buffers["1.running_mean"], start["1.running_mean"])


def test_layers_made_in_evaluation_mode_stay_in_it():
    def make() -> nn.Module:
        module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5))
        module[1].eval()
        return module

    task = ModuleTask(make, lambda rng: random_rows(rng, 8, 3), square, eval_batch=torch.ones(4, 3))
    params, buffers = task.init(seeded())
    for _ in range(2):
        task.loss(params, buffers, torch.ones(4, 3))
        assert task.eval_loss is not None
        task.eval_loss(params, buffers)
    assert int(buffers["1.num_batches_tracked"]) == 0
    assert int(buffers["2.num_batches_tracked"]) == 2


def test_two_trajectories_do_not_share_buffers():
    task = net_task()
    params, first = task.init(seeded())
    _, second = task.init(seeded())
    task.loss(params, first, torch.ones(4, 3))
    assert int(second["1.num_batches_tracked"]) == 0


def test_a_replaced_buffer_comes_back_to_the_caller():
    task = ModuleTask(Counter, lambda rng: random_rows(rng, 4, 2), square)
    params, buffers = task.init(seeded())
    for _ in range(3):
        task.loss(params, buffers, torch.ones(4, 2))
    assert float(buffers["calls"]) == 3


def test_frozen_parameters_are_buffers():
    def make() -> nn.Module:
        module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        module[0].requires_grad_(False)
        return module

    params, buffers = ModuleTask(make, lambda rng: random_rows(rng, 8, 3), square).init(seeded())
    assert sorted(params) == ["1.bias", "1.weight"]
    assert sorted(buffers) == ["0.bias", "0.weight"]


def test_loss_can_be_differentiated_twice():
    task = net_task()
    params, buffers = task.init(seeded())
    leaves = {k: p.requires_grad_() for k, p in params.items()}
    loss = task.loss(leaves, buffers, torch.randn(8, 3, generator=seeded()))
    grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    torch.stack([g.square().sum() for g in grads]).sum().backward()
    assert leaves["0.weight"].grad is not None


def test_without_a_held_out_batch_there_is_no_eval_loss():
    assert net_task().eval_loss is None


def test_the_held_out_batch_is_made_at_first_use_only():
    calls = []

    def held_out():
        calls.append(1)
        return torch.ones(2, 3)

    task = net_task(eval_batch=held_out)
    params, buffers = task.init(seeded())
    assert task.eval_loss is not None
    assert not calls
    task.eval_loss(params, buffers)
    task.eval_loss(params, buffers)
    assert len(calls) == 1


def test_loss_before_init_works():
    params, buffers = net_task().init(seeded())
    assert net_task().loss(params, buffers, torch.ones(4, 3)).dim() == 0


def test_module_task_refuses_what_it_cannot_train():
    with pytest.raises(ValueError, match="length"):
        net_task(length=0)
    lazy = ModuleTask(lambda: nn.LazyLinear(1), lambda rng: random_rows(rng, 8, 3), square, name="lazy")
    with pytest.raises(TypeError, match=r"'lazy'.*lazy layers"):
        lazy.init(seeded())


def test_a_family_gives_the_same_task_for_the_same_seed():
    def sample(rng):
        width = int(torch.randint(2, 50, (), generator=rng))
        return ModuleTask(lambda: nn.Linear(width, 1), lambda r: random_rows(r, 4, width), square)

    family = TaskFamily("wide", "linear maps", "train", sample)
    widths = [family.task(seed).init(seeded())[0]["weight"].shape[1] for seed in range(8)]
    assert widths == [family.task(seed).init(seeded())[0]["weight"].shape[1] for seed in range(8)]
    assert len(set(widths)) > 3
    other = TaskFamily("other", "linear maps", "train", sample)
    assert widths != [other.task(seed).init(seeded())[0]["weight"].shape[1] for seed in range(8)]
    assert family.task(5).name == "wide/5"


def broken(**members):
    return type("Broken", (Line,), {"name": "mine", **members})()


@pytest.mark.parametrize(
    ("members", "error", "words"),
    [
        ({"loss": lambda self, p, b, batch: p["w"]}, TypeError, r"scalar tensor, got shape \(3,\)"),
        ({"loss": lambda self, p, b, batch: 1.0}, TypeError, "scalar tensor, got float"),
        ({"loss": lambda self, p, b, batch: p["w"].sum() * float("nan")}, ValueError, "nan"),
        ({"loss": lambda self, p, b, batch: p["w"].sum() / 0}, ValueError, "inf"),
        ({"loss": lambda self, p, b, batch: batch[0].mean()}, ValueError, "ignores the parameters"),
        ({"loss": lambda self, p, b, batch: p["w"].sum() * torch.rand(())}, ValueError, "global random state"),
        ({"loss": lambda self, p, b, batch: (0 * p["w"]).sum().sqrt()}, ValueError, "gradient is NaN or infinite"),
        ({"init": lambda self, rng: {"w": torch.ones(3)}}, TypeError, r"two dicts \(params, buffers\)"),
        ({"init": lambda self, rng: ({"w": [1.0]}, {})}, TypeError, "must be a tensor, got list"),
        ({"init": lambda self, rng: ({}, {})}, ValueError, "no parameters"),
        ({"init": lambda self, rng: ({"w": torch.ones(3, dtype=torch.long)}, {})}, TypeError, "floating point"),
        ({"init": lambda self, rng: ({"w": torch.full((3,), torch.inf)}, {})}, ValueError, "infinity"),
        ({"init": lambda self, rng: ({"w": torch.rand(3)}, {})}, ValueError, "rng alone"),
        ({"batches": lambda self, rng: iter(())}, ValueError, "yielded none"),
        ({"length": 0}, ValueError, "length"),
        ({"eval_loss": lambda self, p, b: p["w"]}, TypeError, "eval_loss must return a scalar"),
    ],
)
def test_check_task_names_the_task_and_the_mistake(members, error, words):
    with pytest.raises(error, match=words) as raised:
        check_task(broken(**members))
    assert "'mine'" in str(raised.value)


def test_check_task_says_which_member_is_missing():
    with pytest.raises(TypeError, match="lacks batches"):
        check_task(type("Partial", (), {"name": "p", "length": 1, "init": 0, "loss": 0})())


def test_check_task_changes_nothing():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_task(net_task())
    assert torch.equal(before, torch.get_rng_state())


def test_map_batch_keeps_the_structure():
    batch = {"x": (torch.ones(2), [torch.zeros(1), "note"]), "n": 3}
    doubled = map_batch(lambda t: 2 * t, batch)
    assert torch.equal(doubled["x"][0], torch.full((2,), 2.0))
    assert doubled["x"][1][1] == "note"
    assert doubled["n"] == 3
    assert to_device(batch, "meta")["x"][0].device.type == "meta"


def test_families_of_the_zoo_can_be_pickled():
    from learned_optim.tasks import FAMILIES

    for family in FAMILIES.values():
        assert pickle.loads(pickle.dumps(family)) == family
