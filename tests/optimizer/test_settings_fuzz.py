"""Settings and configurations from anywhere: what is not refused in words is whole, and survives being written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from learned_optim import PolicyConfig
from learned_optim.meta_train import MetaTrainConfig

plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400), st.just(-1),
    st.sampled_from(["es", "gru", "final", "both", "head", "train", "SGD"]),
)  # fmt: skip
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


def perturbed(good: dict) -> st.SearchStrategy[dict]:
    """``good`` with up to four of its values replaced, left out, or named otherwise."""
    changed = st.dictionaries(st.sampled_from(sorted(good)), values, max_size=4)
    other = st.dictionaries(st.text(max_size=6), values, max_size=1)
    left_out = st.sets(st.sampled_from(sorted(good)), max_size=2)
    return st.builds(
        lambda c, o, l: {k: v for k, v in {**good, **c, **o}.items() if k not in l},
        changed,
        st.just({}) | other,
        left_out,
    )


def nudged(good: dict) -> st.SearchStrategy[dict]:
    """``good`` with one number moved, within its type: most of these are accepted."""
    scalars = {k: v for k, v in good.items() if type(v) in (int, float)}
    of_type = {int: st.integers(-2, 10**6), float: st.floats(-1, 10) | st.sampled_from([1e-300, 1e300, 0.1 + 0.2])}
    return st.one_of([of_type[type(v)].map(lambda x, k=k: {**good, k: x}) for k, v in scalars.items()])


META, POLICY = MetaTrainConfig().to_dict(), PolicyConfig().to_dict()


@settings(max_examples=150)
@given(perturbed(META) | nudged(META))
@example({"sigma": 10**400})
@example({"tasks": [1]})
@example({"start": '📁 \x7f " \\ \n'})
@example({"parts": [["head"]]})
def test_settings_of_meta_training_are_refused_in_words_or_survive_every_format(tmp_path_factory, given_values):
    try:
        config = MetaTrainConfig.from_dict(given_values)
    except ValueError:  # and nothing else
        return
    assert MetaTrainConfig.from_dict(config.to_dict()) == config
    assert MetaTrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    toml = tmp_path_factory.getbasetemp() / "settings.toml"
    if not any("\ud800" <= c <= "\udfff" for c in config.to_toml()):  # halves of characters are no text
        toml.write_text(config.to_toml(), encoding="utf-8")
        assert MetaTrainConfig.from_file(toml) == config
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize("name", ["settings.toml", "settings.json"])
@settings(max_examples=60)
@given(data=st.one_of(
    st.binary(max_size=60), values.map(lambda v: json.dumps(v).encode()),
    st.integers(0, 10**4).map(lambda n: MetaTrainConfig().to_toml().encode()[:n]),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"a." * 10_000 + b"a=1", b"[1]", b"5", b"null", b"\xff\xfe"]),
))  # fmt: skip
def test_a_file_of_settings_is_read_or_refused_with_its_name(tmp_path_factory, name, data):
    path: Path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    refusal = str(path)
    try:
        MetaTrainConfig.from_file(path)
    except ValueError as error:
        refusal = str(error)
    assert str(path) in refusal


@settings(max_examples=150)
@given(perturbed(POLICY) | nudged(POLICY))
@example({**POLICY, "eps": 10**400})
@example({**POLICY, "betas": [[0.9], 0.9]})
@example({**POLICY, "features": []})
def test_a_policys_configuration_is_refused_in_words_or_survives(given_values):
    try:
        config = PolicyConfig.from_dict(given_values)
    except ValueError:  # and nothing else
        return
    assert PolicyConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(sorted(POLICY)), plain, max_size=2))
def test_a_configuration_that_is_accepted_makes_a_policy(changed):
    from learned_optim import Policy

    try:
        config = PolicyConfig.from_dict({**POLICY, **changed})
    except ValueError:
        return
    assert Policy(config).weights()


@pytest.mark.parametrize(
    ("version", "message"),
    [(0, "format_version must be 1, found 0"), (2, "made for policy format 2"), (True, "must hold int, found True")],
)
def test_another_format_is_refused(version, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig.from_dict({**POLICY, "format_version": version})
