"""What several test modules need: policies whose every branch is live, problems to train on, comparisons of bits."""

from __future__ import annotations

import torch

from learned_optim import LearnedOptimizer, Policy, PolicyConfig

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def random_policy(config=None, seed=0, std=0.2):
    """A policy with normal weights: gates, amplitude and head all have their say."""
    policy = Policy(config, generator=torch.Generator().manual_seed(seed), source="random")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return policy


POLICIES = {
    "base": Policy(),
    "random": random_policy(),
    "gru": random_policy(PolicyConfig.gru(decay_rate=0.3)),
    "orthogonal": random_policy(
        PolicyConfig(
            orthogonal=0.7, orthogonal_damping=1.5, pace_gain=0.2, pace_growth=0.1, age_rate=0.5, decay_rate=0.5
        )
    ),
}


def make(params, policy="random", **options):
    """The optimizer under test: plain torch operations, the backend that every other one is measured against."""
    policy = POLICIES[policy] if isinstance(policy, str) else policy
    return LearnedOptimizer(params, policy=policy, **{"backend": "eager", **options})


def leaves(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def copies(params):
    """Other leaves of the same values and strides."""
    return [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in params]


def give_gradients(params, step, scale=1.0, seed=0):
    """The same random gradients to whatever tensors of these shapes, for a given step."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for p in params:
        if p.is_complex():
            g = torch.view_as_complex(torch.randn((*p.shape, 2), generator=generator) * scale)
        else:
            g = torch.randn(p.shape, generator=generator) * scale
        p.grad = torch.empty_like(p).copy_(g)


def run(optimizer, params, steps, start=0, scale=1.0):
    for step in range(start, start + steps):
        give_gradients(params, step, scale)
        optimizer.step()


def regression():
    """A small network and its data; ``loss()`` is a closure without the optimizer's part."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    return model, lambda: torch.nn.functional.mse_loss(model(x), y)


def train(model, loss, optimizer, steps, scheduler=None):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(value.item())
        elif scheduler is not None:
            scheduler.step()
    return losses


def bits(tensor):
    """The tensor as integers, so that -0 and 0 differ and NaN equals NaN."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def assert_same_bits(actual, expected):
    """Lists of tensors, bit by bit."""
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(bits(a), bits(b)), f"tensor {i} differs by up to {(a - b).abs().max()}"


def assert_same_state(actual, expected):
    """Two optimizers' states, bit by bit, dtypes included."""
    first, second = actual.state_dict(), expected.state_dict()
    assert first["state"].keys() == second["state"].keys()
    for key, values in first["state"].items():
        others = second["state"][key]
        assert values.keys() == others.keys()
        assert_same_bits(list(values.values()), list(others.values()))


def snapshot(optimizer):
    """Everything an optimizer would change: parameters, state, groups."""
    tensors = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    state = {
        (i, key): value.clone() if isinstance(value, torch.Tensor) else value
        for i, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    return tensors, state, [{**g, "params": len(g["params"])} for g in optimizer.param_groups]


def assert_unchanged(optimizer, before):
    tensors, state, groups = snapshot(optimizer)
    assert_same_bits(tensors, before[0])
    assert state.keys() == before[1].keys()
    assert_same_bits(list(state.values()), list(before[1].values()))
    assert groups == before[2]


def peak_bytes_of_a_step(optimizer):
    """Most of the memory that a step allocates and has not yet freed, at any moment of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
