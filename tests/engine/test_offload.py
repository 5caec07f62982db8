"""State on the host: its bookkeeping, against a fake host on the CPU whose copies arrive late. No GPU has seen it."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import ClassVar

import pytest
import torch

from helpers.fake_host import FakeHost
from helpers.support import (
    DTYPES,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    give_gradients,
    leaves,
    make,
    run,
    snapshot,
)
from learned_optim import LearnedOptimizer
from learned_optim.engine import offload as module
from learned_optim.engine.graph import CudaCapture, StepGraph
from learned_optim.engine.state_checks import StateMismatch, check_fits

SHAPES = [(), (0,), (3,), (12, 7), (8, 3, 3, 3), (40, 30), (40, 30), (200, 3)]
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture
def hosts(monkeypatch):
    """The hosts that optimizers with ``offload=True`` make, the last one last; small chunks, so that there are many."""
    made = []

    def make_host():
        made.append(FakeHost())
        return made[-1]

    monkeypatch.setattr(module, "PinnedMemory", make_host)
    monkeypatch.setattr(module, "LENT", 1000)
    return made


def states(optimizer):
    """What has the parameters' shapes."""
    return [t for state in optimizer.state.values() for key, t in state.items() if key.startswith(("exp_", "hidden_"))]


def both(params_of, steps=3, **options):
    """The same training with offloading and without."""
    results = []
    for offload in (True, False):
        params = params_of()
        optimizer = make(params, offload=offload, **options)
        run(optimizer, params, steps)
        results.append((optimizer, params))
    return results


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("random", {}),
        ("orthogonal", {}),
        ("gru", {}),
        ("orthogonal", {"safeguard": True, "state_dtype": torch.bfloat16}),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.usefixtures("kernel_cache")
def test_offloading_changes_no_bits(hosts, backend, policy, options):
    (one, params), (other, others) = both(lambda: leaves(*SHAPES), policy=policy, backend=backend, **options)
    assert_same_bits(params, others)
    assert_same_state(one, other)
    figures = one.diagnostics(), other.diagnostics()
    assert figures[0].keys() == figures[1].keys()
    assert all(figures[0][key] == pytest.approx(figures[1][key], nan_ok=True) for key in figures[0])
    (host,) = hosts
    assert host.loans > 3 * 3
    assert [*host.lent, *host.coming, *host.returning] == []
    mine = {t.data_ptr() for t in host.kept if t.numel()}
    assert {t.data_ptr() for t in states(one) if t.numel()} == mine


@pytest.mark.usefixtures("kernel_cache")
def test_the_backend_is_chosen_for_all_parameters_not_for_a_chunk(hosts):
    (one, _), (other, _) = both(lambda: leaves(*SHAPES), backend="auto")
    assert one.backend == other.backend


def test_views_of_state_that_lay_elsewhere_are_not_used(hosts):
    (p,) = leaves((12, 7))
    optimizer = make([p])
    run(optimizer, [p], 1)
    ((known,),) = (one.tensors for one in optimizer._collector._kept.values())
    assert known.cached_views is not None
    there = [t.clone() for t in known.state_on_host]
    assert known.with_state(there).cached_views is None
    assert known.with_state(there).state_tensors[0].data_ptr() == there[0].data_ptr()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_offloading_goes_with_every_dtype(hosts, dtype):
    (one, params), (other, others) = both(lambda: leaves((12, 7), (40, 30), (5,), dtype=dtype), policy="orthogonal")
    assert_same_bits(params, others)
    assert_same_state(one, other)
    assert hosts[0].loans


def test_offloading_goes_with_stacks_and_strides(hosts):
    """A parameter of several tensors is lent once; one that is stored transposed has state that is, too."""

    def groups():
        stack, packed, strided = leaves((3, 6, 8), (8, 12), (30, 20))
        held[:] = [stack, packed, strided.detach().t().requires_grad_()]
        return [
            {"params": [held[0]], "stacked": 1, "split": 2},
            {"params": [held[1]], "split": 3, "transposed": True},
            {"params": [held[2]]},
        ]

    held, results = [], []
    for offload in (True, False):
        optimizer = make(groups(), "orthogonal", offload=offload)
        run(optimizer, held, 3)
        results.append((optimizer, list(held)))
    assert_same_bits(results[0][1], results[1][1])
    assert_same_state(results[0][0], results[1][0])
    (host,) = hosts
    assert len(host.kept) == len(states(results[0][0]))
    assert host.loans == 3


def test_no_more_than_three_chunks_are_on_the_device(hosts):
    params = leaves(*[(10, 50)] * 12)
    optimizer = make(params, offload=True)
    run(optimizer, params, 2)
    (host,) = hosts
    assert host.loans == 2 * 6  # two parameters each
    assert host.at_once == 3 * 1000 * len(states(optimizer)) // len(params)


def test_rows_of_sparse_gradients_are_fetched_alone(hosts):
    results = []
    for offload in (True, False):
        (p,) = leaves((50, 6))
        optimizer = make([p], offload=offload)
        for step in range(3):
            values = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
            p.grad = torch.sparse_coo_tensor([[7, 3, 40]], values, p.shape, check_invariants=False)
            optimizer.step()
        results.append((optimizer, p))
    (one, p), (other, q) = results
    assert_same_bits([p], [q])
    assert_same_state(one, other)
    assert hosts[0].loans == 0


def test_a_gradient_that_is_not_finite_leaves_its_tensor_out(hosts):
    results = []
    for offload in (True, False):
        params = leaves(*SHAPES)
        optimizer = make(params, offload=offload, skip_nonfinite=True)
        for step in range(3):
            give_gradients(params, step)
            params[5].grad[0, 0] = torch.nan if step == 1 else 1.0
            optimizer.step()
        results.append((optimizer, params))
    (one, params), (other, others) = results
    assert_same_bits(params, others)
    assert_same_state(one, other)
    assert one.diagnostics()["0.5"]["skipped"] == 1.0
    assert one._report.left_out == []
    params[5].grad[0, 0] = torch.nan
    one.step()
    ((left_out),) = one._report.left_out
    assert left_out.state_tensors[0].data_ptr() == one.state[params[5]]["exp_avg"].data_ptr()


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_run_is_resumed_to_the_last_bit(hosts, way):
    (straight, others), _ = both(lambda: leaves(*SHAPES), steps=5)
    params = leaves(*SHAPES)
    optimizer = make(params, offload=True)
    run(optimizer, params, 2)
    if way == "state_dict":
        saved = copy.deepcopy(optimizer.state_dict())
        assert all(t.isfinite().all() for s in saved["state"].values() for t in s.values())
        again = make(params, offload=True)
        again.load_state_dict(saved)
        assert {id(t) for t in states(again)} <= {id(t) for t in hosts[-1].kept}
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(optimizer))
        params = again.param_groups[0]["params"]
    else:
        again = copy.deepcopy(optimizer)
        params = again.param_groups[0]["params"]
    assert again.offload
    run(again, params, 3, start=2)
    assert_same_bits(params, others)
    assert_same_state(again, straight)
    assert hosts[-1].loans


@pytest.mark.parametrize("offload", [True, False])
def test_a_checkpoint_goes_between_offloaded_and_not(hosts, offload):
    (_, others), _ = both(lambda: leaves(*SHAPES), steps=5)
    params = leaves(*SHAPES)
    optimizer = make(params, offload=offload)
    run(optimizer, params, 2)
    again = make(params, offload=not offload)
    again.load_state_dict(optimizer.state_dict())
    run(again, params, 3, start=2)
    assert_same_bits(params, others)


def test_going_on_from_adamw_and_a_group_that_is_added(hosts):
    params = leaves((12, 7), (40, 30))
    adamw = torch.optim.AdamW(params[:1])
    run(adamw, params[:1], 2)
    optimizer = LearnedOptimizer.from_adamw(adamw, offload=True, backend="eager")
    assert len(hosts[-1].kept) == len(states(optimizer)) > 0
    optimizer.add_param_group({"params": params[1:]})
    run(optimizer, params, 2)
    assert {id(t) for t in states(optimizer)} == {id(t) for t in hosts[-1].kept}


class FakeStream:
    """Writes down who waits for whom, and in which stream copies are made."""

    log: ClassVar[list[str]] = []
    current = "compute"

    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.log.append(f"{self.name} records an event")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def synchronize(self):
        self.log.append(f"the host waits for {self.name}")

    @contextlib.contextmanager
    def entered(self):
        FakeStream.current = self.name
        yield
        FakeStream.current = "compute"


def test_pinned_memory_is_copied_in_streams_that_wait_for_each_other(monkeypatch):
    """On a CPU, with streams that only say what they are told: the order of calls, not that a GPU follows it."""
    monkeypatch.setattr(FakeStream, "log", log := [])
    names = iter(("there", "back"))
    compute, copy_ = FakeStream("compute"), torch.Tensor.copy_
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", FakeStream.entered)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: log.append(f"kept for {stream.name}"))

    def copied(target, source, non_blocking=False):
        log.append(f"copy in {FakeStream.current}{', going on' if non_blocking else ''}")
        return copy_(target, source)

    host, cpu = module.PinnedMemory(), torch.device("cpu")
    kept = host.keep(torch.ones(3))
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    loan = host.lend([kept], cpu)
    assert loan.on_device[0].data_ptr() != kept.data_ptr()
    host.await_arrival(loan)
    loan.on_device[0].add_(1.0)
    assert kept.tolist() == [1.0] * 3
    host.take_back(loan)
    host.finish(cpu)
    assert kept.tolist() == [2.0] * 3
    assert log == [
        "there waits for compute", "copy in there, going on", "kept for there", "there records an event",
        "compute waits for event of there",
        "back waits for compute", "copy in back, going on", "kept for back", "the host waits for back",
    ]  # fmt: skip
    assert [host.serves(torch.device(kind)) for kind in ("cuda", "cpu", "meta")] == [True, False, False]


class Broken(RuntimeError):
    pass


def test_what_was_lent_before_a_failure_is_back_after_it(hosts, monkeypatch):
    params = leaves(*[(10, 50)] * 12)
    optimizer = make(params, offload=True)
    run(optimizer, params, 1)
    step, calls = module.run_step, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:  # one of nothing, two chunks, and this
            raise Broken
        return step(*args)

    monkeypatch.setattr(module, "run_step", failing)
    with pytest.raises(Broken):
        run(optimizer, params, 1, start=1)
    assert not hosts[0].returning
    assert all(t.isfinite().all() for p in params[:4] for t in optimizer.state[p].values())


def test_state_on_the_device_is_refused_and_says_where_it_belongs():
    p = torch.zeros(3, device="meta")
    step = {"step": torch.tensor(1.0)}
    there = {**step, **{key: torch.zeros(3, device="meta") for key in MOMENTS}}
    here = {**step, **{key: torch.zeros(3) for key in MOMENTS}}
    check_fits("w", p, here, MOMENTS, (), offloaded=True)
    check_fits("w", p, there, MOMENTS, ())
    with pytest.raises(StateMismatch, match="exp_avg lies on meta, where offload=True keeps it on the host"):
        check_fits("w", p, there, MOMENTS, (), offloaded=True)
    with pytest.raises(StateMismatch, match="exp_avg lies on cpu, the parameter has"):
        check_fits("w", p, here, MOMENTS, ())


def test_dtensors_are_refused_and_nothing_has_changed(hosts, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import distribute_tensor

        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        p = distribute_tensor(torch.ones(4, 4), mesh).requires_grad_()
        (q,) = leaves((3,))
        optimizer = make([q, p], offload=True)
        q.grad, p.grad = torch.ones(3), p.detach().clone()
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"'0.1' is a DTensor.*CPUOffloadPolicy"):
            optimizer.step()
        assert not optimizer.state
        assert_unchanged(optimizer, before)
    finally:
        torch.distributed.destroy_process_group()


def test_on_a_cpu_it_does_nothing():
    (one, params), (other, others) = both(lambda: leaves(*SHAPES))
    assert_same_bits(params, others)
    assert_same_state(one, other)
    assert one.backend == other.backend


def test_it_says_that_there_is_no_graph():
    class Everywhere(CudaCapture):
        def works_on(self, device):
            return True

    params = leaves((3,))
    optimizer = make(params, offload=True)
    optimizer._graph = StepGraph(Everywhere(), offload=module.Offload(FakeHost("cuda")))
    run(optimizer, params, 1)
    assert optimizer.backend == "eager; no CUDA graph: offload=True copies state to and fro"


def test_what_does_not_go_with_it_is_refused():
    with pytest.raises(ValueError, match=r"offload=True copies state.*capturable=True"):
        make(leaves((3,)), offload=True, capturable=True)
    with pytest.raises(TypeError, match="Invalid offload: 1"):
        make(leaves((3,)), offload=1)
