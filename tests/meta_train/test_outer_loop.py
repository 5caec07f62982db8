"""Runs: that they learn, resume to the bit, survive what happens to them, and say what is wrong."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from helpers import ROOT
from helpers.small_tasks import Quadratic, regression
from learned_optim import LearnedOptimizer, Policy
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.checkpoint import RunFolder, read_metrics
from learned_optim.meta_train.validation import validate
from learned_optim.tasks import get_families


def settings(**changes):
    base = {"outer_steps": 6, "meta_batch": 2, "max_length": 12, "unroll_length": 5, "validate_every": 2,
            "save_every": 2, "inner_lr": 1e-2, "seed": 1, "parts": ("tensor_head", "gates", "amplitude")}  # fmt: skip
    return MetaTrainConfig(**{**base, **changes})


def train(config, out=None, **options):
    return meta_train(config, tasks=[regression(), Quadratic()], out=out, show_progress=False, **options)


def final_bytes(folder):
    return (folder / "final" / "model.safetensors").read_bytes()


KINDS = {
    "es": {"estimator": "es"},
    "guided": {"estimator": "guided", "guides": 3},
    "pes": {"estimator": "pes"},
    "backprop": {"estimator": "backprop"},
    "imitation": {"estimator": "imitation"},
    "init": {"estimator": "backprop", "learn": "both", "meta_optimizer": "SGD"},
    "learned": {"estimator": "backprop", "meta_optimizer": "LearnedOptimizer"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_bytes_of_an_undisturbed_one(kind, tmp_path):
    tasks = [regression()]
    full, part = settings(**KINDS[kind]), settings(**KINDS[kind], outer_steps=4)
    meta_train(full, tasks=tasks, out=tmp_path / "whole", show_progress=False)
    meta_train(part, tasks=tasks, out=tmp_path / "parts", show_progress=False)
    meta_train(full, tasks=tasks, out=tmp_path / "parts", resume=True, show_progress=False)
    assert final_bytes(tmp_path / "whole") == final_bytes(tmp_path / "parts")
    assert [m["meta_loss"] for m in read_metrics(tmp_path / "whole")] == [
        m["meta_loss"] for m in read_metrics(tmp_path / "parts")
    ]


def run_in_child(config, out):
    """A forked child that resumes the run in ``out``; its process id."""
    child = os.fork()
    if child == 0:
        try:
            train(config, out, resume=True)
            os._exit(0)
        finally:
            os._exit(1)
    return child


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_twenty_sigkills_at_random_moments_change_nothing(tmp_path):
    config = settings(outer_steps=12, save_every=1, validate_every=4)
    train(config, tmp_path / "undisturbed")
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        child = run_in_child(config, tmp_path / "killed")
        time.sleep(rng.uniform(0.0, 0.6))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            path = tmp_path / "killed" / name
            if path.exists():
                torch.load(path, weights_only=True)  # whole, whenever it is looked at
        if os.WIFEXITED(status) and kills < 20:  # it was faster than we: once more from the beginning
            assert os.WEXITSTATUS(status) == 0
            assert final_bytes(tmp_path / "undisturbed") == final_bytes(tmp_path / "killed")
            shutil.rmtree(tmp_path / "killed")
    _, status = os.waitpid(run_in_child(config, tmp_path / "killed"), 0)
    assert os.WEXITSTATUS(status) == 0
    assert final_bytes(tmp_path / "undisturbed") == final_bytes(tmp_path / "killed")
    assert [m["outer_step"] for m in read_metrics(tmp_path / "killed")] == list(range(12))


def test_meta_training_improves_on_the_start():
    config = settings(outer_steps=25, meta_batch=6, estimator="backprop", unroll_length=12, meta_lr=0.05,
                      parts=("tensor_head",), second_order=True, validate_every=5)  # fmt: skip
    result = meta_train(config, tasks=[Quadratic()], show_progress=False)
    values = [m["validation"] for m in result.history if "validation" in m]
    assert min(values) < -0.1


def test_the_best_policy_is_kept_and_loads_in_the_optimizer(tmp_path):
    result = train(settings(), tmp_path)
    values = [m["validation"] for m in result.history if "validation" in m]
    optimizer = LearnedOptimizer([torch.zeros(3, requires_grad=True)], policy=str(tmp_path / "best"))
    assert optimizer.policy.fingerprint() == result.policy.fingerprint()
    if min(values) >= 0:
        assert result.policy.fingerprint() == Policy().fingerprint()
    results = json.loads((tmp_path / "best" / "results.json").read_text())
    assert results["training"]["outer_steps"] == 6


def test_a_policy_is_fine_tuned_from_a_folder(tmp_path):
    first = train(settings(), tmp_path / "first")
    second = train(settings(start=str(tmp_path / "first" / "final"), meta_lr=0.0), tmp_path / "second")
    assert second.last.fingerprint() == first.last.fingerprint()


def test_what_is_learned_where_nothing_is_said_depends_on_the_estimator():
    everything = ("pace", "age", "decay", "tensor_head", "gates", "amplitude", "gru")
    es, backprop = (settings(parts=(), estimator=estimator) for estimator in ("es", "backprop"))
    assert es.with_parts(is_mixture=True).parts == ("pace", "step_size")
    assert es.with_parts(is_mixture=False).parts == everything
    assert backprop.with_parts(is_mixture=True).parts == everything
    last = train(settings(parts=())).last
    assert last.head[0].abs().max() > 0
    assert last.head[1:].abs().max() == 0
    assert last.pace.abs().max() > 0


def test_only_the_named_parts_are_learned():
    result = train(settings(parts=("amplitude",)))
    moved = {n for n, w in result.last.weights().items() if float(w.detach().abs().max()) > 0}
    assert moved == {"amplitude"}


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path):
    train(settings(), tmp_path)
    before = final_bytes(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(settings(seed=2), tmp_path)
    assert final_bytes(tmp_path) == before


@pytest.mark.parametrize("left", ["checkpoint.pt", "metrics.jsonl"])
def test_what_is_left_of_a_run_is_refused_without_resume_too(left, tmp_path):
    train(settings(outer_steps=2), tmp_path / "whole")
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole" / left, tmp_path / "part")
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(settings(outer_steps=2), tmp_path / "part")


def test_a_checkpoint_of_other_settings_is_refused_and_they_are_named(tmp_path):
    train(settings(), tmp_path)
    with pytest.raises(ValueError, match=r"sigma: 0.1 -> 0.2"):
        train(settings(sigma=0.2), tmp_path, resume=True)


def test_a_checkpoint_of_other_tasks_is_refused_before_a_step_is_made(tmp_path):
    train(settings(outer_steps=2), tmp_path)
    others = [regression(), tiny := Quadratic()]
    tiny.name = "another"
    with pytest.raises(ValueError, match=r"began with the validation tasks \[.*\], found \['another', .*same tasks"):
        meta_train(settings(), tasks=others, out=tmp_path, resume=True, show_progress=False)
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("name", ["Adom", "LBFGS", "SparseAdam", "Optimizer", "Tensor"])
def test_a_meta_optimizer_that_cannot_be_is_refused_before_tasks_are_tried(name, tmp_path, monkeypatch):
    monkeypatch.setattr("learned_optim.meta_train.preflight.check_tasks", None)
    with pytest.raises(ValueError, match=f"unknown meta_optimizer '{name}'; known are .*Adam.*LearnedOptimizer"):
        train(settings(meta_optimizer=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    train(settings(outer_steps=2), tmp_path)
    path = tmp_path / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["format"] -= 1
    saved["config"]["a_setting_of_that_version"] = True
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"another version.*start again in another folder, from .*best"):
        train(settings(outer_steps=2), tmp_path, resume=True)


def test_metrics_are_read_up_to_what_is_damaged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"outer_step": 0}\n{"outer_step": 1, "a\xff\n[1]\n{}x}\n{"outer_step": 2}\n{"outer')
    assert [m["outer_step"] for m in read_metrics(tmp_path)] == [0, 2]
    path.write_bytes(b"")
    assert read_metrics(tmp_path) == []
    path.write_bytes(b"\x00\x01garbage\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: none of its lines can be read"):
        read_metrics(tmp_path)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    folder = RunFolder(tmp_path, resume=False)
    with pytest.raises(BlockingIOError, match="another process"):
        RunFolder(tmp_path, resume=True)
    folder.close()
    RunFolder(tmp_path, resume=True).close()


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path):
    train(settings(), tmp_path)
    whole = final_bytes(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(RuntimeWarning, match="damaged; continuing from"):
        train(settings(), tmp_path, resume=True)
    assert final_bytes(tmp_path) == whole


def test_no_readable_checkpoint_is_an_error_that_changes_nothing(tmp_path):
    train(settings(), tmp_path)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        train(settings(), tmp_path, resume=True)


def test_an_unwritable_folder_is_said_before_work_begins(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="file"):
        train(settings(), file / "run")


class Failing(Quadratic):
    name = "failing"

    def __init__(self):
        super().__init__()
        self.calls = 0

    def loss(self, params, buffers, batch):
        self.calls += 1
        if self.calls > 30:
            raise ArithmeticError("no more")
        return super().loss(params, buffers, batch)


def test_a_task_that_raises_is_named():
    with pytest.raises(RuntimeError, match=r"task 'failing' raised at outer step \d+: ArithmeticError: no more"):
        meta_train(settings(validate_every=0), tasks=[Failing()], show_progress=False)


def test_the_others_go_on_if_asked():
    result = meta_train(
        settings(validate_every=0, keep_going=True), tasks=[Failing(), Quadratic()], show_progress=False
    )
    assert result.history[-1]["failures"]["failing"] > 0
    errors = [m["errors"]["failing"] for m in result.history if "errors" in m]
    assert set(errors) == {"ArithmeticError: no more"}
    assert len(result.history) == 6


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda self, p, b, x: p["w"], "scalar"),
        (lambda self, p, b, x: p["w"].sum() * float("nan"), "nan|NaN|finite"),
        (lambda self, p, b, x: torch.zeros((), requires_grad=True) + 1, "param"),
    ],
)
def test_an_unsound_task_is_named_before_the_run_starts(loss, message, tmp_path):
    unsound = type("Unsound", (Quadratic,), {"loss": loss, "name": "unsound"})()
    with pytest.raises((ValueError, TypeError), match=f"(?s)unsound.*({message})"):
        meta_train(settings(), tasks=[unsound], out=tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_early_stopping_ends_a_run_that_does_not_improve():
    result = train(settings(outer_steps=50, meta_lr=0.0, patience=2))
    assert len(result.history) == 4


def test_a_run_that_lost_patience_is_over_when_resumed_and_goes_on_with_more_of_it(tmp_path):
    impatient = settings(outer_steps=50, meta_lr=0.0, patience=2)
    ends = [len(train(impatient, out=tmp_path, resume=resume).history) for resume in (False, True, True)]
    more = train(settings(outer_steps=50, meta_lr=0.0, patience=4), out=tmp_path, resume=True)
    assert (ends, len(more.history)) == ([4, 4, 4], 8)


@pytest.mark.parametrize("path", sorted((ROOT / "pretrained" / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_the_recipes_name_what_there_is(path):
    config = MetaTrainConfig.from_file(path)
    for name in (*config.tasks, *config.validation_tasks):
        assert get_families(name)
    assert all(family.split == "train" for family in get_families(config.tasks))


def test_settings_go_through_toml_and_json(tmp_path):
    config = settings(tasks=("a", "b"), estimator="pes", sigma=0.25)
    (tmp_path / "a.toml").write_text(config.to_toml())
    (tmp_path / "a.json").write_text(json.dumps(config.to_dict()))
    assert MetaTrainConfig.from_file(tmp_path / "a.toml") == config
    assert MetaTrainConfig.from_file(tmp_path / "a.json") == config
    (tmp_path / "b.toml").write_text("sigmoid = 1.0\n")
    with pytest.raises(ValueError, match=r"b.toml: unknown settings \['sigmoid'\]"):
        MetaTrainConfig.from_file(tmp_path / "b.toml")
    with pytest.raises(ValueError, match="sigma must be positive"):
        settings(sigma=0.0)


def test_the_last_policy_is_the_result_where_the_run_ended_before_any_validation(tmp_path) -> None:
    config = settings(estimator="es", outer_steps=2, validate_every=5)
    result = meta_train(config, tasks=[regression()], out=tmp_path / "run", show_progress=False)
    assert result.policy.fingerprint() == result.last.fingerprint()
    assert result.policy.fingerprint() != Policy().fingerprint()
    assert Policy.from_pretrained(tmp_path / "run" / "best").fingerprint() == result.last.fingerprint()


@pytest.mark.parametrize(("seeds", "families", "runs"), [(0, 1, 8), (0, 3, 9), (0, 20, 20), (2, 3, 6)])
def test_validation_makes_eight_runs_where_nothing_else_was_asked_for(seeds, families, runs):
    config = settings(estimator="es", validation_seeds=seeds, validation_length=2)
    tasks = [regression() for _ in range(families)]
    for i, task in enumerate(tasks):
        task.name = f"task {i}"
    assert len(validate(Policy(), tasks, config, "eager")) == runs
