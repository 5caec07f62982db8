"""A policy as four files in a folder: written atomically, read strictly, never executed.

====================  =======================================================================================
``model.safetensors`` the weights, float32
``config.json``       :class:`~learned_optim.rule.config.PolicyConfig` field by field, ``library`` and
                      ``library_version`` that wrote it, and three checksums: ``weights_sha256`` and
                      ``results_sha256`` of the files beside it (``null``: no results), ``config_sha256`` of all the
                      other keys
``results.json``      what was measured (see :mod:`learned_optim.policy.results`); absent for a policy without results
``README.md``         the model card, made from the others; the only file that may be edited by hand
====================  =======================================================================================

The checksums find damage, not forgery: whoever can replace one file can replace them all. Against a hostile author
stands that nothing in the files is executed, that sizes are bounded, and that every value is checked for its range.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from learned_optim import __version__
from learned_optim.policy.card import model_card
from learned_optim.policy.errors import InvalidPolicyError, PolicyNotFoundError
from learned_optim.policy.filenames import CARD, CONFIG, LIMITS, RESULTS, WEIGHTS, why_missing
from learned_optim.policy.results import validate
from learned_optim.rule.config import FORMAT_VERSION, PolicyConfig

#: Glob of what a process that was killed may have left beside a file that it was writing atomically.
TEMPORARY = ".*.tmp"

LIBRARY = "learned_optim"
_EXTRA_KEYS = ("library", "library_version", "weights_sha256", "results_sha256", "config_sha256")
_LARGEST = 1e9  # of a number in the configuration: the rule computes in float32, where larger ones overflow
_ORDER = (WEIGHTS, RESULTS, CONFIG, CARD)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class StoredPolicy(NamedTuple):
    """What the files of a policy hold."""

    config: PolicyConfig
    weights: dict[str, Tensor]
    results: dict[str, Any] | None
    source: str  #: what messages and fingerprints call it


def pack(
    config: PolicyConfig,
    weights: Mapping[str, Tensor],
    results: Mapping[str, Any] | None = None,
    *,
    repo_id: str | None = None,
) -> dict[str, bytes]:
    """The files of a policy by name, in the order in which they are to be written.

    Args:
        config: the policy's.
        weights: the policy's.
        results: what was measured, if anything.
        repo_id: the Hub repository whose card this will be; ``None`` for a card that names no repository.

    Raises:
        ValueError: what could not be loaded again: weights that are not float32, not finite or of other shapes, a
            number in the configuration that is too large, or results that are not plain JSON.
    """
    weights = {name: weight.detach().to("cpu").contiguous() for name, weight in weights.items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != config.weight_shapes():
        raise ValueError(f"weights {shapes} are not those of the configuration, {config.weight_shapes()}")
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(f"weight {name!r} is {weight.dtype}, policies are stored as float32: call policy.float()")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"weight {name!r} holds values that are not finite: such a policy is not stored")
    _check_magnitudes(config.to_dict())
    packed = {WEIGHTS: save(weights)}
    if results is not None:
        validate(results)
        packed[RESULTS] = _render(results)
        _json(packed[RESULTS], RESULTS)  # {1: 0, "1": 0} is two keys in Python and one twice in JSON
    values = {
        "library": LIBRARY,
        "library_version": __version__,
        **config.to_dict(),
        "weights_sha256": _sha256(packed[WEIGHTS]),
        "results_sha256": _sha256(packed[RESULTS]) if results is not None else None,
    }
    packed[CONFIG] = _render({**values, "config_sha256": _checksum(values)})
    packed[CARD] = model_card(config, weights, results, repo_id=repo_id).encode()
    for name, data in packed.items():
        if len(data) > LIMITS[name]:
            raise ValueError(f"{name} would take {len(data)} bytes, the limit is {LIMITS[name]}")
    return packed


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a policy's ``files`` into ``folder``, each atomically, in the order given; what else lies there stays.

    ``config.json`` holds the checksums of the files written before it, so that an interrupted write leaves a folder
    which is refused on loading, never one that loads a mixture of old and new.
    """
    if RESULTS not in files:
        (folder / RESULTS).unlink(missing_ok=True)  # those of another policy
    for name, data in files.items():
        write_atomically(folder / name, data)


def files_in(folder: Path) -> dict[str, bytes]:
    """The policy's files in ``folder`` as they are, in the order in which they are to be written."""
    return {name: (folder / name).read_bytes() for name in _ORDER if (folder / name).is_file()}


def read(folder: Path, source: str) -> StoredPolicy:
    """The policy in ``folder``; ``source`` is what messages and fingerprints call it.

    Raises:
        PolicyNotFoundError: a file is missing.
        InvalidPolicyError: the files are damaged, edited, incomplete, foreign, or made for a newer version.
    """
    try:
        values = _json(_contents(folder, CONFIG, source), CONFIG)
        config = _config(values)
        raw = _contents(folder, WEIGHTS, source)
        _compare(raw, values["weights_sha256"], WEIGHTS)
        weights = _tensors(raw, config)
        results = None
        if values["results_sha256"] is not None:
            raw = _contents(folder, RESULTS, source)
            _compare(raw, values["results_sha256"], RESULTS)
            results = _json(raw, RESULTS)
            validate(results)
        elif (folder / RESULTS).exists():
            raise ValueError(f"{RESULTS} does not belong to it: {CONFIG} says that there are no results")
    except ValueError as error:
        raise InvalidPolicyError(f"{source} is refused: {error}") from error
    return StoredPolicy(config, weights, results, source)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` as a whole: a reader sees the old file or the new one, also after a power cut.

    Its folder is made if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with naming(path), open(temporary, "xb") as file:  # "x" follows no link that was put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows syncs no folders
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with naming(path):
                os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # so say file systems that cannot
                raise
        finally:
            os.close(folder)


def temporary_path(path: Path) -> Path:
    """A new name beside ``path``, one of :data:`TEMPORARY`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the body say which file they are about: those of writing, a full disk above all, do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _contents(folder: Path, name: str, source: str) -> bytes:
    path = folder / name
    if not path.is_file():
        present = os.listdir(folder) if folder.is_dir() else []
        if (folder / "best" / CONFIG).is_file():
            raise PolicyNotFoundError(f"{source} is the folder of a meta-training run: give {Path(source, 'best')}")
        raise PolicyNotFoundError(f"{source} is not a learned-optim policy: {why_missing(name, present)}")
    with open(path, "rb") as stream:
        data = stream.read(LIMITS[name] + 1)
    if len(data) > LIMITS[name]:
        raise ValueError(f"{name} is larger than {LIMITS[name] // 1_000_000} MB, no policy is")
    return data


def _config(values: dict[str, Any]) -> PolicyConfig:
    """What ``config.json`` says, once its version, its checksum, its own layout and every value were checked."""
    version, maker = values.get("format_version"), values.get("library_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        # Before the checksum: how a newer format is checked is not known here.
        maker = maker if isinstance(maker, str) and re.fullmatch(r"[\w.+-]{1,40}", maker) else "a newer version"
        raise ValueError(
            f"made by learned-optim {maker} in policy format {version}, and this is learned-optim {__version__}, which "
            f"reads formats up to {FORMAT_VERSION}: upgrade, in the clone with `git pull && pip install .`"
        )
    if values.get("library") != LIBRARY:
        raise ValueError(f'{CONFIG} was not written by learned-optim (no "library": "{LIBRARY}" in it)')
    missing = [key for key in _EXTRA_KEYS if key not in values]
    if missing:
        raise ValueError(f"{CONFIG} lacks the keys {missing}")
    if not isinstance(maker, str):
        raise ValueError(f"{CONFIG}: key 'library_version' must hold str, found {maker!r:.80}")
    for key in ("weights_sha256", "results_sha256", "config_sha256"):
        if not (key == "results_sha256" and values[key] is None) and not (
            isinstance(values[key], str) and _SHA256.fullmatch(values[key])
        ):
            raise ValueError(f"{CONFIG}: key {key!r} must hold 64 hexadecimal digits, found {values[key]!r:.80}")
    if _checksum({k: v for k, v in values.items() if k != "config_sha256"}) != values["config_sha256"]:
        raise ValueError(
            f"{CONFIG} was damaged or edited after it was written (its config_sha256 does not match): get it again "
            "with force_download=True, or make one of your own with Policy(PolicyConfig(...)).save_pretrained(folder)"
        )
    rest = {key: value for key, value in values.items() if key not in _EXTRA_KEYS}
    _check_magnitudes(rest)
    try:
        return PolicyConfig.from_dict(rest)
    except ValueError as error:
        raise ValueError(f"{CONFIG}: {str(error)[:400]}") from error


def _check_magnitudes(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and abs(number) > _LARGEST:
                raise ValueError(f"{CONFIG}: key {key!r} holds {number!r:.40}, beyond +-{_LARGEST:g}")


def _tensors(data: bytes, config: PolicyConfig) -> dict[str, Tensor]:
    """The tensors in a safetensors file, if they are exactly those that ``config`` asks for."""
    try:
        entries = dict(deserialize(data))
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} is not a readable safetensors file ({error})") from error
    shapes = config.weight_shapes()
    for problem, names in (("lacks the tensors", shapes.keys() - entries.keys()),
                           ("holds tensors that do not belong there:", entries.keys() - shapes.keys())):  # fmt: skip
        if names:
            raise ValueError(f"{WEIGHTS} {problem} {sorted(names)!s:.200}")
    tensors = {}
    for name, shape in shapes.items():
        dtype, stored, raw = (entries[name][key] for key in ("dtype", "shape", "data"))
        if dtype != "F32" or tuple(stored) != shape:
            raise ValueError(f"{WEIGHTS}: tensor {name!r} is {dtype} {stored!s:.80}, expected F32 {list(shape)}")
        tensors[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{WEIGHTS}: tensor {name!r} holds values that are not finite")
    return tensors


def _json(data: bytes, name: str) -> dict[str, Any]:
    """The object in ``data``, which must be laid out exactly as :func:`_render` does it.

    The layout is compared because JSON has many ways to write one value, and repeated keys: without it a damaged
    file could pass.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    try:
        values = json.loads(data.decode("utf-8"), parse_constant=refuse)
        if not isinstance(values, dict):
            raise ValueError("it does not hold an object")
        if _render(values) != data:
            raise ValueError("it is not laid out as learned-optim writes it, so it was damaged or edited")
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    return values


def _render(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _checksum(values: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _compare(data: bytes, wanted: str, name: str) -> None:
    if _sha256(data) != wanted:
        raise ValueError(
            f"{name} is damaged or was replaced (its sha256 is not the one in {CONFIG}): get it again with "
            "force_download=True"
        )


def file_in_the_way(folder: Path) -> Path | None:
    """What is no folder where one is to be made, or in the path to it."""
    return next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
