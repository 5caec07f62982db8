"""Text as articles: what ships with Python, a folder of .txt files, or files with WikiText's headings.

Articles are divided by subject into four parts that share no subject and no paragraph:

    train        the static weights are trained on it, and the vocabulary is made of its words
    meta         the adapter learns to read on it; kept from the static weights, because adapting to text that they
                 know is another problem than adapting to new text
    validation   every method's settings are chosen on it
    test         looked at once
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN = "<unk>"
PARTS = {"train": 0.55, "meta": 0.17, "validation": 0.13, "test": 0.15}
#: Words, split where names are joined (get_itemName: get _ item Name), single digits, marks; WikiText's own marks.
_WORD = re.compile(r"<unk>|@[-,.]@|[A-Z]?[a-z]+|[A-Z]+|[^\W\d_A-Za-z]+|\d|[^\s\w]|_")
#: " = Title = " opens an article, " = = Section = = " does not.
_TITLE = re.compile(r"^\s*= ([^=\s](?:[^=]*[^=\s])?) =\s*$")
_KEPT_BY_HAND = {"train": "train", "valid": "validation", "test": "test"}


class Document(NamedTuple):
    """An article as it was found."""

    title: str
    subject: str  #: articles of one subject go to the same part
    paragraphs: list[str]
    part: str | None = None  #: where the files themselves say which part it belongs to


class Article(NamedTuple):
    """An article as it is read."""

    title: str
    words: list[str]  #: as written, in lower case
    tokens: Tensor  #: int64, [len(words)]; 0 is the unknown word


class Corpus(NamedTuple):
    """A vocabulary and the articles of each part."""

    vocabulary: list[str]
    parts: dict[str, list[Article]]

    def counts(self) -> str:
        """A table for the eye: articles, words and unknown words of each part."""
        rows = [f"vocabulary of {len(self.vocabulary)} words"]
        for name, articles in self.parts.items():
            words = sum(len(a.tokens) for a in articles)
            unknown = sum(int((a.tokens == 0).sum()) for a in articles) / max(words, 1)
            rows.append(f"{name:>12}: {len(articles):4} articles, {words:8} words, {unknown:.1%} of them unknown")
        return "\n".join(rows)


def words_of(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def load(text: str | Path = "python", *, shortest: int = 400, longest: int = 4000, largest: int = 6000) -> Corpus:
    """Read, divide and number a text.

    Args:
        text: ``python`` for the documentation that ships with Python, or a folder of text files, or a file.
        shortest: articles of fewer words are left out.
        longest: of longer articles only this many words are kept.
        largest: size of the vocabulary; words seen once only are unknown in any case.

    Raises:
        FileNotFoundError: no such folder or file, or no text files in it.
        ValueError: too few articles for four parts.
    """
    documents = python_documents() if text == "python" else folder_documents(Path(text))
    divided: dict[str, list[tuple[str, list[str]]]] = {name: [] for name in PARTS}
    for part, document in without_repetitions(documents):
        words = words_of("\n".join(document.paragraphs))[:longest]
        if len(words) >= shortest:
            divided[part].append((document.title, words))
    short = {name: len(articles) for name, articles in divided.items() if len(articles) < 2}
    if short:
        counts = {name: len(articles) for name, articles in divided.items()}
        raise ValueError(
            f"too few articles of at least {shortest} words in {text!s}: {counts}, at least 2 of each are needed. Give "
            "more text, or a smaller --shortest"
        )
    counts = Counter(word for _, words in divided["train"] for word in words if word != UNKNOWN)
    vocabulary = [UNKNOWN, *(word for word, count in counts.most_common(largest - 1) if count > 1)]
    codes = {word: i for i, word in enumerate(vocabulary)}

    def article(title: str, words: list[str]) -> Article:
        return Article(title, words, torch.tensor([codes.get(word, 0) for word in words]))

    return Corpus(vocabulary, {name: [article(*a) for a in articles] for name, articles in divided.items()})


def part_of(document: Document) -> str:
    """The part that a document's subject falls into: by a hash, so that more text moves nothing."""
    if document.part is not None and document.part != "train":
        return document.part
    point = int.from_bytes(hashlib.blake2b(document.subject.encode(), digest_size=4).digest(), "big") / 2**32
    if document.part == "train":  # the files give validation and test, so only the adapter's share is taken here
        return "meta" if point < PARTS["meta"] / (PARTS["train"] + PARTS["meta"]) else "train"
    for name, share in PARTS.items():
        point -= share
        if point < 0.0:
            return name
    return "test"


def without_repetitions(documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Documents with their parts; a paragraph that an earlier document holds is left out of the later one.

    Reference manuals repeat themselves: without this a test article could have been trained on. Parts come in the
    order train, meta, validation, test, so that it is the judged articles that lose text.
    """
    numbered = sorted(((list(PARTS).index(part_of(d)), d) for d in documents), key=lambda pair: pair[0])
    seen: set[str] = set()
    for number, document in numbered:
        normal = [" ".join(words_of(paragraph)) for paragraph in document.paragraphs]
        fresh = [p for p, key in zip(document.paragraphs, normal, strict=True) if key and key not in seen]
        # A few words, such as a heading, are nothing to learn by heart.
        seen.update(key for key in normal if key.count(" ") >= 7)
        yield list(PARTS)[number], document._replace(paragraphs=fresh)


@functools.cache
def python_documents() -> tuple[Document, ...]:
    """Topics of Python's manual, and the documentation strings of every module of its library."""
    documents = []
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions package it apart
        pass
    else:
        for name, body in sorted(topics.topics.items()):
            documents.append(Document(f"manual: {name}", f"manual: {name}", body.split("\n\n")))
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not left_out.intersection(inside.parts):
            # _pydatetime, _datetime and datetime are one subject.
            subject = inside.parts[0].removesuffix(".py").removeprefix("_py").lstrip("_")
            documents.append(Document(str(inside), subject, _docstrings(path)))
    return tuple(documents)


def _docstrings(path: Path) -> list[str]:
    """The paragraphs of a module's documentation strings, in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    docs = [(getattr(node, "name", path.stem), doc) for node in nodes if (doc := ast.get_docstring(node))]
    return [paragraph for name, doc in docs for paragraph in (f"{name}:", *doc.split("\n\n"))]


def folder_documents(path: Path) -> list[Document]:
    """The articles of a text file, or of all text files in a folder; see :func:`file_documents`."""
    if not path.exists():
        raise FileNotFoundError(f"no such folder or file of text: {path}")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".tokens", ".raw"))
    if not files:
        raise FileNotFoundError(f"no .txt, .tokens or .raw files in {path}")
    stems = [next((part for key, part in _KEPT_BY_HAND.items() if key in f.name.lower()), None) for f in files]
    by_hand = set(_KEPT_BY_HAND.values()) <= set(stems)  # wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens
    documents = []
    for file, part in zip(files, stems, strict=True):
        if not by_hand or part is not None:
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            body = file.read_text(encoding="utf-8", errors="replace")
            documents += [d._replace(part=part if by_hand else None) for d in file_documents(name, body)]
    return documents


def file_documents(name: str, body: str) -> list[Document]:
    """One article per `` = Title = `` line; a file without such lines is one article."""
    titles: list[str] = []
    bodies: list[list[str]] = [[]]
    for line in body.splitlines():
        match = _TITLE.match(line)
        if match:
            titles.append(match[1])
            bodies.append([])
        bodies[-1].append(line)
    if not titles:
        return [Document(name, name, re.split(r"\n\s*\n", body))]
    return [Document(title, title, lines) for title, lines in zip(titles, bodies[1:], strict=True)]
