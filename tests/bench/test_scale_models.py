"""The scale suite's networks and data."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from learned_optim.bench.baselines import hidden_matrices
from learned_optim.bench.scale import images, text
from learned_optim.bench.scale.config import MODELS, VOCABULARY, Model, ScaleConfig
from learned_optim.bench.scale.model import BASE, LanguageModel, SelfAttention, next_token_loss


def language_model(model: Model) -> LanguageModel:
    return LanguageModel(VOCABULARY, model.context, model.depth, model.width, heads=model.depth)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_models_have_the_parameters_that_tables_say(model: Model) -> None:
    with torch.device("meta"):
        network = language_model(model) if model.line == "text" else images.network(model)
    assert sum(p.numel() for p in network.parameters()) == model.parameters


@pytest.mark.parametrize("model", [m for m in MODELS.values() if m.line == "text"], ids=lambda m: m.name)
def test_text_has_four_tokens_per_parameter_and_one_proportion(model: Model) -> None:
    assert model.samples == pytest.approx(4.0, rel=0.01)
    assert model.width == 32 * model.depth


def test_attention_is_causal_and_turns_queries_and_keys_as_complex_numbers() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(16, heads=2, context=9).double(), torch.randn(3, 9, 16, dtype=torch.float64)
    angle = torch.arange(9.0)[:, None] * BASE ** (-torch.arange(4) / 4)  # the layer's own, made in float32
    q, k, v = (layer.qkv.weight.view(3, 2, 8, 16)[i] for i in range(3))
    turn = torch.polar(torch.ones(9, 4), angle).to(torch.complex128)
    out = torch.zeros(3, 9, 2, 8, dtype=torch.float64)
    for head in range(2):
        keys, queries = (torch.complex(*(x @ w[head].T).chunk(2, -1)) * turn for w in (k, q))
        for t in range(9):
            scores = (queries[:, t, None] * keys[:, : t + 1].conj()).real.sum(-1) / math.sqrt(8)
            out[:, t, head] = (scores.softmax(-1)[..., None] * (x @ v[head].T)[:, : t + 1]).sum(1)
    torch.testing.assert_close(layer(x), out.flatten(2) @ layer.out.weight.T, rtol=1e-5, atol=1e-5)


def test_a_fresh_language_model_knows_nothing_and_sees_no_later_token() -> None:
    torch.manual_seed(0)
    network, tokens = language_model(MODELS["text-0.3M"]), torch.randint(VOCABULARY, (4, 65))
    with torch.no_grad():
        assert float(next_token_loss(network, tokens)) == pytest.approx(math.log(VOCABULARY), abs=0.5)
        before = network(tokens)
        tokens[:, 40] = (tokens[:, 40] + 1) % VOCABULARY
        after = network(tokens)
    torch.testing.assert_close(after[:, :40], before[:, :40])
    assert not torch.allclose(after[:, 40:], before[:, 40:])


def test_muon_gets_the_matrices_within() -> None:
    with torch.device("meta"):
        text_network, image_network = language_model(MODELS["text-0.3M"]), images.network(MODELS["images-0.1M"])
    within = hidden_matrices(dict(text_network.named_parameters()))
    assert len(within) == 4 * MODELS["text-0.3M"].depth
    assert all(name.startswith("blocks.") for name in within)
    matrices = {n: p for n, p in image_network.named_parameters() if p.ndim == 2}
    assert hidden_matrices(dict(image_network.named_parameters())) == list(matrices)[:-1]


def test_held_out_images_are_trained_on_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, labels = torch.zeros(images.HELD_OUT + 50, 3, 24, 24), torch.arange(images.HELD_OUT + 50)
    monkeypatch.setattr(images, "data", lambda: (pictures, labels))
    _, seen = images.batch(MODELS["images-0.1M"], torch.Generator().manual_seed(0))
    assert not set(seen.tolist()) & set(images.held_out(10**6)[1].tolist())


def pages(n: int, start: int = 0) -> list[str]:
    words = ["loss", "step", "weight", "optimizer", "gradient", "momentum", "a", "the", "of"]
    rng = np.random.default_rng(start)
    return [" ".join(rng.choice(words, 400)) + f"\n\npage {i} {start}" for i in range(n)]


def test_text_is_split_by_file_and_what_training_files_hold_is_not_held_out(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    shared = "This notice stands in every file, and nobody wants to be examined on it. " * 8
    documents = [(False, f"{page}\n\n{shared}") for page in pages(600)]
    documents += [(True, f"{shared}\n\n{page}") for page in pages(10, start=1)]
    data = text._encode(documents, 300)
    (tmp_path / f"text-{text.FORMAT}-300.npz").write_bytes(data)
    corpus = text.load(tmp_path, 300)
    assert int(max(corpus.train.max(), corpus.held_out.max())) < 300
    assert (corpus.train == 0).sum() == 600
    assert len(corpus.held_out) * corpus.characters == pytest.approx(sum(map(len, pages(10, start=1))), rel=0.01)
    assert text.load(tmp_path, 300).fingerprint == corpus.fingerprint


def test_files_of_one_name_stay_together_and_copies_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, page in enumerate(pages(300)):
        for package in ("a", "b"):
            path = tmp_path / package / f"{i}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(page + ("" if i % 2 else package), encoding="utf-8")
    monkeypatch.setattr(text, "_files", lambda: iter(sorted(tmp_path.rglob("*.txt"))))
    sides: dict[str, set[bool]] = {}
    documents = list(text._documents())
    for apart, body in documents:
        sides.setdefault(body.split("\n\n")[0], set()).add(apart)
    assert len(documents) == 450
    assert all(len(side) == 1 for side in sides.values())
    assert {True, False} == set.union(*sides.values())


def test_too_little_text_and_a_missing_tokenizer_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        text._encode([(False, "x" * 2_000_000), (True, "y" * 20_000)], 300)
    monkeypatch.undo()
    pytest.importorskip("tokenizers")
    with pytest.raises(RuntimeError, match="only 5 characters"):
        text._encode([(False, "hello")], 300)


def test_held_out_rows_are_spread_over_the_text() -> None:
    model = MODELS["text-0.3M"]
    corpus = text.Corpus(np.zeros(10, np.uint16), np.arange(10_000).astype(np.uint16), 1.0, "")
    rows = text.held_out_rows(corpus, model, 5)
    assert rows[:, 0].tolist() == np.linspace(0, 10_000 - 129, 5).astype(int).tolist()
    assert torch.equal(rows - rows[:, :1], torch.arange(129).expand(5, 129))
    assert len(text.held_out_rows(corpus, model, 1000)) == 10_000 // 129
    tokens = text.as_tensor(corpus.held_out, "cpu")
    batch = text.batch(tokens, model, torch.Generator().manual_seed(0))
    assert batch.shape == (model.batch, 129)
    assert torch.equal(batch - batch[:, :1], torch.arange(129).expand(model.batch, 129))


@pytest.mark.parametrize(("wrong", "match"), [
    ({"policies": ()}, "policies"), ({"minutes": -1.0}, "minutes"), ({"models": ("text-7B",)}, "models"),
])  # fmt: skip
def test_options_are_checked(wrong: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ScaleConfig(**wrong)  # pyright: ignore[reportArgumentType]


def test_models_are_chosen_by_device_or_by_pattern() -> None:
    assert [m.name for m in ScaleConfig().chosen()] == ["text-0.3M", "text-1M", "images-0.1M"]
    both = ScaleConfig().chosen() + ScaleConfig(device="cuda").chosen()
    assert {m.name for m in both} == set(MODELS)
    assert ScaleConfig(models=("images-*M",), device="cuda").chosen()[0].name == "images-0.1M"
    assert {m.steps for m in ScaleConfig(quick=True, models=("*",)).chosen()} == {20}
