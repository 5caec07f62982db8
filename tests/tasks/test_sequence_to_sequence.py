"""Families that turn one sequence into another."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.sequence_to_sequence import (
    EDGE,
    FIRST,
    PAD,
    NumberNames,
    RecurrentTranslator,
    Rewriting,
    Transformer,
    Translation,
    close_gaps,
    translation_loss,
)
from learned_optim.tasks.nets import Style

LANGUAGES = (Translation, NumberNames, Rewriting)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(tokens: torch.Tensor) -> list[list[int]]:
    return [[t for t in row if t != PAD] for row in tokens.tolist()]


def test_gaps_are_closed_and_the_order_kept():
    tokens = torch.randint(0, 3, (50, 9), generator=seeded(0))
    closed = close_gaps(tokens)
    assert rows(closed) == rows(tokens)
    for row, full in zip(closed.tolist(), rows(tokens), strict=True):
        assert row == full + [PAD] * (9 - len(full))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", range(6))
def test_pairs_are_of_the_shapes_and_tokens_promised(language, seed):
    made = language(seeded(seed))
    pair = made.draw(seeded(1), 200)
    for tokens, size, length in zip(pair, made.sizes, made.lengths, strict=True):
        assert tokens.shape == (200, length)
        assert int(tokens.max()) < size
        assert EDGE not in tokens.unique().tolist()
        assert torch.equal(close_gaps(tokens), tokens)
        assert all(rows(tokens)), "an empty sentence"
    assert len({tuple(row) for row in rows(pair[0])}) > 100


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", range(4))
def test_the_target_is_a_function_of_the_source(language, seed):
    made = language(seeded(seed))
    made.synonyms = 0.0
    targets: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for batch_seed in range(2):
        for source, target in zip(*map(rows, made.draw(seeded(batch_seed), 3000)), strict=True):
            targets.setdefault(tuple(source), set()).add(tuple(target))
    assert all(len(found) == 1 for found in targets.values())


@pytest.mark.parametrize("seed", range(6))
def test_numbers_have_names_of_their_own(seed):
    made = NumberNames(seeded(seed))
    numbers, names = made.draw(seeded(1), 3000)[:: -1 if made.backward else 1]
    pairs = {(tuple(a), tuple(b)) for a, b in zip(rows(numbers), rows(names), strict=True)}
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert all(a[0] != FIRST for a, _ in pairs), "a leading zero"


def rewritten(rule: str, word: list[int]) -> list[int]:
    if rule == "reverse":
        return word[::-1]
    if rule == "rotate":
        turn = word[0] % len(word)
        return word[turn:] + word[:turn]
    if rule == "exchange":
        swapped = [letter for i in range(0, len(word) - 1, 2) for letter in (word[i + 1], word[i])]
        return swapped + word[len(swapped) :]
    return sorted(word)


@pytest.mark.parametrize("rule", ["reverse", "rotate", "exchange", "sort"])
def test_rewriting_does_what_its_name_says(rule):
    made = Rewriting(seeded(0))
    source, _ = made.draw(seeded(1), 100)
    result = made._apply(rule, source, seeded(2))
    assert rows(result) == [rewritten(rule, word) for word in rows(source)]


def test_marked_letters_are_doubled_or_dropped_and_a_cipher_can_be_undone():
    made = Rewriting(seeded(0))
    source, _ = made.draw(seeded(1), 100)
    doubled, dropped = (rows(made._apply(rule, source, seeded(2))) for rule in ("double", "drop"))
    for word, twice, less in zip(rows(source), doubled, dropped, strict=True):
        marked = {a for a, b in itertools.pairwise(twice) if a == b and twice.count(a) > word.count(a)}
        assert twice == [letter for letter in word for _ in range(2 if letter in marked else 1)]
        assert less == [letter for i, letter in enumerate(word) if i == 0 or letter not in marked]
    ciphered = made._apply("cipher", source, seeded(2))
    shift = torch.randint(made.letters, (FIRST + made.letters,), generator=_after_marks(made))
    before = F.pad(ciphered[:, :-1], (1, 0))
    assert ciphered.shape == before.shape
    undone = []
    for i in range(source.shape[1]):
        last = undone[-1] if undone else torch.zeros(100, dtype=torch.int64)
        undone.append(FIRST + (ciphered[:, i] - FIRST - shift[last]) % made.letters)
    inside = source != PAD
    assert torch.equal(torch.stack(undone, 1)[inside], source[inside])


def _after_marks(made: Rewriting) -> torch.Generator:
    rng = seeded(2)
    torch.rand(FIRST + made.letters, generator=rng)
    return rng


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_cross_entropy_without_padding(smoothing):
    logits = torch.randn(4, 6, 9, generator=seeded(0))
    target = torch.randint(0, 9, (4, 6), generator=seeded(1))
    loss = translation_loss(smoothing)(lambda source, given: logits, (target, target, target))  # type: ignore[arg-type]
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def models():
    for attention in ("dot", "general", "additive"):
        yield RecurrentTranslator((12, 15), 8, 16, attention, attention == "general")
    yield Transformer((12, 15), (6, 5), 16, (1, 2), 2, Style())


@pytest.mark.parametrize("model", list(models()))
def test_a_decoder_sees_the_source_and_its_own_past(model):
    source, given = torch.randint(2, 12, (3, 6), generator=seeded(0)), torch.randint(2, 15, (3, 5), generator=seeded(1))
    logits = model(source, given)
    assert logits.shape == (3, 5, 15)
    later = given.clone()
    later[:, 3:] = (later[:, 3:] - 1) % 13 + 2
    torch.testing.assert_close(model(source, later)[:, :3], logits[:, :3])
    assert not torch.allclose(model(source, later)[:, 3:], logits[:, 3:])
    other = source.clone()
    other[:, 4] = (other[:, 4] - 1) % 10 + 2
    assert bool(((model(other, given) - logits).abs().amax(2) > 1e-7).all())


@pytest.mark.parametrize("name", ["seq2seq_recurrent", "seq2seq_transformer"])
def test_the_target_follows_what_is_given(name):
    for seed in range(4):
        source, given, target = next(FAMILIES[name].task(seed).batches(seeded(0)))
        assert bool((given[:, 0] == EDGE).all())
        for told, wanted in zip(rows(given), rows(target), strict=True):
            assert [*told[1:], EDGE] == wanted
        assert len(source) == len(target)
