"""Validation families of users' work: held-out data apart, nothing of training's, generators against references."""

from __future__ import annotations

import ast
import math
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

import learned_optim.tasks.families as families
from learned_optim.tasks import FAMILIES
from learned_optim.tasks.base import batch_tensors
from learned_optim.tasks.data_text import CHARACTERS
from learned_optim.tasks.families import (
    validation_changing,
    validation_control,
    validation_fine_tuning,
    validation_structures,
    validation_users,
)
from learned_optim.tasks.pretrained import pretrained_state
from learned_optim.tasks.rollout import train

MODULES = (
    validation_changing,
    validation_control,
    validation_fine_tuning,
    validation_structures,
    validation_users,
)
NAMES = [family.name for module in MODULES for family in module.FAMILIES]
SHARED = {"base", "sampling", "nets", "objectives", "pretrained", "data_images", "data_optional", "data_text"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def modules_imported(path: Path) -> set[str]:
    """Modules of ours that a file of ``families`` imports, by the last part of their names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            ours = node.level or (node.module or "").startswith("learned_optim")
            last = (node.module or "").rpartition(".")[2]
            found |= ({a.name for a in node.names} if last in ("", "families", "tasks") else {last}) if ours else set()
        elif isinstance(node, ast.Import):
            found |= {a.name.rpartition(".")[2] for a in node.names if a.name.startswith("learned_optim")}
    return found


def rows(tensor: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in tensor}


def test_there_are_nine_and_all_are_for_validation():
    assert len(set(NAMES)) == 9
    assert all(FAMILIES[name].split == "validation" and name.startswith("val_") for name in NAMES)


def test_validation_imports_no_other_family_and_no_other_family_imports_it():
    here = {path.stem: modules_imported(path) for path in Path(families.__file__).parent.glob("*.py")}
    ours = {module.__name__.rpartition(".")[2] for module in MODULES}
    assert ours <= here.keys()
    assert {name: here[name] - SHARED for name in ours if here[name] - SHARED} == {}
    assert {name: here[name] & ours for name in here.keys() - ours if here[name] & ours} == {}


def test_the_check_of_imports_sees_them(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text("from .vision import f\nfrom . import graphs\nimport learned_optim.tasks.families.noise\n")
    assert modules_imported(path) == {"vision", "graphs", "noise"}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("val_fine_tuning_text", "val_seq2seq")])
def test_held_out_examples_are_not_trained_on(name, seed):
    def inputs(batch) -> set[bytes]:
        tensors = batch[:2] if name == "val_graph" else batch[:1]
        return rows(torch.cat([t.flatten(1).float() for t in tensors], 1))

    task = FAMILIES[name].task(seed)
    unseen = inputs(task._eval_source())  # type: ignore[attr-defined]
    assert len(unseen) > 100
    assert not any(inputs(batch) & unseen for batch in islice(task.batches(seeded(0)), 60))


def letters_of(token_rows: torch.Tensor) -> set[str]:
    return {"".join(CHARACTERS[i] for i in row) for row in token_rows.tolist()}


def test_held_out_code_is_not_in_the_training_code_nor_in_what_was_read_before():
    task = FAMILIES["val_fine_tuning_text"].task(0)
    seen = "\n".join(letters_of(torch.cat([tokens for (tokens,) in islice(task.batches(seeded(0)), 400)])))
    unseen = letters_of(task._eval_source()[0])  # type: ignore[attr-defined]
    before = validation_fine_tuning.characters("validation", held_out=False)
    documentation = "".join(CHARACTERS[i] for i in before.tolist())
    assert sum(window in seen or window in documentation for window in unseen) <= len(unseen) / 50


def test_held_out_expressions_differ_from_those_trained_on_by_more_than_names():
    def renumbered(row: list[int]) -> tuple[int, ...]:
        names = [validation_structures.VOCABULARY[name] for name in validation_structures.NAMES]
        order = {token: i for i, token in enumerate(t for t in dict.fromkeys(row) if t in names)}
        return tuple(names[order[t]] if t in order else t for t in row if t != 0)

    for seed in range(3):
        task = FAMILIES["val_seq2seq"].task(seed)
        unseen = {renumbered(row) for row in task._eval_source()[0].tolist()}  # type: ignore[attr-defined]
        batches = islice(task.batches(seeded(0)), 200)
        assert not any(renumbered(row) in unseen for source, _ in batches for row in source.tolist())


@pytest.mark.parametrize("name", ["val_fine_tuning_images", "val_fine_tuning_text"])
def test_runs_begin_with_what_was_learned_before_except_the_head(name):
    task = FAMILIES[name].task(0)
    first, second = task.init(seeded(0))[0], task.init(seeded(1))[0]
    unlike = {key for key in first if not torch.equal(first[key], second[key])}
    assert unlike == ({"head.weight", "head.bias"} if name.endswith("images") else set())


def test_pre_training_taught_something():
    state = pretrained_state(validation_fine_tuning.image_recipe(32, 16, 5))
    network = validation_fine_tuning.DenselyConnected(32, 16, 5, 52)
    network.load_state_dict(state)
    images, labels = next(validation_fine_tuning.image_recipe(32, 16, 5).make_task().batches(seeded(5)))
    with torch.no_grad():
        assert float((network(images).argmax(1) == labels).float().mean()) > 0.7
    task = FAMILIES["val_fine_tuning_text"].task(0)
    params, buffers = task.init(seeded(0))
    assert float(task.loss(params, buffers, next(task.batches(seeded(0))))) < 0.75 * math.log(len(CHARACTERS))


def test_held_out_loss_of_fine_tuning_is_lowest_before_the_end():
    task = FAMILIES["val_fine_tuning_text"].task(0)
    length = task.length
    curve = train(
        task, 0, lambda p: torch.optim.AdamW(p, lr=3e-3), length, evaluate_at=[length // 10, length // 4, length]
    )
    assert min(curve.held_out_along[:2]) < 0.95 * curve.held_out_along[2]


def test_language_model_does_not_see_the_future():
    model = validation_fine_tuning.RotaryLM(97, 32, 2, 4)
    tokens = torch.randint(97, (2, 12), generator=seeded(0))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 97
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_rotated_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 8, generator=seeded(0))
    angle = torch.arange(20)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    queries, keys = (validation_fine_tuning.rotate(t.expand(20, 8), angle.cos(), angle.sin()) for t in (q, k))
    scores = queries @ keys.T
    torch.testing.assert_close(scores[3, 0], scores[17, 14])
    assert abs(float(scores[3, 0] - scores[4, 0])) > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_targets_switch_three_to_five_times(seed, monkeypatch):
    phases = []

    def marked(data, batch_size, rng):
        while True:
            yield next(iter([data]))

    monkeypatch.setattr(validation_changing, "dataset_batches", marked)
    task = FAMILIES["val_switching"].task(seed)
    batches = task.batches(seeded(0))
    phases = [id(next(batches)) for _ in range(task.length)]
    switches = [i for i, (a, b) in enumerate(pairwise(phases)) if a != b]
    assert 3 <= len(switches) <= 5
    assert len(set(phases)) == len(switches) + 1
    lengths = [b - a for a, b in pairwise([0, *switches, task.length])]
    assert min(lengths) > task.length / 20


def test_a_switch_of_letters_keeps_the_images_and_moves_some_names():
    phases, (images, labels) = validation_changing.relabelled_letters(seeded(0), 5, 10, 0.5)
    assert len(phases) == 5
    assert all(phase[0] is phases[0][0] for phase in phases)
    for (_, before), (_, after) in pairwise(phases):
        assert 0.2 < float((before != after).float().mean()) < 0.75
    assert len(images) == len(labels) == 400


def test_oscillators_agree_with_finer_steps():
    from scipy.integrate import solve_ivp

    # The same draws by hand: an undriven, undamped, uncoupled phase would keep its energy, this one has everything.
    rng = seeded(3)
    ((start, end),), _ = validation_changing.changing_oscillators(seeded(3), 1, 0.0)
    stiff, cubic = 0.5 + 2.5 * torch.rand(2, generator=rng), 2 * torch.rand(2, generator=rng)
    damping, coupling = 0.4 * torch.rand(2, generator=rng), validation_changing.uniform(rng, -1.5, 1.5)
    drive, pace = validation_changing.uniform(rng, 0.5, 2.5), validation_changing.uniform(rng, 1.0, 2.0)
    k, c, d = (t.double().numpy() for t in (stiff, cubic, damping))
    for row in range(5):
        phase = math.atan2(float(start[row, 4]), float(start[row, 5]))

        def flow(t, y, phase=phase):
            x, v = y[:2], y[2:]
            return [*v, *(coupling * (x[::-1] - x) + drive * math.sin(phase + pace * t) - k * x - c * x**3 - d * v)]

        wanted = solve_ivp(flow, (0, 1.5), start[row, :4].double().numpy(), rtol=1e-8, atol=1e-8).y[:, -1]
        torch.testing.assert_close(end[row].double(), torch.as_tensor(wanted), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_a_task_have_one_shape(name):
    batches = FAMILIES[name].task(2).batches(seeded(0))
    shapes = {tuple(t.shape for t in batch_tensors(next(batches))) for _ in range(6)}
    assert len(shapes) == 1
