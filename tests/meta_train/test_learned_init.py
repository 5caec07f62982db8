"""Initial parameters that are learned: shared by the tasks of a family, validated, saved, and better."""

import math

import pytest
import torch

from helpers.small_tasks import Quadratic, regression
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.problem import FromInit
from learned_optim.meta_train.validation import validate


def settings(**changes):
    base = {"outer_steps": 30, "learn": "init", "estimator": "backprop", "second_order": True, "held_out_share": 1.0,
            "unroll_length": 5, "max_length": 5, "meta_loss": "final", "meta_lr": 0.05, "inner_lr": 1e-2,
            "meta_batch": 2, "validation_length": 5, "validate_every": 10, "save_every": 10}  # fmt: skip
    return MetaTrainConfig(**{**base, **changes})


def test_validation_sees_the_learned_parameters_and_the_best_are_kept(tmp_path):
    task = regression()
    result = meta_train(settings(), tasks=[task], out=tmp_path, show_progress=False)
    values = [m["validation"] for m in result.history if "validation" in m]
    assert min(values) < -0.2
    assert result.init is not None
    assert list(result.init) == list(task.init(torch.Generator())[0])
    assert (tmp_path / "best" / "init.safetensors").exists()
    outcomes = validate(result.policy, [task], settings(), "eager", result.init)
    assert math.exp(outcomes["regression/0"].held_out[-1]) == pytest.approx(
        float(held_out_after(result, task)), rel=1e-4
    )


def held_out_after(result, task):
    from learned_optim import LearnedOptimizer
    from learned_optim.meta_train.trajectories import seed_of
    from learned_optim.tasks.rollout import train

    return train(
        FromInit(task, result.init), seed_of("validation", 0),
        lambda p: LearnedOptimizer(p, lr=1e-2, policy=result.policy), 5, held_out=True,
    ).held_out  # fmt: skip


def test_the_policy_is_left_alone_where_only_initial_parameters_are_learned():
    result = meta_train(settings(outer_steps=2), tasks=[regression()], show_progress=False)
    assert all(float(w.detach().abs().max()) == 0 for w in result.last.weights().values())


def test_tasks_of_other_shapes_are_refused_by_name():
    with pytest.raises((ValueError, RuntimeError), match=r"task '\w+' has other parameters than those"):
        meta_train(settings(held_out_share=0.0), tasks=[regression(), Quadratic()], show_progress=False)
