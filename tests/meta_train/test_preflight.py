"""A start that fails says why before anything is run, and leaves a folder in which the same command works."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from helpers.small_runs import settings
from helpers.small_tasks import Quadratic, regression
from learned_optim import Policy
from learned_optim.bench.baselines import Setting
from learned_optim.bench.runs import RunSpec
from learned_optim.bench.runs import train as bench_train
from learned_optim.meta_train import MetaTrainConfig, meta_train, preflight
from learned_optim.tasks import ModuleTask, TaskFamily, get_families
from learned_optim.tasks.augment import AccumulatedGradients
from learned_optim.tasks.base import batches_of
from learned_optim.tasks.rollout import train


class Few(Quadratic):
    """Its batches end."""

    name = "few"

    def batches(self, rng: torch.Generator) -> Iterator[torch.Tensor]:
        for batch, _ in zip(super().batches(rng), range(4), strict=False):
            yield batch


ENDED = r"batches\(\) of task 'few' ended after 4 batches; it must yield for ever"


@pytest.mark.parametrize(
    "config",
    [
        {"validate_every": 0},
        {"validate_every": 1},
        {"validate_every": 0, "pairs": 2},
        {"validate_every": 0, "estimator": "backprop", "unroll_length": 3},
    ],
)
def test_batches_that_end_are_named_in_meta_training(config):
    with pytest.raises((ValueError, RuntimeError), match=ENDED):
        meta_train(settings(max_length=9, **config), tasks=[Few()], show_progress=False)


@pytest.mark.parametrize("run", [
    lambda: train(Few(), 0, torch.optim.SGD, 5),
    lambda: train(AccumulatedGradients(Few(), 2), 0, torch.optim.SGD, 5),
    lambda: bench_train(RunSpec(Few(), 20, 0, Setting("sgd", 1e-3), None, 1, "", 1.0)),
])  # fmt: skip
def test_batches_that_end_are_named_everywhere_else(run):
    with pytest.raises(ValueError, match=ENDED):
        run()


def test_batches_from_a_number_on_are_those_that_are_left():
    rest = batches_of(Quadratic(), torch.Generator().manual_seed(3), skip=2)
    whole = Quadratic().batches(torch.Generator().manual_seed(3))
    next(whole), next(whole)
    assert all(torch.equal(next(rest), next(whole)) for _ in range(3))


def test_two_tasks_of_one_name_are_refused_since_one_would_not_count(tmp_path):
    one, other = regression(name="mine"), regression(name="mine")
    for tasks, validation in (([one, other], [one]), ([one], [one, other])):
        with pytest.raises(ValueError, match="are called 'mine': give each a name of its own"):
            meta_train(settings(), tasks=tasks, validation=validation, out=tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()
    meta_train(settings(validate_every=1, outer_steps=1), tasks=[one, one], show_progress=False)  # weighs twice


def test_what_is_no_task_is_refused():
    with pytest.raises(ValueError, match="no task to train on"):
        meta_train(settings(), tasks=[], show_progress=False)
    with pytest.raises(ValueError, match="no task to validate on"):
        meta_train(settings(validate_every=1), tasks=[regression()], validation=[], show_progress=False)
    with pytest.raises(TypeError, match="train on, found str 'tiny_mlp'"):
        meta_train(settings(), tasks=["tiny_mlp"], show_progress=False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", [
    {"outer_steps": 2.5}, {"meta_batch": True}, {"seed": "a"}, {"second_order": "no"}, {"tasks": "train"},
])  # fmt: skip
def test_settings_of_another_type_are_refused(wrong):
    with pytest.raises(ValueError, match=f"MetaTrainConfig.{next(iter(wrong))} must be"):
        MetaTrainConfig(**wrong)


class Branching(nn.Module):
    """Looks at values, which a batch of runs does not have."""

    def forward(self, x):
        return x if float(x.detach().sum()) > 0.0 else -x


def with_layer(layer) -> ModuleTask:
    return regression(module=lambda: nn.Sequential(nn.Linear(5, 8), layer(), nn.Linear(8, 1)), name="mine")


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (lambda: nn.BatchNorm1d(8, momentum=None), r"layer '1', BatchNorm1d\(8, .*momentum=None.*\)"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), r"layer '1\.\S+', _SpectralNorm\(\)"),
        (Branching, r"layer '1', Branching\(\)"),
    ],
)
def test_a_layer_that_cannot_be_vectorized_is_named_before_the_run(layer, named, tmp_path):
    task, config = with_layer(layer), settings(pairs=2, outer_steps=1, validate_every=0)
    family = TaskFamily("mine", "of a user", "train", lambda rng: with_layer(layer))
    for tasks in ([Quadratic(), task], [family]):
        with pytest.raises(ValueError, match=f"task 'mine.*' cannot be vectorized .* its {named}: take pairs=1"):
            meta_train(config, tasks=tasks, out=tmp_path / "run", show_progress=False)
        assert not (tmp_path / "run").exists()
    meta_train(settings(outer_steps=1, validate_every=0), tasks=[task], out=tmp_path / "run", show_progress=False)


def test_the_function_around_the_layers_may_be_what_cannot_be_vectorized():
    def loss(self, params, buffers, batch):
        return params["w"].square().sum() * (1.0 if params["w"].sum().item() > 0 else 2.0)

    task = type("Mine", (Quadratic,), {"loss": loss, "name": "mine"})()
    with pytest.raises(ValueError, match="'mine' cannot be vectorized because of something outside of its layers"):
        meta_train(settings(pairs=2, outer_steps=1, validate_every=0), tasks=[task], show_progress=False)


def test_a_task_that_can_be_vectorized_or_has_batches_of_several_shapes_is_let_through():
    class Shrinking(Quadratic):
        def batches(self, rng):
            for step, batch in enumerate(super().batches(rng)):
                yield batch if step % 2 else batch[:1]

    preflight.check_vectorized(settings(pairs=2, held_out_share=0.5), regression(), Policy())
    preflight.check_vectorized(settings(pairs=2), Shrinking(), Policy())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match=r"device 'cuda' cannot be used: .*; take device 'cpu'"):
        meta_train(settings(device="cuda"), tasks=[Quadratic()], out=tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tasks", [("table_regression", "tiny_mlp"), ("tiny_mlp",)])
def test_a_module_that_is_not_installed_is_found_out_first(tasks, tmp_path, monkeypatch):
    from learned_optim.tasks import data_optional

    data_optional.table.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    config = settings(tasks=tasks, validation_tasks=("table_classification",), outer_steps=1, validation_length=5)
    with pytest.raises(ImportError, match=r"task 'table_\w+' cannot be used: this task needs sklearn.datasets: pip"):
        meta_train(config, out=tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    meta_train(config, out=tmp_path / "run", show_progress=False)


def test_an_unsound_task_of_a_family_is_found_out_first(tmp_path):
    unsound = type("Unsound", (Quadratic,), {"loss": lambda self, p, b, x: p["w"]})
    family = TaskFamily("mine", "of a user", "train", lambda rng: unsound())
    with pytest.raises(TypeError, match="task 'mine/0': loss must return a scalar"):
        meta_train(settings(), tasks=[family], out=tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_a_task_that_raises_in_validation_is_named():
    class Failing(Quadratic):
        calls = 0

        def loss(self, params, buffers, batch):
            self.calls += 1
            return super().loss(params, buffers, batch) * (1 / (self.calls < 5))

    with pytest.raises(RuntimeError, match="task 'quadratic' raised in validation: ZeroDivisionError"):
        meta_train(settings(), tasks=[Failing()], show_progress=False)


def test_a_run_that_fails_in_its_first_outer_step_does_not_block_its_folder(tmp_path):
    class Failing(Quadratic):
        calls = 0

        def loss(self, params, buffers, batch):
            self.calls += 1
            if self.calls == 5:
                raise ArithmeticError
            return super().loss(params, buffers, batch)

    config, tasks = settings(validate_every=0), [Failing()]
    with pytest.raises(RuntimeError, match="raised at outer step 0"):
        meta_train(config, tasks=tasks, out=tmp_path, show_progress=False)
    meta_train(config, tasks=tasks, out=tmp_path, show_progress=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("estimator", ["es", "backprop"])
def test_gradients_are_enabled_inside(mode, estimator):
    def run(start):
        config = settings(outer_steps=1, estimator=estimator, unroll_length=3)
        return meta_train(config, tasks=tasks, start=start, show_progress=False).last

    tasks = [regression(), Quadratic()]
    expected = run(Policy()).fingerprint()
    with mode():
        last = run(Policy())
        assert not torch.is_grad_enabled()
    assert last.fingerprint() == expected
    assert not any(w.is_inference() for w in last.weights().values())


def test_a_task_made_in_inference_mode_is_refused_in_words():
    with torch.inference_mode():
        task = Quadratic()
    with pytest.raises(ValueError, match=r"task 'quadratic' holds tensors that were made in torch.inference_mode"):
        meta_train(settings(outer_steps=1), tasks=[task], show_progress=False)


def test_the_zoo_is_looked_up_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="unknown task family 'nope'"):
        meta_train(settings(tasks=("nope",)), out=tmp_path / "run", show_progress=False)
    with pytest.raises(ValueError, match="unknown policy 'nope'"):
        meta_train(settings(tasks=("tiny_mlp",), start="nope"), out=tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()
    assert get_families("tiny_mlp")
