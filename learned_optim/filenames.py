"""Names and greatest sizes of the files that a policy is stored in; what they hold: :mod:`learned_optim.artefact`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

WEIGHTS, CONFIG, RESULTS, CARD = "model.safetensors", "config.json", "results.json", "README.md"

#: Bytes. JSON is bounded tightly because it takes thirty times its size once parsed.
LIMITS = {WEIGHTS: 50_000_000, CONFIG: 1_000_000, RESULTS: 1_000_000, CARD: 1_000_000}

_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def why_missing(missing: str, present: Iterable[str]) -> str:
    """A clause for a message: ``missing`` is not there, and what is there instead if that explains it."""
    pickles = sorted(name for name in present if name.lower().endswith(_PICKLES))
    if missing == WEIGHTS and pickles:
        return f"it holds no {missing}, only {pickles[0]}, and pickled weights are never loaded: they can run code"
    return f"it holds no {missing}"


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the body say which file they are about: those of writing, a full disk above all, do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
