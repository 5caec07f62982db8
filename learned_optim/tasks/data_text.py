"""Text that comes with Python itself, as characters or words. Nothing is downloaded.

Training text: the reference manual in ``pydoc_data.topics`` and the source code of ``TRAIN_MODULES``. Validation
text: the documentation strings of ``VALIDATION_MODULES``. The two lists have no module in common. Modules that a
Python version lacks are left out, so the texts, and with them the tasks, differ a little between Python versions.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

TRAIN_MODULES = (
    *("argparse", "typing", "inspect", "tarfile", "pdb", "subprocess", "shutil", "ssl", "datetime", "_pydatetime"),
    *("enum", "zipfile", "mailbox", "ast", "dataclasses", "pathlib", "platform", "tempfile", "functools", "pydoc"),
    *("_pyio", "fractions", "copy", "calendar", "locale", "pickle", "codecs", "plistlib", "tokenize", "uuid"),
)
VALIDATION_MODULES = (
    *("_pydecimal", "turtle", "doctest", "difflib", "ipaddress", "statistics", "threading", "smtplib"),
    *("configparser", "imaplib", "optparse", "socketserver", "traceback", "ftplib", "bdb", "socket", "pickletools"),
    *("random", "textwrap", "wave", "pkgutil", "string", "heapq", "bisect", "cmd", "gettext", "poplib", "sched"),
    *("shelve", "timeit", "trace", "zipapp", "weakref", "webbrowser", "contextlib", "fileinput", "gzip", "queue"),
    *("logging", "tkinter", "collections", "json", "re", "csv", "hashlib", "getopt", "selectors", "operator", "types"),
    *("_strptime", "html", "mimetypes", "symtable", "sysconfig", "pstats", "numbers", "abc", "stat", "nntplib", "cgi"),
)

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The character vocabulary: token ``i`` is ``CHARACTERS[i]``."""

_BLOCK = 2000  # characters; every tenth block is held out
_WORD = re.compile(r"[A-Za-z]+|\d|[^\sA-Za-z\d]")


@functools.cache
def text(split: str) -> str:
    """The whole text of ``"train"`` or ``"validation"``: printable ASCII and newlines, without indentation."""
    if split == "train":
        pieces = [*_manual(), *(source for name in TRAIN_MODULES for source in module_source(name))]
    elif split == "validation":
        pieces = [doc for name in VALIDATION_MODULES for source in module_source(name) for doc in _docstrings(source)]
    else:
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    joined = re.sub(r"[^\n -~]", "", "\n".join(pieces))
    joined = re.sub(r"\n\s*", "\n", joined)  # indentation and blank lines are easy to predict and fill short contexts
    if len(joined) < 100_000:
        raise RuntimeError(
            f"only {len(joined)} characters of {split} text found in Python's standard library: "
            "this Python seems to come without its .py sources"
        )
    return joined


@functools.cache
def characters(split: str, held_out: bool, lower: bool = False) -> Tensor:
    """One part of the text as tokens, int64 ``[n]``; ``lower`` maps capitals to small letters."""
    codes = {c: i for i, c in enumerate(CHARACTERS)}
    part = _part(split, held_out)
    return torch.tensor([codes[c] for c in (part.lower() if lower else part)])


@functools.cache
def words(split: str, held_out: bool, vocabulary: int) -> Tensor:
    """One part of the text as lower-case words, digits and marks, int64 ``[n]``.

    Token 0 stands for every word that is not among the ``vocabulary - 1`` most frequent ones of the training part.
    """
    frequent = [word for word, _ in _word_counts(split).most_common(vocabulary - 1)]
    codes = {word: i + 1 for i, word in enumerate(frequent)}
    return torch.tensor([codes.get(word, 0) for word in _WORD.findall(_part(split, held_out).lower())])


@functools.cache
def _word_counts(split: str) -> Counter[str]:
    return Counter(_WORD.findall(_part(split, held_out=False).lower()))


def windows(tokens: Tensor, length: int, batch_size: int, rng: torch.Generator) -> Iterator[tuple[Tensor]]:
    """Yields batches of ``length + 1`` consecutive tokens at random places, ``([batch_size, length + 1],)``."""
    span = torch.arange(length + 1)
    while True:
        start = torch.randint(len(tokens) - length, (batch_size, 1), generator=rng)
        yield (tokens[start + span],)


def streams(tokens: Tensor, length: int, batch_size: int, rng: torch.Generator) -> Iterator[tuple[Tensor]]:
    """Yields batches as ``windows`` does, but each row goes on reading where it stopped: correlated batches."""
    span = torch.arange(length + 1)
    start = torch.randint(len(tokens), (batch_size, 1), generator=rng)
    while True:
        yield (tokens[(start + span) % len(tokens)],)
        start = start + length


def _part(split: str, held_out: bool) -> str:
    whole = text(split)
    blocks = (whole[i : i + _BLOCK] for i in range(0, len(whole), _BLOCK))
    return "".join(block for i, block in enumerate(blocks) if (i % 10 == 9) == held_out)


def _manual() -> list[str]:
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions package it apart
        return []
    return list(topics.topics.values())


def module_source(name: str) -> list[str]:
    """The source of a module without importing it: a list of one, or empty where there is none."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return []
    return [Path(spec.origin).read_text(encoding="utf-8")]


def _docstrings(source: str) -> list[str]:
    """The paragraphs of a module's documentation strings, examples of code left out."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    paragraphs = (paragraph for doc in docs if doc for paragraph in doc.split("\n\n"))
    return [paragraph for paragraph in paragraphs if ">>>" not in paragraph]
