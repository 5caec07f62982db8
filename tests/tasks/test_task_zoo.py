"""Every family of the zoo: deterministic, trainable, and of the sizes it promises."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import learned_optim.tasks as tasks
from learned_optim.tasks import FAMILIES, Task, check_task, get_families, to_device
from learned_optim.tasks.base import batch_tensors
from learned_optim.tasks.data_text import TRAIN_MODULES, VALIDATION_MODULES, characters, text, words

EVERY_FAMILY = pytest.mark.parametrize("name", sorted(FAMILIES))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@EVERY_FAMILY
def test_same_seed_gives_same_task_whatever_the_global_random_state(name):
    runs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        task = FAMILIES[name].task(4)
        params, buffers = task.init(seeded(0))
        batches = task.batches(seeded(1))
        tensors = [*params.values(), *buffers.values(), *batch_tensors(next(batches)), *batch_tensors(next(batches))]
        tensors.append(task.loss(params, buffers, next(batches)))
        assert torch.equal(before, torch.get_rng_state())
        runs.append((list(params), task.length, task.name, tensors))
    assert runs[0][:3] == runs[1][:3]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][3], runs[1][3], strict=True))


@EVERY_FAMILY
def test_check_passes_and_sizes_are_as_promised(name):
    family = FAMILIES[name]
    for seed in range(2):
        task = family.task(seed)
        assert isinstance(task, Task)
        check_task(task)
        assert callable(getattr(task, "eval_loss", None))
        numel = sum(p.numel() for p in task.init(seeded(0))[0].values())
        low, high, most = (50, 1_500_000, 800) if family.split == "train" else (10_000, 1_500_000, 2000)
        most = 1500 if name in ("mlp_sparse_long", "mlp_tiny_batches") else most  # cheap steps, or the point of it
        assert low <= numel <= high
        assert 200 <= task.length <= most


# In the others a batch is noise, and fitting it does harm; or, in val_fitted_q, what is reported is the error
# against the true values, which rises before it falls.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"pure_noise", "noise_after_convergence", "val_fitted_q"}))
def test_adamw_reduces_the_loss(name):
    task = FAMILIES[name].task(0)
    params, buffers = task.init(seeded(0))
    for p in params.values():
        p.requires_grad_()
    fixed = next(task.batches(seeded(7)))
    optimizer = torch.optim.AdamW(list(params.values()), lr=3e-3, fused=True)
    losses = []
    for _ in range(15):  # one batch again and again: any task must be able to fit it better than at the start
        loss = task.loss(params, buffers, fixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert float(losses[-1]) < float(losses[0])


@EVERY_FAMILY
def test_loss_can_be_differentiated_twice(name):
    task = FAMILIES[name].task(1)
    params, buffers = task.init(seeded(0))
    inputs = [p.requires_grad_() for p in params.values()]
    loss = task.loss(params, buffers, next(task.batches(seeded(1))))
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    torch.stack([g.square().sum() for g in grads]).sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in inputs)


@EVERY_FAMILY
def test_losses_are_computed_where_the_arguments_are(name):
    task = FAMILIES[name].task(0)
    params, buffers = task.init(seeded(0))
    away = [to_device(t, "meta") for t in (params, buffers, next(task.batches(seeded(1))))]
    assert task.loss(*away).device.type == "meta"
    evaluate = task.eval_loss  # type: ignore[attr-defined]
    assert evaluate(*away[:2]).device.type == "meta"
    assert evaluate(params, buffers).device.type == "cpu"


@pytest.mark.parametrize("name", ["resnet_images", "val_resnet_photos"])
def test_batchnorm_buffers_move(name):
    for seed in range(10):
        task = FAMILIES[name].task(seed)
        params, buffers = task.init(seeded(0))
        means = [k for k in buffers if k.endswith("running_mean")]
        if means:
            start = {k: buffers[k].clone() for k in means}
            task.loss(params, buffers, next(task.batches(seeded(1))))
            assert all(not torch.equal(start[k], buffers[k]) for k in means)
            return
    pytest.fail(f"no task of {name} has BatchNorm")


@pytest.mark.parametrize("name", ["lstm_word_tied", "val_lstm_word_tied"])
def test_tied_embeddings_are_one_parameter(name):
    params, _ = FAMILIES[name].task(0).init(seeded(0))
    assert "embed.weight" in params
    assert "output.weight" not in params


@EVERY_FAMILY
def test_tasks_of_a_family_differ(name):
    def signature(seed: int):
        task = FAMILIES[name].task(seed)
        return task.length, tuple(p.shape for p in task.init(seeded(0))[0].values())

    assert len({signature(seed) for seed in range(4)}) > 1


def test_the_zoo_is_broad():
    train, validation = get_families("train"), get_families("validation")
    assert len(train) >= 12
    assert len(validation) >= 8
    assert len(train) + len(validation) == len(FAMILIES) == len(get_families("all"))
    assert all(FAMILIES[f.name] is f and f.description and "\n" not in f.description for f in train + validation)


def test_get_families_takes_names_and_tags_and_keeps_the_order():
    chosen = get_families(["val_vit_letters", "mlp_images", "train"])
    assert [f.name for f in chosen[:2]] == ["val_vit_letters", "mlp_images"]
    assert len(chosen) == 1 + len(get_families("train"))
    assert [f.name for f in get_families("gru_char")] == ["gru_char"]


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match="'mlp_imagse'; did you mean 'mlp_images'"):
        get_families("mlp_imagse")
    with pytest.raises(ValueError, match="did you mean 'validation'"):
        get_families(["train", "valdation"])
    with pytest.raises(ValueError, match=r"(?s)known names:.*val_vit_letters"):
        get_families("????")


def test_training_and_validation_text_share_no_module():
    assert not set(TRAIN_MODULES) & set(VALIDATION_MODULES)
    train_lines = {line for line in text("train").splitlines() if len(line) > 60}
    shared = [line for line in text("validation").splitlines() if len(line) > 60 and line in train_lines]
    assert len(shared) < 20  # standard phrases such as licence headers


def test_held_out_text_is_a_tenth_and_words_are_the_frequent_ones():
    training, held_out = characters("train", False), characters("train", True)
    assert 0.08 < len(held_out) / (len(training) + len(held_out)) < 0.12
    assert int(training.max()) < 96
    tokens = words("train", False, 500)
    assert int(tokens.max()) == 499
    assert float((tokens == 0).float().mean()) < 0.3
    with pytest.raises(ValueError, match="'train' or 'validation'"):
        text("test")


def test_photo_patches_of_the_two_parts_share_no_pixel():
    from learned_optim.tasks.data_optional import photo_patches, photographs

    # Colour every held-out cell by asking for its patches: none may equal a training patch of the same place.
    assert photographs().shape == (2, 3, 427, 640)
    train, _ = photo_patches(seeded(0), 200, 64, "place", held_out=False)  # size 64: whole cells, unscaled
    unseen, _ = photo_patches(seeded(0), 200, 64, "place", held_out=True)
    cells = {t.numpy().tobytes() for t in train}
    assert not any(t.numpy().tobytes() in cells for t in unseen)


def test_no_standard_benchmark_is_used_as_data():
    words = ("load_digits", "mnist", "cifar", "shakespeare", "treebank", "ptb", "wikitext", "california", "fetch_")
    for path in Path(tasks.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8").lower()
        assert not [word for word in words if word in source], path


def test_importing_loads_no_data_and_no_optional_library():
    code = (
        "import sys, learned_optim.tasks as t; t.get_families('all');"
        "assert not {'sklearn', 'matplotlib', 'PIL', 'pydoc_data'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(tasks.__file__).parents[2])


def test_a_missing_extra_says_what_to_install(monkeypatch):
    from learned_optim.tasks import data_optional

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[tasks\]"'):
        data_optional.optional_import("sklearn.datasets")


def test_held_out_examples_are_not_trained_on():
    task = FAMILIES["mlp_sparse_images"].task(2)
    held_out = {row.numpy().tobytes() for row in task._eval_source()[0]}  # type: ignore[attr-defined]
    batches = task.batches(seeded(0))
    assert len(held_out) > 50
    assert not any(row.numpy().tobytes() in held_out for _ in range(20) for row in next(batches)[0])
