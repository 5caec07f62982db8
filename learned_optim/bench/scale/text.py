"""The text: documentation and source code that installed packages and the system ship. A proxy for text that people
train on; nothing is downloaded.

Files are told apart by a hash of their name: one in a hundred is held out. Files of equal content count once, and a
paragraph that a training file holds is taken out of the held-out ones. A byte-pair vocabulary is made of a part of the
training text, and all of it becomes tokens, which are kept in one file: where that lies in the cache it is used,
whatever machine it was made on.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learned_optim.bench.scale.config import VOCABULARY, Model
from learned_optim.policy.files import write_atomically

FORMAT = 1
#: Characters, of all files together and of each.
LARGEST, LARGEST_FILE = 160_000_000, 200_000
SAMPLE = 20_000_000
HELD_OUT_SHARE = 100  # one file in so many
_SYSTEM = ("/usr/share/doc", "/usr/share/man", "/usr/share/info")
_SUFFIXES = (".py", ".md", ".rst", ".txt")
#: Folders of tests, which are hardly text, and of data sets.
_LEFT_OUT = {"test", "tests", "testing", "datasets", "data", "__pycache__", "locale", "idlelib"}


class Corpus(NamedTuple):
    """Tokens, and what they are called in results."""

    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    characters: float  #: per token, of the held-out text
    fingerprint: str


def corpus_path(cache: Path, vocabulary: int = VOCABULARY) -> Path:
    """The file of the corpus in the cache."""
    return cache / f"text-{FORMAT}-{vocabulary}.npz"


def load(cache: Path, vocabulary: int = VOCABULARY) -> Corpus:
    """The corpus of the cache, or a new one that is put there.

    Raises:
        ImportError: there is none in the cache, and ``tokenizers`` is not installed.
        RuntimeError: too little text was found on this machine.
    """
    path = corpus_path(cache, vocabulary)
    if not path.is_file():
        documents = list(_documents())
        write_atomically(path, _encode(documents, vocabulary))
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        train, held_out = file["train"], file["held_out"]
        fingerprint = hashlib.sha256(train.tobytes() + held_out.tobytes()).hexdigest()[:12]
        return Corpus(train, held_out, float(file["characters"]), fingerprint)


def batch(tokens: Tensor, model: Model, rng: torch.Generator) -> Tensor:
    """``[batch, context + 1]`` tokens at random places, on the tokens' device."""
    start = torch.randint(len(tokens) - model.context, (model.batch, 1), generator=rng).to(tokens.device)
    return tokens[start + torch.arange(model.context + 1, device=tokens.device)].long()


def held_out_rows(corpus: Corpus, model: Model, count: int) -> Tensor:
    """``count`` sequences (fewer where there is less text) at equal distances in the held-out text."""
    length = model.context + 1
    count = min(count, len(corpus.held_out) // length)
    starts = np.linspace(0, len(corpus.held_out) - length, count).astype(int)
    rows = corpus.held_out[starts[:, None] + np.arange(length)]
    return torch.from_numpy(rows.astype(np.int64))


def as_tensor(tokens: NDArray[np.uint16], device: str) -> Tensor:
    """In two bytes each, which torch indexes as int16 only."""
    return torch.from_numpy(tokens.astype(np.int16)).to(device)


def _files() -> Iterator[Path]:
    roots = [*_SYSTEM, sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "/usr/lib/python3"]
    for root in dict.fromkeys(roots):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in _LEFT_OUT)
            for name in sorted(names):
                page = folder.startswith("/usr/share/man") and name.endswith(".gz")
                if page or name.removesuffix(".gz").endswith(_SUFFIXES):
                    yield Path(folder) / name


def _documents() -> Iterator[tuple[bool, str]]:
    """Whether it is held out, and a file's text, in the order of their hashes until there is enough."""
    order = sorted(dict.fromkeys(_files()), key=lambda path: zlib.crc32(str(path).encode()))
    seen: set[bytes] = set()
    characters = 0
    for path in order:
        text = _read(path)
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 400 or digest in seen:
            continue
        seen.add(digest)
        characters += len(text)
        # By name: copies of a file in several packages, a little changed, stay together.
        yield zlib.crc32(path.name.encode()) % HELD_OUT_SHARE == 0, text
        if characters >= LARGEST:
            return


def _read(path: Path) -> str:
    """The beginning of a file; empty where it cannot be read or is no text."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw[:LARGEST_FILE].decode("utf-8", errors="ignore" if len(raw) > LARGEST_FILE else "strict")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""


def _encode(documents: Sequence[tuple[bool, str]], vocabulary: int) -> bytes:
    """The file of a corpus."""
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        raise ImportError(
            "the text needs tokenizers: pip install tokenizers, or give --cache the folder of a machine that has it"
        ) from error
    train = [text for held_out, text in documents if not held_out]
    known = {hash(part) for text in train for part in _paragraphs(text)}
    held_out = ["\n\n".join(p for p in _paragraphs(text) if hash(p) not in known) for apart, text in documents if apart]
    held_out = [text for text in held_out if len(text) >= 400]
    if sum(map(len, train)) < 1_000_000 or sum(map(len, held_out)) < 10_000:
        raise RuntimeError(
            f"only {sum(map(len, train)):,} characters of text to train on and {sum(map(len, held_out)):,} to hold out "
            "found in installed packages and system documentation: give --cache the folder of a machine that has more"
        )
    tokenizer = ByteLevelBPETokenizer()
    budget = SAMPLE
    sample = [text for text in train if (budget := budget - len(text)) > 0]
    tokenizer.train_from_iterator(sample, vocab_size=vocabulary, special_tokens=["<end>"], show_progress=False)

    def tokens(texts: Sequence[str]) -> NDArray[np.uint16]:
        pieces = []
        for i in range(0, len(texts), 200):  # all at once would hold every token's text and place
            pieces += [np.array([*e.ids, 0], dtype=np.uint16) for e in tokenizer.encode_batch(list(texts[i : i + 200]))]
        return np.concatenate(pieces)

    ours, apart = tokens(train), tokens(held_out)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, train=ours, held_out=apart, characters=sum(map(len, held_out)) / len(apart))
    return buffer.getvalue()


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


@functools.cache
def cached(cache: Path) -> Corpus:
    """:func:`load`, once per process."""
    return load(cache)
