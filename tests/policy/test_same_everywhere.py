"""A policy is the same rule whatever torch's defaults are, and however its numbers are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.policy.resolve import bundled


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another default dtype or device."""
    if isinstance(request.param, str):
        with torch.device(request.param):
            yield
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(request.param)
        yield
        torch.set_default_dtype(before)


PRINTS = {name: Policy.from_pretrained(name).fingerprint() for name in bundled()}
PARAM, GRAD = torch.linspace(-1.0, 1.0, 20).view(4, 5), torch.linspace(0.5, 1.0, 20).view(4, 5)


def moved(steps: int = 3) -> torch.Tensor:
    p = PARAM.clone().requires_grad_()
    optimizer = LearnedOptimizer([p], backend="eager")
    for _ in range(steps):
        p.grad = GRAD.clone()
        optimizer.step()
    return p.detach()


MOVED = moved()


def test_torchs_defaults_change_neither_weights_nor_steps(defaults: None, tmp_path: Path) -> None:
    for name, known in PRINTS.items():
        policy = Policy.from_pretrained(name)
        assert policy.fingerprint() == known
        policy.save_pretrained(tmp_path / name)
        assert Policy.from_pretrained(tmp_path / name).fingerprint() == known
    assert torch.equal(moved(), MOVED)


@pytest.mark.parametrize(
    "given", [{"caution": 0}, {"eps": 0}, {"windows": [4, 16]}, {"betas": [0.9, 0.99]}, {"features": ["abs_b", "u_b"]}]
)
def test_what_is_saved_has_the_fingerprint_of_what_was_made(given: dict[str, Any], tmp_path: Path) -> None:
    policy = Policy(PolicyConfig(**given))
    policy.save_pretrained(tmp_path)
    loaded = Policy.from_pretrained(tmp_path)
    assert (loaded.config, loaded.fingerprint()) == (policy.config, policy.fingerprint())


@pytest.mark.parametrize("given", [{"hidden_size": 4.0}, {"orthogonal_block": True}, {"windows": 4.0}, {"eps": "1"}])
def test_a_configuration_that_could_not_be_loaded_is_not_made(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        PolicyConfig(**given)
