"""The example that learns while it reads: examples/dynamic_language_model."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT

EXAMPLE = ROOT / "examples" / "dynamic_language_model"
sys.path.insert(0, str(EXAMPLE))

import data  # noqa: E402  # pyright: ignore[reportMissingImports]
import evaluate  # noqa: E402  # pyright: ignore[reportMissingImports]
import meta_learn  # noqa: E402  # pyright: ignore[reportMissingImports]
import plots  # noqa: E402  # pyright: ignore[reportMissingImports]
import report  # noqa: E402  # pyright: ignore[reportMissingImports]
from model import LanguageModel  # noqa: E402  # pyright: ignore[reportMissingImports]
from read import Method, Reader, RmsDynamic, cache_losses  # noqa: E402  # pyright: ignore[reportMissingImports]

METHODS = [
    Method("static"),
    Method("forgetful"),
    Method("sgd", lr=0.5, decay=0.01),
    Method("rms", lr=3e-3, decay=0.01, eps=1.0),
    Method("adam", lr=1e-3, decay=0.01, eps=1.0),
    Method("learned", lr=3e-3, decay=0.01, eps=1.0, policy=meta_learn.base_policy(1e-3), backend="eager"),
]
WIKITEXT = """ = First =

 some words of the first article

 = = Section = =

 more words of it

 = = = Deeper = = =

 = Second one , with a comma =

 words of the second @-@ article <unk>
"""


def article(length: int, seed: int, vocabulary: int = 30) -> data.Article:
    """Words that repeat themselves, so that there is something to learn."""
    rng = random.Random(seed)
    favourites = rng.sample(range(1, vocabulary), 6)
    codes = [rng.choice(favourites) for _ in range(length)]
    return data.Article(f"article {seed}", [f"w{c}" for c in codes], torch.tensor(codes))


@pytest.fixture(scope="module", params=["all", "memory"])
def reader(request: pytest.FixtureRequest) -> Reader:
    torch.manual_seed(0)
    made = Reader(LanguageModel(30, 8, rows=64), request.param, chunk=5)
    made.measure([article(60, seed) for seed in range(3)])
    return made


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
def test_shuffling_the_future_does_not_change_the_pasts_predictions(reader: Reader, method: Method) -> None:
    tokens = article(48, 7).tokens
    shuffled = torch.cat([tokens[:23], tokens[23:][torch.randperm(25, generator=torch.Generator().manual_seed(1))]])
    assert not torch.equal(tokens, shuffled)
    losses, others = (reader.read(t, method).losses for t in (tokens, shuffled))
    assert torch.equal(losses[:23], others[:23])
    assert not torch.equal(losses[23:], others[23:])


def test_the_future_is_not_in_the_cache_either() -> None:
    tokens, losses = article(48, 7).tokens, torch.full((48,), 3.0)
    changed = torch.cat([tokens[:20], tokens[20:].flip(0)])
    assert torch.equal(cache_losses(losses, tokens, 0.2, 50.0)[:20], cache_losses(losses, changed, 0.2, 50.0)[:20])


@pytest.mark.parametrize("method", METHODS[2:], ids=lambda m: m.kind)
def test_weights_and_optimizer_are_restored_at_an_articles_end(reader: Reader, method: Method) -> None:
    before = {name: w.clone() for name, w in reader.model.state_dict().items()}
    first = reader.read(article(48, 7).tokens, method).losses
    reader.read(article(80, 8).tokens, method)
    assert torch.equal(first, reader.read(article(48, 7).tokens, method).losses)
    assert all(torch.equal(before[name], w) for name, w in reader.model.state_dict().items())
    static = reader.read(article(48, 7).tokens, Method("static")).losses
    assert torch.allclose(first[:5], static[:5]), "nothing is learned before the first chunk is predicted"
    assert not torch.allclose(first[5:], static[5:])


def test_the_way_back_leads_to_the_static_weights() -> None:
    p = torch.full((3,), 2.0, requires_grad=True)
    moments = torch.tensor([0.25, 1.0, 4.0])
    optimizer = RmsDynamic([p], [moments], lr=0.0, decay=0.1, eps=0.0)
    p.grad = torch.zeros(3)
    for _ in range(100):
        optimizer.step()
    assert (p.detach().abs() < 0.05).all()
    assert p[2] < p[0], "coordinates with large gradients go back faster"


def test_the_memorys_rows_are_named_by_the_last_words_wherever_a_chunk_begins() -> None:
    model, tokens = LanguageModel(30, 8), article(40, 7).tokens
    recalled, (_, _, before) = [], model.start()
    for chunk in (tokens[:3], tokens[3:21], tokens[21:22], tokens[22:]):
        words = torch.cat([before, chunk[:, None]])
        recalled.append(model.recalled(words)[:, :, 0])
        before = words[-3:]
    rows = torch.cat(recalled, 1)
    assert rows.shape == (3, 40)
    assert all((of >= i * 1024).all() and (of < (i + 1) * 1024).all() for i, of in enumerate(rows))
    other = tokens.clone()
    other[:30] = 1
    again = model.recalled(torch.cat([model.start()[2], other[:, None]]))[:, :, 0]
    assert [int((a != b).nonzero().max()) for a, b in zip(rows, again, strict=True)] == [29, 30, 32]


def test_one_lesson_is_recalled_where_its_context_returns_and_nowhere_else() -> None:
    torch.manual_seed(0)
    reader = Reader(LanguageModel(300, 8), "memory", chunk=5)
    tokens = torch.randperm(299)[:60] + 1
    tokens = torch.cat([tokens[:40], tokens[10:15], tokens[40:]])  # words that came once come again
    static = reader.read(tokens, Method("static")).losses
    gain = static - reader.read(tokens, Method("sgd", lr=3.0)).losses
    assert (gain[41:45] > 0.3).all()
    assert (gain[45:] < 0.0).all(), "words that never came are less likely than before"


def test_the_memory_has_a_rate_of_its_own() -> None:
    torch.manual_seed(0)
    reader = Reader(LanguageModel(30, 8), chunk=5)
    reader.measure([article(60, 0)])
    for kind in ("sgd", "rms"):
        method = Method(kind, lr=0.1, eps=1.0, memory=3.0)
        groups = reader.optimizer(method, reader.differences()).param_groups
        assert [g["lr"] for g in groups] == pytest.approx([0.1] * 5 + [0.3])


def test_a_stronger_memory_is_one_with_a_higher_rate() -> None:
    """A gradient step counts the strength twice: in the gradient, and in what the difference does."""
    torch.manual_seed(0)
    model, tokens = LanguageModel(30, 8), article(60, 1).tokens
    strong = Reader(model, chunk=5, strength=3.0).read(tokens, Method("sgd", lr=0.1)).losses
    fast = Reader(model, chunk=5).read(tokens, Method("sgd", lr=0.1, memory=9.0)).losses
    torch.testing.assert_close(strong, fast)
    assert not torch.allclose(strong, Reader(model, chunk=5).read(tokens, Method("sgd", lr=0.1)).losses)
    readers = Reader(model, chunk=5), Reader(model, chunk=5, strength=3.0)
    for reader in readers:
        reader.measure([article(60, 0)])
    stronger = readers[0].strengthened(3.0)
    assert stronger.gradient_norm == pytest.approx(readers[1].gradient_norm)
    for name, moment in readers[1].warm.second_moments.items():
        torch.testing.assert_close(stronger.warm.second_moments[name], moment)


def test_a_stretch_meets_the_protocol_and_reads_on_where_it_stopped(reader: Reader) -> None:
    from learned_optim.tasks import check_task
    from learned_optim.tasks.rollout import train

    task = meta_learn.Stretch(reader, article(48, 7))
    check_task(task)
    assert task.length == 8, "nine whole chunks of 5 words: eight updates with a chunk after each"
    method = dataclasses.replace(METHODS[3], clip=math.inf)
    curve = train(task, 0, lambda params: reader.optimizer(method, dict(zip(reader.names, params, strict=True))), 9)
    losses = reader.read(article(45, 7).tokens, method).losses
    assert curve.losses == pytest.approx(losses.view(9, 5).mean(1).tolist(), rel=1e-5)


def test_headings_of_one_sign_divide_wikitext_files_and_deeper_ones_do_not() -> None:
    first, second = data.file_documents("wiki.txt", WIKITEXT)
    assert (first.title, second.title) == ("First", "Second one , with a comma")
    assert "more words of it" in " ".join(first.paragraphs)
    assert data.words_of(second.paragraphs[-1])[-3:] == ["@-@", "article", "<unk>"]
    (whole,) = data.file_documents("plain.txt", "a = b\n\nno headings")
    assert whole.title == "plain.txt"


def write_corpus(folder: Path, articles: int, paragraph: str = "") -> None:
    rng = random.Random(0)
    folder.mkdir(exist_ok=True)
    for number in range(articles):
        favourites = [f"word{chr(97 + rng.randrange(26))}{chr(97 + rng.randrange(26))}" for _ in range(12)]
        lines = [" ".join(rng.choice(favourites) for _ in range(20)) for _ in range(8)]
        (folder / f"{number}.txt").write_text("\n\n".join([*lines, paragraph]), encoding="utf-8")


def test_no_paragraph_is_in_two_articles_and_no_article_in_two_parts(tmp_path: Path) -> None:
    repeated = "this one paragraph of ten words stands in every file"
    write_corpus(tmp_path, 60, repeated)
    corpus = data.load(tmp_path, shortest=50)
    articles = [a for part in corpus.parts.values() for a in part]
    assert sum(repeated in " ".join(a.words) for a in articles) == 1
    titles = [a.title for a in articles]
    assert len(titles) == len(set(titles)) == 60
    assert all(len(part) >= 2 for part in corpus.parts.values())
    assert "validation" in corpus.counts()
    trained_on = {w for a in corpus.parts["train"] for w in a.words}
    assert set(corpus.vocabulary[1:]) <= trained_on


def test_files_that_name_their_part_keep_it(tmp_path: Path) -> None:
    for part, count in (("train", 30), ("valid", 3), ("test", 4)):
        body = "\n".join(
            f" = {part} {i} =\n " + " ".join(f"{part}x{chr(97 + i % 26)}"[-7:] for _ in range(30)) for i in range(count)
        )
        (tmp_path / f"wiki.{part}.tokens").write_text(body, encoding="utf-8")
    corpus = data.load(tmp_path, shortest=10)
    assert {a.title.split()[0] for a in corpus.parts["test"]} == {"test"}
    assert {a.title.split()[0] for a in corpus.parts["validation"]} == {"valid"}
    assert {a.title.split()[0] for a in corpus.parts["meta"]} == {"train"}
    assert len(corpus.parts["test"]) == 4


@pytest.mark.parametrize("case", ["missing", "empty", "few"])
def test_text_that_cannot_serve_is_refused_by_name(tmp_path: Path, case: str) -> None:
    folder = tmp_path / case
    if case != "missing":
        write_corpus(folder, 0 if case == "empty" else 3)
    wanted, said = {
        "missing": (FileNotFoundError, "no such folder or file"),
        "empty": (FileNotFoundError, "no .txt"),
        "few": (ValueError, "too few articles of at least 400 words"),
    }[case]
    with pytest.raises(wanted, match=said):
        data.load(folder)


def test_gains_are_zero_where_methods_agree_and_intervals_hold_the_mean() -> None:
    rng = torch.Generator().manual_seed(0)
    static = [4.0 + torch.randn(40 + i, generator=rng) for i in range(6)]
    gains = {"static": 0.0, "rms": 0.1, "rms_all": 0.16, "learned": 0.2}
    by_method = {name: report.quarters([l - gain for l in static]) for name, gain in gains.items()}
    results = report.compare(by_method, "rms", "rms_all", draws=200)
    assert results["against"]["last_quarter_ratio"] == pytest.approx(2.0, rel=1e-4)
    assert results["against_with_memory"]["last_quarter_ratio"] == pytest.approx(1.25, rel=1e-4)
    assert results["methods"]["static"]["gain"] == [0.0] * 5
    row = results["methods"]["learned"]
    for value, (low, high) in zip(row["perplexity"], row["perplexity_interval"], strict=True):
        assert low <= value <= high


def test_from_a_folder_of_texts_to_table_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "texts", 40)
    out = tmp_path / "run"
    options = ["--shortest", "50", "--width", "8", "--epochs", "1", "--outer-steps", "1", "--tuning-words", "100"]
    arguments = ["--out", str(out), "--text", str(tmp_path / "texts"), "--backend", "eager", *options]
    arguments += ["--save-policy", str(tmp_path / "reader")]
    evaluate.main(arguments)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(results["methods"]) == set(report.NAMES)
    assert report.markdown(results).count("\n") >= len(report.NAMES)
    monkeypatch.setattr(sys, "argv", ["plots.py", str(out)])
    plots.main()
    for name in ("positions", "updates", "lengths", "levels", "article"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    assert "<span" in (out / "article.html").read_text(encoding="utf-8")
    from learned_optim import Policy

    assert Policy.from_pretrained(tmp_path / "reader").results
    with pytest.raises(SystemExit, match="another seed"):
        evaluate.main([*arguments, "--seed", "5"])


def test_the_readmes_figures_are_those_of_the_results() -> None:
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    results = json.loads((EXAMPLE / "results.json").read_text(encoding="utf-8"))
    assert plots.filled(readme, results) == readme
