"""Pre-trained networks: the same bits made afresh, from the cache and beside other writers; parts of them frozen."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from learned_optim.tasks import pretrained
from learned_optim.tasks.nets import RecurrentLM, Style, VisionTransformer, convnet, mlp
from learned_optim.tasks.objectives import classification
from learned_optim.tasks.pretrained import TUNED, Recipe, cache_folder, freeze, pretrained_state, without_head
from learned_optim.tasks.sampling import dataset_task, split


def make_task():
    rng = torch.Generator().manual_seed(5)
    inputs = torch.randn(200, 6, generator=rng)
    data = inputs, (inputs[:, 0] > inputs[:, 1]).long()
    make = lambda: mlp([6, 16, 2], Style(norm="batch"))  # noqa: E731
    return dataset_task(make, lambda: split(data, rng), classification, batch_size=20, length=40)


RECIPE = Recipe("small", make_task, lr=0.02)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pretrained_state.cache_clear()
    yield
    pretrained_state.cache_clear()


def again(recipe: Recipe = RECIPE):
    """As another process would see it."""
    pretrained_state.cache_clear()
    return pretrained_state(recipe)


def file():
    (path,) = cache_folder().iterdir()
    return path


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


def test_training_lowers_the_loss():
    task = make_task()
    state, params, buffers = pretrained_state(RECIPE), *task.init(torch.Generator().manual_seed(0))
    trained = {k: state[k] for k in params}
    with torch.no_grad():
        before = task.eval_loss(params, buffers)  # type: ignore[misc]
        assert task.eval_loss(trained, {k: state[k] for k in buffers}) < 0.7 * before  # type: ignore[misc]


def test_cache_and_fresh_training_give_the_same_bits(monkeypatch):
    first = pretrained_state(RECIPE)
    file().unlink()
    torch.manual_seed(77)
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():  # task.init may be called anywhere
            assert_same_bits(again(), first)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(pretrained, "_train", lambda *args: pytest.fail("trained again"))
    assert_same_bits(again(), first)


def test_another_recipe_is_another_network():
    first = pretrained_state(RECIPE)
    for other in (Recipe("small", make_task, seed=1, lr=0.02), Recipe("small", make_task, lr=1e-3)):
        assert any(not torch.equal(first[k], t) for k, t in pretrained_state(other).items())
    assert len(list(cache_folder().iterdir())) == 3


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: bytes(len(data)), cut, flipped])
def test_a_damaged_file_is_made_again(damage):
    first, path = pretrained_state(RECIPE), file()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert_same_bits(again(), first)
    assert path.read_bytes() == good


def test_a_file_of_another_network_is_made_again():
    first, path = pretrained_state(RECIPE), file()
    pretrained._store(path, {"weight": torch.zeros(3)})
    assert_same_bits(again(), first)


def test_readers_beside_several_writers_see_whole_files():
    state, path, task = pretrained_state(RECIPE), file(), make_task()
    writers = [threading.Thread(target=lambda: [pretrained._store(path, state) for _ in range(30)]) for _ in range(3)]
    for writer in writers:
        writer.start()
    reads = 0
    while reads < 5 or any(writer.is_alive() for writer in writers):
        stored = pretrained._stored(path, task)
        assert stored is not None
        assert_same_bits(stored, state)
        reads += 1
    for writer in writers:
        writer.join()
    assert file() == path  # and nothing else


def test_where_nothing_can_be_written_a_warning_says_so(monkeypatch, tmp_path):
    first = pretrained_state(RECIPE)
    (tmp_path / "taken").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.warns(UserWarning, match="point XDG_CACHE_HOME at a folder"):
        assert_same_bits(again(), first)


def test_diverged_training_is_an_error():
    with pytest.raises(RuntimeError, match=r"'small' diverged at lr 1e\+37; lower"):
        pretrained_state(Recipe("small", make_task, lr=1e37))
    assert not cache_folder().exists()


def test_relative_cache_folders_are_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "learned_optim" / "pretrained"


NETWORKS = {
    "mlp": (lambda: mlp([6, 8, 8, 5], Style(norm="layer", residual=True)), torch.randn(4, 6)),
    "convnet": (lambda: convnet(3, [4, 8], 5, Style(norm="batch")), torch.randn(4, 3, 8, 8)),
    "vit": (lambda: VisionTransformer((1, 8), 4, 8, 2, 2, 5, Style()), torch.randn(4, 1, 8, 8)),
    "gru": (lambda: RecurrentLM("gru", 5, 8, 8), torch.randint(5, (4, 7))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_body_and_head_are_the_network(name):
    make, inputs = NETWORKS[name]
    network = make().eval()
    expected = network(inputs)
    body, head = without_head(network)
    torch.testing.assert_close(head(body(inputs)), expected)
    assert body(inputs).shape[-1] == head.in_features


def test_a_network_without_linear_layers_has_no_head():
    with pytest.raises(ValueError, match="Conv2d without a linear layer"):
        without_head(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("tuned", TUNED)
@pytest.mark.parametrize("name", NETWORKS)
def test_freezing_leaves_the_function_and_trains_what_it_says(name, tuned):
    make, inputs = NETWORKS[name]
    body, _ = without_head(make().eval())
    before, expected = dict(body.named_parameters()), body(inputs)
    body = freeze(body, tuned, rank=2)
    torch.testing.assert_close(body(inputs), expected)
    trained = {k for k, p in body.named_parameters() if p.requires_grad}
    if tuned == "all":
        assert trained == before.keys()
    elif tuned == "head":
        assert not trained
    elif tuned == "upper":
        assert trained
        assert trained < before.keys()
        assert next(iter(before)) not in trained
        assert list(before)[-1] in trained or name == "gru"
    else:
        assert all(".down." in k or ".up." in k for k in trained)
        assert len(trained) == 2 * sum(isinstance(m, pretrained.LowRank) for m in body.modules())
        assert bool(trained) != (name == "gru")


def test_low_rank_corrections_have_that_rank():
    layer = pretrained.LowRank(nn.Linear(9, 7), rank=2, scale=3.0)
    nn.init.normal_(layer.up.weight)  # type: ignore[arg-type]
    change = (layer(torch.eye(9)) - layer.frozen(torch.eye(9))).detach()
    assert torch.linalg.matrix_rank(change) == 2
    torch.testing.assert_close(change, 3.0 * (layer.up.weight @ layer.down.weight).T.detach())  # type: ignore[operator]


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="all, head, upper, low_rank, got 'lower'"):
        freeze(nn.Linear(2, 2), "lower")
