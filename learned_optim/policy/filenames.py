"""Names and greatest sizes of the files of a policy, for files.py and for hub.py, which needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

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
