"""Augmentations: what each changes, what it keeps, and their random combination."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learned_optim.tasks import FAMILIES, ModuleTask, Task, augment, check_task
from learned_optim.tasks.augment import (
    AccumulatedGradients,
    BatchSizeJumps,
    DriftingInputs,
    FrozenTensors,
    GrowingBatches,
    NoisyGradients,
    NoisyLabels,
    RescaledParameters,
    ScaledLoss,
    repeated_rows,
)
from learned_optim.tasks.base import batch_tensors


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classify(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def make_batches(rng):
    while True:
        x = torch.randn(64, 6, generator=rng)
        yield x, x[:, :3].argmax(1)


def make_task() -> ModuleTask:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 3))

    return ModuleTask(make, make_batches, classify, name="toy", eval_batch=lambda: next(make_batches(seeded(9))))


def different_rows(batch) -> int:
    x, y = batch
    assert x.shape == (64, 6)
    assert len(y) == 64
    return len(x.unique(dim=0))


def losses(task: Task, steps: int = 3) -> torch.Tensor:
    params, buffers = task.init(seeded())
    batches = task.batches(seeded(1))
    return torch.stack([task.loss(params, buffers, next(batches)) for _ in range(steps)])


def gradients(task: Task) -> dict[str, torch.Tensor]:
    params, buffers = task.init(seeded())
    leaves = {k: p.requires_grad_() for k, p in params.items()}
    loss = task.loss(leaves, buffers, next(task.batches(seeded(1))))
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


WRAPPERS = {
    "rescaled": lambda t: RescaledParameters(t, seeded(5)),
    "scaled": lambda t: ScaledLoss(t, 3.0),
    "noisy": lambda t: NoisyGradients(t, 0.5),
    "jumps": lambda t: BatchSizeJumps(t, 2),
    "growing": GrowingBatches,
    "accumulated": lambda t: AccumulatedGradients(t, 2),
    "mislabelled": lambda t: NoisyLabels(t, 0.5),
    "drifting": lambda t: DriftingInputs(t, 0.5, 20.0),
    "frozen": lambda t: FrozenTensors(t, seeded(1), 0.8),
}
EVERY_WRAPPER = pytest.mark.parametrize("label", sorted(WRAPPERS))


@EVERY_WRAPPER
def test_an_augmented_task_is_a_sound_deterministic_task(label):
    task = WRAPPERS[label](make_task())
    assert isinstance(task, Task)
    assert task.name == f"toy+{label}"
    check_task(task)
    assert torch.equal(losses(task), losses(WRAPPERS[label](make_task())))


@EVERY_WRAPPER
def test_held_out_loss_at_the_start_is_that_of_the_task(label):
    plain, changed = make_task(), WRAPPERS[label](make_task())
    assert plain.eval_loss is not None
    torch.testing.assert_close(changed.eval_loss(*changed.init(seeded())), plain.eval_loss(*plain.init(seeded())))


@EVERY_WRAPPER
def test_a_task_without_held_out_data_stays_so(label):
    task = make_task()
    task.eval_loss = None
    assert WRAPPERS[label](task).eval_loss is None


def test_rescaled_parameters_compute_the_same_function_with_other_gradients():
    plain, task = make_task(), RescaledParameters(make_task(), seeded(5))
    torch.testing.assert_close(losses(task), losses(plain))
    expected, actual = gradients(plain), gradients(task)
    assert len({round(c, 3) for c in task.factors.values()}) == len(expected)
    for name, c in task.factors.items():
        torch.testing.assert_close(actual[name], c * expected[name], rtol=1e-3, atol=1e-5)


def test_scaled_loss_scales_the_loss():
    torch.testing.assert_close(losses(ScaledLoss(make_task(), 3.0)), 3 * losses(make_task()))


def test_noisy_gradients_keep_the_loss_and_shift_the_gradient_by_the_batch_noise():
    task = NoisyGradients(make_task(), 0.5)
    _, noise = next(task.batches(seeded(1)))
    assert noise["0.weight"].abs().max() > 0
    # Drawing the noise's seed shifts the inner batches, so compare on one and the same inner batch.
    inner, _ = next(task.batches(seeded(1)))
    params, buffers = task.init(seeded())
    leaves = {k: p.requires_grad_() for k, p in params.items()}
    clean = task.task.loss(leaves, dict(buffers), inner)
    noisy = task.loss(leaves, dict(buffers), (inner, noise))
    assert torch.equal(clean, noisy)
    pairs = zip(*(torch.autograd.grad(loss, list(leaves.values())) for loss in (clean, noisy)), strict=True)
    for (name, _), (before, after) in zip(leaves.items(), pairs, strict=True):
        torch.testing.assert_close(after, before + noise[name])


def test_batch_sizes_jump():
    batches = BatchSizeJumps(make_task(), 2).batches(seeded(1))
    sizes = [different_rows(next(batches)) for _ in range(20)]
    assert sizes[0] == sizes[1]
    assert len(set(sizes)) > 4
    assert min(sizes) >= 4


def test_batches_grow_from_an_eighth_to_all_rows_and_keep_their_shape():
    task = make_task()
    task.length = 8
    batches = GrowingBatches(task).batches(seeded(1))
    assert [different_rows(next(batches)) for _ in range(9)] == [8, 8, 16, 16, 32, 32, 64, 64, 64]


def test_repeated_rows_have_the_loss_of_the_smaller_batch():
    batch = next(make_batches(seeded(1)))
    assert torch.equal(repeated_rows(batch, 0.25)[1], batch[1][:16].repeat(4))
    assert len(repeated_rows(batch, 0.01)[0].unique(dim=0)) == 4


def test_accumulated_gradients_are_the_mean_of_those_of_the_batches():
    task = AccumulatedGradients(make_task(), 3)
    params, buffers = task.init(seeded())
    batch = next(task.batches(seeded(1)))
    one_by_one = [task.task.loss(params, dict(buffers), one) for one in batch]
    torch.testing.assert_close(task.loss(params, dict(buffers), batch), sum(one_by_one) / 3)
    assert len({float(loss) for loss in one_by_one}) == 3


def test_noisy_labels_keep_the_inputs_and_the_label_counts():
    x, y = next(NoisyLabels(make_task(), 0.5).batches(seeded(1)))
    right = x[:, :3].argmax(1)
    assert 0.3 < float((y == right).float().mean()) < 0.95
    assert torch.equal(y.bincount(), right.bincount())


def test_drifting_inputs_change_gain_and_come_back():
    batches = DriftingInputs(make_task(), 1.0, 20.0).batches(seeded(1))
    deviations = [float(next(batches)[0].std()) for _ in range(21)]
    assert deviations[5] / deviations[15] > 4
    assert abs(deviations[20] / deviations[0] - 1) < 0.3


def test_frozen_tensors_are_buffers_and_one_tensor_always_trains():
    task = FrozenTensors(make_task(), seeded(1), 1.0)
    params, buffers = task.init(seeded())
    assert list(params) == ["0.weight"]
    assert "frozen:3.bias" in buffers
    task.loss(params, buffers, next(task.batches(seeded(1))))
    assert int(buffers["1.num_batches_tracked"]) == 1
    torch.testing.assert_close(losses(task), losses(make_task()))


@pytest.mark.parametrize("name", ["mlp_images", "vae_images", "lstm_word_tied", "noisy_quadratic", "recommender"])
def test_augment_is_deterministic_and_sound(name):
    names = []
    for seed in range(6):
        before = torch.get_rng_state()
        task = augment(FAMILIES[name].task(0), seeded(seed))
        assert torch.equal(before, torch.get_rng_state())
        check_task(task)
        names.append(task.name)
        assert task.name == augment(FAMILIES[name].task(0), seeded(seed)).name
    assert len(set(names)) > 2
    assert all(n.startswith(f"{name}/0") for n in names)


def test_augment_leaves_out_what_does_not_fit():
    for seed in range(20):
        name = augment(FAMILIES["lstm_char"].task(0), seeded(seed)).name
        assert "mislabelled" not in name
        assert "drifting" not in name


def test_all_batches_of_an_augmented_task_have_one_shape() -> None:
    family = FAMILIES["teacher_regression"]
    for seed in range(40):
        batches = augment(family.task(0), seeded(seed)).batches(seeded(1))
        shapes = {tuple(t.shape for t in batch_tensors(next(batches))) for _ in range(3)}
        assert len(shapes) == 1
