"""What people do around an optimizer: frozen backbones, layer-wise learning rates, averages, compiled models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.support import assert_same_bits, assert_same_state, give_gradients, leaves, make, regression, train
from learned_optim import LearnedOptimizer

BACKENDS = ["eager", "compiled"]


class LowRank(nn.Module):
    """A frozen layer and a trained difference of low rank, whose second factor begins at zero."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T


def test_a_frozen_backbone_stays_and_its_low_rank_difference_trains():
    model, loss = regression()
    model[0], model[2] = LowRank(model[0]), LowRank(model[2])
    optimizer = make(model.named_parameters(), lr=0.01)  # frozen parameters among them
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    losses = train(model, loss, optimizer, 40)
    assert losses[-1] < losses[0]
    assert_same_bits([p for p in model.parameters() if not p.requires_grad], frozen)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(optimizer.diagnostics()) == trained
    assert len(optimizer.state) == len(trained)


def test_another_process_of_adapters_resumes_without_state_of_the_backbone():
    runs = []
    for stop in (None, 3):
        torch.manual_seed(1)
        model, loss = regression()
        model[0] = LowRank(model[0])
        optimizer = make(model.parameters(), lr=0.01)
        if stop:
            train(model, loss, optimizer, stop)
            saved = optimizer.state_dict()
            optimizer = make(model.parameters(), lr=0.01)
            optimizer.load_state_dict(saved)
        train(model, loss, optimizer, 6 - (stop or 0))
        runs.append((list(model.parameters()), optimizer))
    assert_same_bits(runs[0][0], runs[1][0])
    assert_same_state(runs[0][1], runs[1][1])


def test_an_external_writer_of_layer_wise_learning_rates_is_followed():
    """As timm's schedulers write: lr times the group's own lr_scale, before every step."""

    def groups(model):
        return [{"params": layer.parameters(), "lr_scale": 0.5**i} for i, layer in enumerate((model[2], model[0]))]

    model, loss = regression()
    other, other_loss = regression()
    optimizer = make(groups(model))
    by_hand = make([{"params": group["params"]} for group in groups(other)])
    for step in range(8):
        for group, mine, scale in zip(optimizer.param_groups, by_hand.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = 0.01 * group["lr_scale"] / (step + 1)
            mine["lr"] = 0.01 * scale / (step + 1)
        train(model, loss, optimizer, 1)
        train(other, other_loss, by_hand, 1)
    assert_same_bits(list(model.parameters()), list(other.parameters()))
    assert [group["lr_scale"] for group in optimizer.state_dict()["param_groups"]] == [1.0, 0.5]


def test_an_exponential_average_of_the_model_changes_nothing_and_resumes():
    model, loss = regression()
    plain, plain_loss = regression()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = make(model.parameters(), lr=0.01)
    before = loss().item()
    for _ in range(30):
        train(model, loss, optimizer, 1)
        average.update_parameters(model)
    train(plain, plain_loss, make(plain.parameters(), lr=0.01), 30)
    assert_same_bits(list(model.parameters()), list(plain.parameters()))
    assert sum((p - q).abs().sum() for p, q in zip(average.module.parameters(), model.parameters(), strict=True)) > 0
    x = torch.randn(4, 6)
    assert bool(average(x).isfinite().all())
    assert loss().item() < before


def test_a_compiled_model_is_trained_as_the_plain_one():
    model, _ = regression()
    plain, _ = regression()
    compiled = torch.compile(model, backend="eager")
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    for net, forward in ((model, compiled), (plain, plain)):
        optimizer = make(net.named_parameters(), lr=0.01)
        train(net, lambda forward=forward: nn.functional.mse_loss(forward(x), y), optimizer, 5)
    assert_same_bits(list(model.parameters()), list(plain.parameters()))


@pytest.mark.parametrize(
    ("policy", "backend", "rest"),
    [
        *(("default", b, rest) for b in BACKENDS for rest in (450, 640)),
        ("default", "auto", 1200),
        ("recurrent", "eager", 640),
    ],
)
def test_training_goes_on_after_a_rest_with_gradients_of_zero(policy, backend, rest):
    """As of a head whose loss was switched off: the momentum fades until its square is zero in float32."""
    torch.manual_seed(0)
    model, target = nn.Linear(8, 8), torch.randn(8, 8)
    optimizer = LearnedOptimizer(model.parameters(), lr=1e-3, policy=policy, backend=backend)
    losses = []
    for t in range(200 + rest + 30):
        x = torch.randn(32, 8)
        loss = (model(x) - x @ target).square().mean()
        optimizer.zero_grad()
        (loss * (not 200 <= t < 200 + rest)).backward()
        if t == 200:
            pace = optimizer.state[model.weight]["log_pace"].clone()
        optimizer.step()
        losses.append(loss.item())
        if t == 200 + rest - 1:
            assert optimizer.state[model.weight]["log_pace"] == pace  # pyright: ignore[reportPossiblyUnboundVariable]
    assert max(losses[-30:]) < 2.0 * losses[199 + rest] + 1e-4  # which weight decay has raised a little
    assert abs(optimizer.diagnostics()["0.0"]["cosine_slow"]) <= 1.0


@pytest.mark.parametrize(
    "options",
    [
        *({"backend": backend} for backend in BACKENDS),
        {"safeguard": True},
        {"capturable": True},
        {"skip_nonfinite": True},
        {"state_dtype": torch.bfloat16},
        {"policy": "recurrent"},
    ],
    ids=str,
)
def test_a_tensor_begins_with_its_first_gradient_that_is_not_zero(options):
    """As a head whose loss is switched on later; counted, the steps before made its first one 400 lr large, not 35.

    Of steps without a gradient only the first counts.
    """

    def trained(rest, of_all=True):
        """Three steps, after a rest in which the gradients of a matrix and of one in a stack are zero, or all."""
        matrix, bias, stack = params = leaves((6, 8), (8,), (2, 6, 8))
        groups = [{"params": [matrix, bias]}, {"params": [stack], "stacked": 1}]
        optimizer = LearnedOptimizer(groups, weight_decay=0.0, **options)
        for step in range(rest + 3):
            give_gradients(params, step - rest)
            if step < rest:
                for grad in [p.grad for p in params] if of_all else (matrix.grad, stack.grad[1]):
                    grad.zero_()
            optimizer.step()
        return [optimizer.state[p] for p in params], [p.detach() for p in params]

    def those(numbers, rows):
        return [numbers[0], numbers[2][1]] if rows else numbers

    # A GRU's hidden state and the trust of a safeguard move in the one step that counts.
    shortest = 2 if {"policy", "safeguard"} & options.keys() else 1
    states, params = trained(rest=shortest)
    for rest, of_all in ((2, True), (500, True), (30, False)):
        later_states, later = trained(rest, of_all)
        assert_same_bits(those(later, not of_all), those(params, not of_all))
        for key in states[0]:
            found, expected = ([state[key] for state in some] for some in (later_states, states))
            assert_same_bits(those(found, not of_all), those(expected, not of_all))
        assert later_states[2]["step"].tolist() == [4.0 if of_all else rest + 3.0, 4.0]


def test_gradients_that_are_zero_in_the_second_step_only_are_a_step():
    params = leaves((6, 8), (8,))
    optimizer = LearnedOptimizer(params)
    for step in range(4):
        give_gradients(params, step)
        if step == 1:
            for p in params:
                p.grad.zero_()
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [4.0, 4.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1e-8, 1e-16, 1e-22, 1e-24, 1e-30, 1e-36, 0.0, 1e8])
def test_a_cosine_is_one_however_small_a_gradient_gets(backend, factor):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 8))
    optimizer = LearnedOptimizer([p], lr=1e-3, backend=backend)
    for t in range(40):
        p.grad = torch.randn(8, 8) * (factor if 10 <= t < 13 else 1.0)
        optimizer.step()
        figures = optimizer.diagnostics()["0.0"]
        assert max(abs(figures[name]) for name in ("cosine", "cosine_fast", "cosine_slow")) <= 1.0
    assert bool(p.isfinite().all())
