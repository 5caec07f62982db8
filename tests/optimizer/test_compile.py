"""torch.compile around a step: the step itself runs as it always does, what surrounds it is compiled."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from helpers.optimizer_checks import assert_same_compiled
from helpers.support import (
    POLICIES,
    assert_same_bits,
    copies,
    give_gradients,
    leaves,
    make,
    regression,
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# Torch 2.6 takes the function out of a bound method that is disabled, and calls it without the optimizer.
of_a_method = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6: compile a function around it")


@of_a_method
@pytest.mark.parametrize("policy", POLICIES)
def test_a_compiled_step_method_gives_the_same_bits(policy):
    assert_same_compiled(lambda optimizer: torch.compile(optimizer.step), policy)


@pytest.mark.parametrize("options", [{}, {"fullgraph": False}, {"dynamic": True}, {"backend": "eager"}])
def test_a_compiled_function_around_a_step_gives_the_same_bits(options):
    def compile_step(optimizer):
        def step():
            optimizer.step()

        return torch.compile(step, **options)

    assert_same_compiled(compile_step)


@of_a_method
def test_a_compiled_step_with_options_of_the_optimizer():
    assert_same_compiled(lambda o: torch.compile(o.step), maximize=True, state_dtype=torch.bfloat16, steps=4)


@of_a_method
def test_a_tensor_lr_works_under_compilation():
    params = leaves((4, 3))
    others = copies(params)
    optimizer, plain = make(params, lr=torch.tensor(0.05)), make(others, lr=torch.tensor(0.05))
    step = torch.compile(optimizer.step)
    for t in range(4):
        for o in (optimizer, plain):
            o.param_groups[0]["lr"].fill_(0.1 / (t + 1))
        give_gradients(params, t)
        give_gradients(others, t)
        step()
        plain.step()
    assert_same_bits(params, others)


def test_a_compiled_training_step_gives_the_same_bits():
    def run(wrap):
        model, loss = regression()
        optimizer = make(model.parameters(), lr=0.01)

        def training_step():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            return value.detach()

        step = wrap(training_step)
        losses = [step().item() for _ in range(6)]
        return losses, list(model.parameters())

    losses, params = run(lambda f: torch.compile(f, backend="eager"))
    expected_losses, expected = run(lambda f: f)
    assert losses == expected_losses
    assert_same_bits(params, expected)


@of_a_method
def test_many_learning_rates_do_not_recompile():
    (p,) = leaves((4, 3))
    optimizer = make([p], lr=0.1)
    step = torch.compile(optimizer.step)
    compiled = []
    for t in range(20):
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        give_gradients([p], t)
        step()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] == compiled[1]


def test_a_closure_that_runs_a_compiled_model_keeps_it_compiled():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, _ = regression()
    compiled = torch.compile(model, backend=counting)
    optimizer = make(model.parameters(), lr=0.01)
    x = torch.ones(2, 6)

    def closure():
        optimizer.zero_grad()
        value = compiled(x).square().sum()
        value.backward()
        return value

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert len(graphs) == 1


@of_a_method
def test_a_compiled_step_returns_what_the_closure_returned():
    (p,) = leaves((3,))
    optimizer = make([p])

    def closure():
        give_gradients([p], 0)
        return torch.tensor(7.0)

    assert torch.compile(optimizer.step)(closure).item() == 7.0
    assert torch.compile(optimizer.step, backend="eager")(closure=closure).item() == 7.0
