"""What diagnostics() says is what happened, costs next to nothing, and can be drawn."""

from __future__ import annotations

import copy
import math
import sys
import time

import pytest
import torch

from helpers.support import copies, give_gradients, leaves, make, regression, run, train
from learned_optim import LearnedOptimizer, Policy, PolicyConfig, plots


def test_parameters_are_called_by_their_names_where_they_have_them():
    model, loss = regression()
    optimizer = make(model.named_parameters())
    assert optimizer.diagnostics() == {}
    train(model, loss, optimizer, 1)
    assert list(optimizer.diagnostics()) == [name for name, _ in model.named_parameters()]


def test_of_parameters_that_share_a_name_none_is_left_out():
    encoder, decoder = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    groups = [{"params": list(module.named_parameters())} for module in (encoder, decoder)]
    groups[1]["params"].append(("other", torch.nn.Parameter(torch.ones(3))))
    optimizer = LearnedOptimizer(groups)
    for group in optimizer.param_groups:
        give_gradients(group["params"], 0)
    optimizer.step()
    named = ["weight (0.0)", "bias (0.1)", "weight (1.0)", "bias (1.1)", "other"]
    assert list(optimizer.diagnostics()) == named


def test_parameters_without_names_are_called_by_group_and_index():
    params = leaves((3,), (4, 2), (5,))
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
    run(optimizer, params, 2)
    assert list(optimizer.diagnostics()) == ["0.0", "0.1", "1.0"]
    assert [d["lr"] for d in optimizer.diagnostics().values()] == [1e-3, 1e-3, 0.5]


def test_only_what_the_last_step_updated_is_there():
    params = leaves((3,), (4, 2), (0,))
    optimizer = make(params)
    run(optimizer, params, 1)
    params[0].grad = None
    optimizer.step()
    assert list(optimizer.diagnostics()) == ["0.1"]


def remove_the_first_group(optimizer):
    del optimizer.param_groups[0]


def reverse_a_group(optimizer):
    for key in ("params", "param_names"):
        optimizer.param_groups[0][key].reverse()


def remove_all_but_the_names(optimizer):
    optimizer.param_groups[0]["params"].clear()


def step_without_what_fits(optimizer):
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p]["exp_avg"] = torch.zeros(7)
    with pytest.raises(RuntimeError):
        optimizer.step()


@pytest.mark.parametrize(
    "change", [remove_the_first_group, reverse_a_group, remove_all_but_the_names, step_without_what_fits]
)
def test_after_groups_have_changed_names_and_figures_are_those_of_the_last_step(change):
    params = leaves((3,), (4, 2), (5,))
    optimizer = make([{"params": [("a", params[0]), ("b", params[1])]}, {"params": [("c", params[2])], "lr": 0.5}])
    run(optimizer, params, 2)
    before = optimizer.diagnostics()
    change(optimizer)
    assert optimizer.diagnostics() == before
    assert list(before) == ["a", "b", "c"]


def test_a_step_after_groups_have_changed_is_told_by_the_names_of_now():
    params = leaves((3,), (4, 2), (5,))
    optimizer = make([{"params": [("a", params[0]), ("b", params[1])]}, {"params": [("c", params[2])], "lr": 0.5}])
    run(optimizer, params, 2)
    reverse_a_group(optimizer)
    optimizer.param_groups[1]["params"].append(*leaves((6,)))  # without a name
    give_gradients([p for group in optimizer.param_groups for p in group["params"]], 2)
    optimizer.step()
    figures = optimizer.diagnostics()
    assert list(figures) == ["b", "a", "c", "1.1"]
    for name, p in zip("abc", params, strict=True):
        assert figures[name]["cosine_fast"] == pytest.approx(optimizer.state[p]["cosine_fast"].item(), rel=1e-6)


@pytest.mark.parametrize("policy", ["base", "random", "gru"])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_all_figures_are_finite_floats_and_the_shares_add_up_to_one(policy, backend):
    params = leaves((3,), (4, 2), (), (300, 200))
    optimizer = make(params, policy, backend=backend)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
        for figures in optimizer.diagnostics().values():
            assert all(type(value) is float and math.isfinite(value) for value in figures.values())
            assert sum(v for key, v in figures.items() if key.startswith("share_")) == pytest.approx(1.0)
            assert figures["step"] == step + 1


def test_statistics_are_those_of_the_tensors():
    (p,) = leaves((40, 30))
    optimizer = make([p], lr=0.0)
    run(optimizer, [p], 5)
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    run(optimizer, [p], 1, start=5)
    after, figures = optimizer.state[p], optimizer.diagnostics()["0.0"]
    root = (after["exp_avg_sq"] / (1 - 0.999**6)).sqrt() + 1e-8
    u, b, r = p.grad / root, after["exp_avg"] / (1 - 0.9**6) / root, before["exp_avg"] / root
    expected = {
        "rms_gradient": u.square().mean().sqrt(),
        "rms_momentum": b.square().mean().sqrt(),
        "rms_parameter": p.square().mean().sqrt(),
        "rms_hidden_0": before["hidden_0"].square().mean().sqrt(),
        "sparsity": 1 - b.abs().mean() ** 2 / b.square().mean(),
        "cosine": torch.nn.functional.cosine_similarity(u.flatten(), r.flatten(), dim=0),
        "cosine_slow": after["cosine_slow"],
        "pace": after["log_pace"].exp(),
    }
    for key, value in expected.items():
        assert figures[key] == pytest.approx(value.item(), rel=1e-4), key


def test_the_estimated_update_is_near_the_real_one():
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))
    target = torch.nn.Linear(20, 16)
    optimizer = LearnedOptimizer(model.named_parameters(), lr=1e-3, weight_decay=0.0)
    ratios = []
    for step in range(100):
        before = copies(model.parameters())
        x = torch.randn(16, 20)
        train(model, lambda x=x: torch.nn.functional.mse_loss(model(x), target(x).detach()), optimizer, 1)
        if step % 10 == 9:
            for (name, p), q in zip(model.named_parameters(), before, strict=True):
                real = (p - q).square().mean().sqrt() / 1e-3
                ratios.append(optimizer.diagnostics()[name]["update_rms"] / real.item())
    assert sorted(ratios)[len(ratios) // 2] == pytest.approx(1.0, abs=0.15)
    assert sum(0.7 < ratio < 1.4 for ratio in ratios) > 0.9 * len(ratios)


def test_for_a_policy_that_is_adamw_the_ratio_is_one():
    params = leaves((40, 30), (50,))
    optimizer = make(params, Policy(PolicyConfig.adamw()))
    run(optimizer, params, 20)
    for figures in optimizer.diagnostics().values():
        assert figures["step_size"] == pytest.approx(1.0)
        assert figures["share_momentum"] == pytest.approx(1.0)
        assert figures["update_to_adamw"] == pytest.approx(1.0, rel=1e-6)


def test_windows_follow_the_steps():
    params = leaves((40, 30))
    optimizer = make(params, "base")
    run(optimizer, params, 50)
    (figures,) = optimizer.diagnostics().values()
    config = optimizer.policy.config
    expected = [(50 + k - 1) / k for k in config.windows] + [1 / rate for rate in config.rates]
    assert [figures[f"window_{j}"] for j in range(4)] == pytest.approx(expected)


def test_tensors_of_several_passes_are_all_there(monkeypatch):
    monkeypatch.setattr("learned_optim.engine.step.COPIED", 100)
    params = leaves(*[(30,)] * 9)
    optimizer = make(params)
    run(optimizer, params, 1)
    assert list(optimizer.diagnostics()) == [f"0.{i}" for i in range(9)]


def test_it_is_in_no_checkpoint_and_starts_anew_after_loading():
    params = leaves((3,))
    optimizer = make(params)
    run(optimizer, params, 1)
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert copy.deepcopy(optimizer).diagnostics() == {}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.diagnostics() == {}


def test_a_broken_gradient_shows_in_its_own_tensor_only():
    params = leaves((3,), (4,))
    optimizer = make(params)
    give_gradients(params, 0)
    params[0].grad[1] = math.nan
    optimizer.step()
    broken, sound = optimizer.diagnostics().values()
    assert math.isnan(broken["update_rms"])
    assert not any(map(math.isnan, sound.values()))


def test_asked_every_hundred_steps_it_costs_less_than_two_per_cent():
    params = leaves(*[(64, 64), (64,)] * 10)
    optimizer = make(params)
    run(optimizer, params, 2)

    def seconds(call):
        best = math.inf
        for _ in range(10):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(optimizer.diagnostics) < 0.02 * 100 * seconds(optimizer.step)


def a_history(tensors=9, steps=5):
    params = leaves(*[(4, 3)] * tensors)
    optimizer = make(params)
    history = []
    for step in range(steps):
        run(optimizer, params, 1, start=step)
        history.append(optimizer.diagnostics())
    return history


@pytest.mark.parametrize(("tensors", "steps"), [(9, 5), (2, 1)])
def test_a_history_is_drawn(tmp_path, tensors, steps):
    path = plots.diagnostics(a_history(tensors, steps), tmp_path / "diagnostics.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_an_empty_history_is_refused(tmp_path):
    for history in ([], [{}], {"weight": {"step": 1.0}}):
        with pytest.raises(ValueError, match="nothing to draw"):
            plots.diagnostics(history, tmp_path / "diagnostics.png")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="drawing needs matplotlib: pip install"):
        plots.diagnostics(a_history(2, 1), tmp_path / "diagnostics.png")
