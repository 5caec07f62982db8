"""Policies as files: load and save, strictly, safetensors only."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from learned_optim.policy import Policy, PolicyConfig, expected_shapes

WEIGHTS, CONFIG, RESULTS = "model.safetensors", "config.json", "results.json"


def bundled() -> dict[str, Path]:
    """Folders of the policies that come with the package, by name."""
    for root in (Path(str(files("learned_optim"))) / "pretrained", Path(__file__).parent.parent / "pretrained"):
        if root.is_dir():
            return {p.name: p for p in sorted(root.iterdir()) if (p / CONFIG).is_file()}
    return {}


def load_policy(name_or_path: str | Path) -> Policy:
    """Load a bundled policy by name, or one from a folder."""
    known = bundled()
    if isinstance(name_or_path, str) and name_or_path in known:
        return _load_folder(known[name_or_path], f"bundled:{name_or_path}")
    folder = Path(name_or_path)
    if folder.is_dir():
        return _load_folder(folder, str(name_or_path))
    raise ValueError(f"unknown policy {str(name_or_path)!r}: no such folder; bundled policies: {', '.join(known)}")


def _load_folder(folder: Path, source: str) -> Policy:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a learned-optim policy: it holds no {name}")
    try:
        config = PolicyConfig.from_dict(json.loads((folder / CONFIG).read_text()))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not a readable safetensors file ({error})") from error
    shapes = expected_shapes(config)
    for problem, names in (("missing", shapes.keys() - tensors.keys()), ("extra", tensors.keys() - shapes.keys())):
        if names:
            raise ValueError(f"{folder / WEIGHTS}: {problem} tensors {sorted(names)}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float32:
            raise ValueError(f"{folder / WEIGHTS}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                             f"torch.float32 {shapes[name]}")  # fmt: skip
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{folder / WEIGHTS}: tensor {name!r} holds values that are not finite")
    policy = Policy(config, source=source)
    policy.load_state_dict(tensors)
    if (folder / RESULTS).is_file():
        policy.results = json.loads((folder / RESULTS).read_text())
    return policy


def save_policy(policy: Policy, folder: str | Path, results: dict[str, Any] | None = None) -> None:
    """Write ``model.safetensors``, ``config.json`` and, if there are any, ``results.json``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in policy.weights().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(policy.config.to_dict(), indent=2) + "\n")
    results = results if results is not None else policy.results
    if results is not None:
        (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
