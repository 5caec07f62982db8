"""What is meant to be added, is added by one entry in one file, and leaves saved policies as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers.rule_checks import assert_follows_reference
from helpers.support import assert_same_bits, leaves, make, random_policy, run
from learned_optim import Policy, PolicyConfig, rule
from learned_optim.engine import native_library
from learned_optim.rule.cells import CELLS, Cell
from learned_optim.rule.context import CONTEXT, DEFAULT_CONTEXT, ContextFeature
from learned_optim.rule.features import DEFAULT_FEATURES, FEATURES
from learned_optim.rule.layouts import Whole
from learned_optim.rule.orthogonalize import POLAR_METHODS

BUNDLED = ("default", "pretraining", "reader", "recurrent")
SHAPES = [(6, 5), (7,), (4, 3, 3, 3)]


def after_steps(policy, **options):
    params = leaves(*SHAPES)
    run(make(params, policy, **options), params, 4)
    return params


def bundled_updates():
    return [p for name in BUNDLED for p in after_steps(Policy.from_pretrained(name))]


@pytest.fixture
def previous_momentum(monkeypatch):
    """A context feature made from sums that are there already."""
    feature = ContextFeature(-1.5, 1.0, lambda c: 0.5 * c.statistics.means.r_r.clamp(min=1e-8).log())
    monkeypatch.setitem(CONTEXT, "log_rms_r", feature)


def test_a_context_feature_changes_no_saved_policy(monkeypatch):
    before = bundled_updates()
    prints = [Policy.from_pretrained(name).fingerprint() for name in BUNDLED]
    first = {"a_new_one": ContextFeature(0.0, 1.0, lambda c: c.one), **CONTEXT}
    monkeypatch.setattr("learned_optim.rule.context.CONTEXT", first)
    monkeypatch.setattr("learned_optim.rule.config.CONTEXT", first)
    assert [Policy.from_pretrained(name).fingerprint() for name in BUNDLED] == prints
    assert_same_bits(bundled_updates(), before)


@pytest.mark.usefixtures("previous_momentum")
def test_a_policy_can_use_a_new_context_feature_and_is_saved_with_it(tmp_path):
    policy = random_policy(PolicyConfig(context=(*DEFAULT_CONTEXT, "log_rms_r")))
    assert policy.config.context_center[-1] == -1.5
    assert policy.weights()["head"].shape[1] == len(DEFAULT_CONTEXT) + 1
    with_it = after_steps(policy)
    policy.save_pretrained(tmp_path)
    loaded = Policy.from_pretrained(tmp_path)
    assert loaded.config == policy.config
    assert_same_bits(after_steps(loaded), with_it)
    with torch.no_grad():
        for name in ("head", "pace", "gate_context"):
            loaded.weights()[name][:, -1] = 0.0
    assert any(not torch.equal(a, b) for a, b in zip(after_steps(loaded), with_it, strict=True))


@pytest.mark.parametrize("context", [("bias",), ("log_rms_b", "cosine_slow", "log_age")])
def test_any_subset_of_the_context_in_any_order_will_do(context):
    assert_follows_reference(random_policy(PolicyConfig(context=context)), [(3, 4)], Whole((3, 4)))


def test_a_context_feature_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"context must be names out of .*'log_rms_r'"):
        PolicyConfig(context=("bias", "log_rms_r"))


def test_a_feature_of_the_cell_by_one_entry(monkeypatch):
    monkeypatch.setitem(FEATURES, "abs_p", lambda n: n.p.abs())
    policy = random_policy(PolicyConfig(features=(*DEFAULT_FEATURES, "abs_p")))
    assert policy.weights()["amplitude"].shape == (len(DEFAULT_FEATURES) + 1,)
    assert all(bool(p.isfinite().all()) for p in after_steps(policy))


def test_a_polar_method_by_one_entry(monkeypatch):
    def exact(gram, coefficients, iterations):
        values, vectors = torch.linalg.eigh(gram.double())
        return (vectors * values.unsqueeze(1).rsqrt() @ vectors.mT).to(gram.dtype)

    monkeypatch.setitem(POLAR_METHODS, "exact", exact)
    policy = random_policy(PolicyConfig(orthogonal=1.0, orthogonal_method="exact"))
    (p,) = params = leaves((6, 5))
    before = p.detach().clone()
    run(make(params, policy, weight_decay=0.0), params, 1)
    values = torch.linalg.svdvals(before - p.detach())
    torch.testing.assert_close(values, values.mean().expand(5), rtol=1e-3, atol=0.0)


def test_a_fifth_hidden_unit_by_configuration_alone():
    config = PolicyConfig(windows=(4.0, 16.0, 64.0), hidden_weights=(0.5, 0.1, 0.1, 0.1, 0.1), hidden_size=5)
    policy = random_policy(config)
    assert_follows_reference(policy, [(3, 4)], Whole((3, 4)))
    (p,) = params = leaves((3, 4))
    optimizer = make(params, policy)
    run(optimizer, params, 1)
    assert optimizer.state[p]["hidden_4"].count_nonzero() == 12
    assert "share_hidden_4" in optimizer.diagnostics()["0.0"]


class Sign(Cell):
    """Moves by the sign of Adam's direction; keeps the direction before."""

    odd_hidden, is_mixture, random_weights = True, False, ()

    def problem(self, config):
        return None if config.hidden_size == 1 else ("hidden_size", "1")

    def tensor_weights(self, config):
        return {}

    def coordinate_weights(self, config):
        return {"sign": (len(config.features),)}

    def rates(self, weights, config, context, step):
        return []

    def __call__(self, weights, config, coeff, inputs):
        return [inputs.b], coeff.momentum * inputs.b.sign()


def test_a_cell_by_one_class_and_one_entry(monkeypatch):
    monkeypatch.setitem(CELLS, "sign", Sign())
    options = {"rates": (), "windows": (), "hidden_weights": (), "caution": 0.0, "pace_rate": 0.0}
    config = PolicyConfig(cell="sign", hidden_size=1, step_scale=1.0, momentum_weight=1.0, **options)
    (p,) = params = leaves((3, 4))
    before = p.detach().clone()
    optimizer = make(params, Policy(config), lr=0.1, weight_decay=0.0, backend="auto")
    run(optimizer, params, 1)
    torch.testing.assert_close((p.detach() - before).abs(), torch.full((3, 4), 0.1))
    with pytest.raises(ValueError, match="hidden_size must be 1, found 4"):
        PolicyConfig(cell="sign", **options)


def test_kernels_on_disk_are_known_by_all_that_rule_and_engine_say(monkeypatch, tmp_path):
    kind = native_library.Kind(PolicyConfig(), (torch.float32,) * 4)
    here = Path(*rule.__path__)
    for folder in (here, here.parent / "engine"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(rule, "__path__", [str(tmp_path / "rule")])
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "engine" / "native_library.py"))
    keys = [native_library._key(kind)]
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert {"update.py", "native.cpp", "codegen.py"} <= {path.name for path in files}
    for path in files:
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        keys.append(native_library._key(kind))
    assert len(set(keys)) == len(keys) > 25
