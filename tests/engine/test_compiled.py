"""Compiled kernels against plain torch operations: same rule, same checkpoints, nothing compiled twice."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

from helpers import ROOT
from helpers.param_changes import CHANGES, assert_a_step_goes_by_what_is_there_now, data_of_another_dtype
from helpers.support import (
    POLICIES,
    assert_same_bits,
    copies,
    give_gradients,
    leaves,
    make,
    peak_bytes_of_a_step,
    random_policy,
    run,
)
from learned_optim import LearnedOptimizer, PolicyConfig
from learned_optim.engine import auto, compiled, kernels, packing
from learned_optim.engine.head import head_pass
from learned_optim.rule.types import StepScalars

pytestmark = [
    pytest.mark.skipif(kernels.find_compiler("cpu") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("kernel_cache"),
]

W = kernels.WIDTH
#: With and without matrices that are orthogonalised.
BOTH = ("random", "orthogonal")
#: 0-d, empty, tiny, a whole row, rows and a rest, several dimensions.
SHAPES = [(), (0,), (3,), (W,), (2 * W,), (W + 7,), (3 * W + 5,), (40, 130), (8, 3, 3, 3), (64, 128)]


def compile_(params, policy="random", **options):
    return make(params, policy, backend="compiled", **options)


@pytest.fixture
def no_compilation(monkeypatch):
    """Fails the test if a kernel is made, be it from the disk's cache."""

    def refuse(*args):
        raise AssertionError(f"a kernel was made for {args}")

    monkeypatch.setattr(kernels, "_ahead_of_time", refuse)


@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_all_shapes(policy):
    plain = leaves(*SHAPES)
    params = copies(plain)
    optimizers = make(plain, policy), compile_(params, policy)
    for optimizer, ps in zip(optimizers, (plain, params), strict=True):
        run(optimizer, ps, 5)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        for name, value in optimizers[0].state[b].items():
            torch.testing.assert_close(optimizers[1].state[a][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "layout", [lambda p: p.t(), lambda p: p[:, ::2], lambda p: p[1:, 3:]], ids=["transposed", "strided", "cut"]
)
@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_tensors_with_other_strides(layout, policy):
    plain = [layout(torch.randn(48, 120, generator=torch.Generator().manual_seed(0))).requires_grad_()]
    params = copies(plain)
    params[0].data = torch.empty_strided(plain[0].shape, plain[0].stride()).copy_(plain[0].detach())
    for optimizer, ps in ((make(plain, policy), plain), (compile_(params, policy), params)):
        run(optimizer, ps, 3)
    torch.testing.assert_close(params[0], plain[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_large_matrices(policy):
    """Wide and tall ones, some larger than what is copied at once, beside vectors."""
    plain = leaves((3, packing.COPIED // 2), (1000, 777), (5_000,), (130, 40))
    params = copies(plain)
    for optimizer, ps in ((make(plain, policy), plain), (compile_(params, policy), params)):
        run(optimizer, ps, 2)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_channels_last_tensors(policy):
    plain = [leaves((16, 8, 5, 5))[0].detach().to(memory_format=torch.channels_last).requires_grad_()]
    params = copies(plain)
    for optimizer, ps in ((make(plain, policy), plain), (compile_(params, policy), params)):
        run(optimizer, ps, 3)
    assert params[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(params[0], plain[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("policy", BOTH)
def test_compiled_and_eager_agree_on_complex_tensors(policy):
    plain = [torch.randn(30, 40, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).requires_grad_()]
    params = copies(plain)
    for optimizer, ps in ((make(plain, policy), plain), (compile_(params, policy), params)):
        run(optimizer, ps, 3)
    torch.testing.assert_close(params[0], plain[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("policy", BOTH)
def test_a_step_of_a_tensor_does_not_depend_on_the_tensors_beside_it_or_on_their_order(policy):
    together, alone = leaves(*SHAPES), leaves(*SHAPES)
    run(compile_(together, policy), together, 3)
    order = list(reversed(range(len(SHAPES))))
    reordered = leaves(*SHAPES)
    grouped = compile_(
        [{"params": [reordered[i]]} for i in order[:4]] + [{"params": [reordered[i] for i in order[4:]]}], policy
    )
    separate = [compile_([p], policy) for p in alone]
    for step in range(3):
        for params, optimizers in ((alone, separate), (reordered, [grouped])):
            give_gradients(params, step)
            for optimizer in optimizers:
                optimizer.step()
    assert_same_bits(alone, together)
    assert_same_bits(reordered, together)


@pytest.mark.parametrize("policy", BOTH)
def test_tensors_that_are_copied_as_a_whole_as_on_gpus_get_the_same_update(policy, monkeypatch):
    in_place, whole = leaves(*SHAPES, (700, 700)), leaves(*SHAPES, (700, 700))
    run(compile_(in_place, policy), in_place, 3)
    monkeypatch.setattr(compiled, "IN_PLACE", 600)
    run(compile_(whole, policy), whole, 3)
    if policy == "random":
        assert_same_bits(whole, in_place)
    for a, b in zip(whole, in_place, strict=True):  # squares of rows and columns are added up in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", BOTH)
def test_a_gradient_that_is_not_finite_leaves_other_tensors_alone(bad, policy):
    clean, dirty = leaves(*SHAPES), leaves(*SHAPES)
    run(compile_(clean, policy), clean, 2)
    optimizer = compile_(dirty, policy)
    for step in range(2):
        give_gradients(dirty, step)
        for i in (2, 6):
            dirty[i].grad[-1] = bad
        optimizer.step()
    others = [i for i in range(len(SHAPES)) if i not in (2, 6)]
    assert_same_bits([dirty[i] for i in others], [clean[i] for i in others])
    assert not dirty[6].isfinite().all()


def test_bits_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            params = leaves((300, 401))
            run(compile_(params), params, 3)
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(*results)


def test_a_checkpoint_moves_between_backends():
    shapes = [(70, 90), (5,)]
    reference = leaves(*shapes)
    run(make(reference), reference, 6)
    for first, second in (("eager", "compiled"), ("compiled", "eager")):
        params = leaves(*shapes)
        optimizer = make(params, backend=first)
        run(optimizer, params, 3)
        resumed = make(params, backend=second)
        resumed.load_state_dict(optimizer.state_dict())
        run(resumed, params, 3, start=3)
        for a, b in zip(params, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-6)


def test_resuming_is_exact_also_after_the_state_was_replaced():
    shapes = [(70, 90), (5,)]
    straight, params = leaves(*shapes), leaves(*shapes)
    run(compile_(straight), straight, 6)
    optimizer = compile_(params)
    run(optimizer, params, 3)
    saved, values = copy.deepcopy(optimizer.state_dict()), copies(params)
    run(optimizer, params, 2, start=50)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    params[0].data = params[0].data.clone()
    run(optimizer, params, 3, start=3)
    assert_same_bits(params, straight)


def test_nothing_is_compiled_again_for_schedules_groups_clipping_steps_or_a_hundred_shapes(no_compilation):
    params = leaves(*[(n, 17 + n % 5) for n in range(1, 101)])
    optimizer = compile_(
        [{"params": params[i::3], "lr": 1e-3 * (i + 1), "weight_decay": 0.1 * i, "betas": (0.8, 0.9 + 0.03 * i)}
         for i in range(3)]
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    frames = dict(torch._dynamo.utils.counters["frames"])
    for step in range(5):
        give_gradients(params, step)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
    other = leaves((50, 50))
    run(compile_(other, random_policy(seed=9)), other, 2)
    assert optimizer.backend.startswith("compiled")
    assert dict(torch._dynamo.utils.counters["frames"]) == frames


def test_the_gradient_is_released_after_a_step():
    import weakref

    params = leaves((40, 40), (7,))
    optimizer = compile_(params)
    run(optimizer, params, 2)
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [ref() for ref in grads] == [None, None]


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not data_of_another_dtype])
def test_a_step_goes_by_what_is_there_now(change):
    assert_a_step_goes_by_what_is_there_now(change, backend="compiled")


def test_a_step_takes_little_memory_besides_the_state():
    params = leaves((2000, 1000), *[(100, 100)] * 50, *[(n,) for n in range(1, 300)])
    optimizer = compile_(params)
    run(optimizer, params, 2)
    assert 0 < peak_bytes_of_a_step(optimizer) < 0.05 * 24 * sum(p.numel() for p in params) + 16e6


def test_a_copied_or_pickled_optimizer_goes_on_with_the_same_bits():
    params = leaves((60, 40))
    optimizer = compile_(params)
    run(optimizer, params, 2)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    run(optimizer, params, 2, start=2)
    for twin in twins:
        others = twin.param_groups[0]["params"]
        run(twin, others, 2, start=2)
        assert_same_bits(others, params)


def test_a_step_inside_the_users_own_compiled_function_works():
    (a,), (b,) = leaves((40, 40)), leaves((40, 40))
    plain, inside = compile_([a]), compile_([b])
    run(plain, [a], 2)
    step = torch.compile(lambda: inside.step(), backend="eager")
    for i in range(2):
        give_gradients([b], i)
        step()
    assert_same_bits([b], [a])


def test_a_gradient_of_zero_and_a_learning_rate_of_zero_change_nothing():
    params = leaves((40, 40), (9,))
    before = copies(params)
    optimizer = compile_(params, lr=0.0)
    run(optimizer, params, 2)
    assert_same_bits(params, before)
    optimizer = compile_(params, weight_decay=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(params, before)


def test_loading_kernels_from_the_disk_takes_less_than_two_seconds_in_a_new_process(kernel_cache):
    (p,) = leaves((W, 3))
    run(compile_([p], POLICIES["base"]), [p], 1)
    code = (
        "import time, torch; from learned_optim import LearnedOptimizer, Policy\n"
        "def refuse(*a, **k): raise SystemExit('compiled again')\n"
        "torch.export.export = refuse\n"
        f"p = torch.nn.Parameter(torch.ones({W}, 3)); p.grad = torch.ones_like(p)\n"
        "opt = LearnedOptimizer([p], policy=Policy(), backend='compiled')\n"
        "t = time.process_time(); opt.step(); print(time.process_time() - t, opt.backend)"
    )
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": kernel_cache, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, backend = done.stdout.split(" ", 1)
    assert backend.startswith("compiled")
    assert float(seconds) < 2.0


class TestAuto:
    def test_small_models_never_wait(self, no_compilation):
        params = leaves((100, 100), dtype=torch.float64)
        optimizer = LearnedOptimizer(params, policy=POLICIES["base"])
        assert optimizer.backend == "not chosen before the first step"
        run(optimizer, params, 1)
        assert optimizer.backend == "eager (10,000 parameters, compiled from 1,000,000)"

    def test_large_models_are_compiled_and_their_few_parameters_of_another_dtype_are_not(self, monkeypatch):
        monkeypatch.setattr(auto, "WORTH_COMPILING", 5_000)
        params = leaves((100, 100)) + leaves((50,), dtype=torch.float64)
        optimizer = LearnedOptimizer(params, policy=POLICIES["base"])
        run(optimizer, params, 2)
        assert optimizer.backend == (
            "compiled (10,000 torch.float32 parameters); eager (50 torch.float64 parameters, compiled from 5,000)"
        )

    def test_without_a_compiler_it_is_eager_and_silent(self, monkeypatch):
        monkeypatch.setattr(auto, "WORTH_COMPILING", 5_000)
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        params = leaves((100, 100))
        optimizer = LearnedOptimizer(params, policy=POLICIES["base"])
        run(optimizer, params, 1)
        assert optimizer.backend == "eager (10,000 parameters; no compiler for cpu)"

    def test_a_failed_compilation_is_said_once_and_the_step_is_made_all_the_same(self, monkeypatch):
        def fail(*args):
            raise OSError("read-only file system\nmore")

        monkeypatch.setattr(kernels, "_ahead_of_time", fail)
        config = PolicyConfig(eps=3e-8)  # of no other test
        plain, params, more = leaves((40, 40)), leaves((40, 40)), leaves((40, 40))
        policy = random_policy(config)
        run(make(plain, policy), plain, 2)
        optimizer = compile_(params, policy)
        with pytest.warns(RuntimeWarning, match="could not be compiled.*OSError: read-only file system$") as caught:
            run(optimizer, params, 2)
        assert len(caught) == 1
        assert optimizer.backend == "eager (compilation failed: OSError: read-only file system)"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(compile_(more, policy), more, 2)
        assert_same_bits(params, plain)
        assert_same_bits(more, plain)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["random", "gru"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_compiled_and_eager_agree_on_all_dtypes(dtype, state_dtype, policy):
    shapes = [(40, 130), (7,), ()]
    plain = leaves(*shapes, dtype=dtype)
    params = copies(plain)
    optimizers = make(plain, policy, state_dtype=state_dtype), compile_(params, policy, state_dtype=state_dtype)
    for optimizer, ps in zip(optimizers, (plain, params), strict=True):
        run(optimizer, ps, 4)
    low = dtype in (torch.bfloat16, torch.float16) or state_dtype is not None
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-2 if low else 2e-5, atol=2e-3 if low else 2e-6)


@pytest.mark.slow
def test_kernels_made_by_torch_compile_as_for_other_devices_do_the_same_and_are_made_once():
    kind = kernels.Kind(PolicyConfig(), "cpu", (torch.float32,) * 8)
    ahead = kernels.kernels(kind)
    tensors = [torch.rand(3000, W) for _ in range(8)]
    scalars = torch.rand(3000, len(StepScalars._fields))
    coefficients = torch.rand(3000, kernels.coefficient_count(kind.config))
    weights = torch.randn(sum(math.prod(shape) for shape in kind.config.coordinate_weights().values()))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        measure = kernels._just_in_time(kernels._Measure(kind), [*tensors[:5], scalars], 6)
        apply = kernels._just_in_time(kernels._Apply(kind), [*tensors, scalars, coefficients, weights], 10)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for rows in (2, 77, 3000):
            x = [t[:rows].clone() for t in (*tensors, scalars, coefficients)]
            y = [t.clone() for t in x]
            assert torch.equal(measure([*x[:5], x[8]])[0], ahead.measure([*y[:5], y[8]])[0])
            apply([*x, weights])
            ahead.apply([*y, weights])
            assert_same_bits(x, y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.parametrize("safeguard", [False, True])
def test_a_compiled_head_as_on_gpus_does_the_same_for_any_number_of_tensors_and_is_made_once(safeguard):
    device = torch.device("cpu")
    graphs = []
    for shapes in (SHAPES, [(3, 5)] * 70, SHAPES[4:]):
        plain, params = leaves(*shapes), leaves(*shapes)
        optimizers = [make(ps, safeguard=safeguard) for ps in (plain, params)]
        optimizers[1]._backend.head.compiled[device] = kernels.compiled_head(head_pass)
        for optimizer, ps in zip(optimizers, (plain, params), strict=True):
            run(optimizer, ps, 3)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for a, b in zip(params, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert graphs[0] == graphs[2]
