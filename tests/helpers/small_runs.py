"""A small meta-training run, and whether what it left in its folder is whole."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from helpers.small_tasks import Quadratic, regression
from learned_optim import Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.checkpoint import CURRENT, PREVIOUS
from learned_optim.policy.errors import PolicyError


def settings(**changes) -> MetaTrainConfig:
    base = {"outer_steps": 6, "meta_batch": 2, "max_length": 6, "validate_every": 3, "save_every": 2,
            "inner_lr": 1e-2, "seed": 1, "parts": ("tensor_head", "gates", "amplitude")}  # fmt: skip
    return MetaTrainConfig(**{**base, **changes})


def train(config, out=None, **options):
    return meta_train(config, tasks=[regression(), Quadratic()], out=out, show_progress=False, **options)


def final_bytes(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


def assert_whole(folder: Path) -> None:
    """Every file in the run's folder is whole, or refused when it is read; what is being written has another name."""
    for name in (CURRENT, PREVIOUS):
        if (folder / name).exists():
            assert torch.load(folder / name, weights_only=True)["outer_step"] > 0
    for name in ("best", "final"):
        # Interrupted between two of its files an artefact is refused; loaded, it is the one before or the new one.
        if (folder / name).exists():
            with contextlib.suppress(PolicyError):
                Policy.from_pretrained(folder / name)
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n") if (folder / "metrics.jsonl").exists() else [b""]
    steps = [json.loads(line)["outer_step"] for line in lines[:-1]]  # the last one may be cut off
    assert steps == list(range(len(steps)))
