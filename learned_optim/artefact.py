"""A policy as four files in a folder: written atomically, read strictly, never executed.

====================  =======================================================================================
``model.safetensors`` the weights, float32
``config.json``       :class:`~learned_optim.policy.PolicyConfig` field by field, ``library`` and
                      ``library_version`` that wrote it, and three checksums: ``weights_sha256`` and
                      ``results_sha256`` of the files beside it (``null``: no results), ``config_sha256`` of all the
                      other keys
``results.json``      what was measured (see :mod:`learned_optim.card`); absent for a policy without results
``README.md``         the model card, made from the others; the only file that may be edited by hand
====================  =======================================================================================

The checksums find damage, not forgery: whoever can replace one file can replace them all. Against a hostile author
stands that nothing in the files is executed, that sizes are bounded, and that every value is checked for its range.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from learned_optim import __version__, card
from learned_optim.errors import InvalidPolicyError, PolicyNotFoundError
from learned_optim.files import CARD, CONFIG, LIMITS, PICKLES, RESULTS, WEIGHTS
from learned_optim.policy import FORMAT_VERSION, Policy, PolicyConfig, expected_shapes

LIBRARY = "learned_optim"
_EXTRA_KEYS = ("library", "library_version", "weights_sha256", "results_sha256", "config_sha256")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def pack(policy: Policy, results: Mapping[str, Any] | None = None, *, repo_id: str | None = None) -> dict[str, bytes]:
    """The files of ``policy`` by name, in the order in which they are to be written.

    Args:
        policy: what to write.
        results: what was measured; ``policy.results`` if ``None``.
        repo_id: the Hub repository whose card this will be; ``None`` for a card that names no repository.

    Raises:
        ValueError: weights that could not be loaded again (not float32, not finite, of other shapes), or results
            that are not plain JSON.
    """
    weights = {name: weight.detach().to("cpu").contiguous() for name, weight in policy.weights().items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != expected_shapes(policy.config):
        raise ValueError(f"weights {shapes} are not those of the configuration, {expected_shapes(policy.config)}")
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(f"weight {name!r} is {weight.dtype}, policies are stored as float32: call policy.float()")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"weight {name!r} holds values that are not finite: such a policy is not stored")
    results = policy.results if results is None else results
    packed = {WEIGHTS: save(weights)}
    if results is not None:
        card.validate_results(results)
        packed[RESULTS] = _render(results)
    values = {
        "library": LIBRARY,
        "library_version": __version__,
        **policy.config.to_dict(),
        "weights_sha256": _sha256(packed[WEIGHTS]),
        "results_sha256": _sha256(packed[RESULTS]) if results is not None else None,
    }
    packed[CONFIG] = _render({**values, "config_sha256": _checksum(values)})
    packed[CARD] = card.model_card(policy.config.to_dict(), results, fingerprint=policy.fingerprint(), repo_id=repo_id).encode()
    for name, data in packed.items():
        if len(data) > LIMITS[name]:
            raise ValueError(f"{name} would take {len(data)} bytes, the limit is {LIMITS[name]}")
    return packed


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write ``files`` into ``folder``, each atomically, in the order given; what else lies there stays.

    ``config.json`` holds the checksums of the files written before it, so that an interrupted write leaves a folder
    which is refused on loading, never one that loads a mixture of old and new.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        temporary = folder / f".{name}.{secrets.token_hex(8)}.tmp"
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def read(folder: Path, source: str) -> Policy:
    """The policy in ``folder``; ``source`` is what messages and fingerprints call it.

    Raises:
        PolicyNotFoundError: a file is missing.
        InvalidPolicyError: the files are damaged, edited, incomplete, or made for a newer version.
    """
    return unpack({name: data for name in (CONFIG, WEIGHTS, RESULTS) if (data := _contents(folder, name)) is not None}, source, folder)
