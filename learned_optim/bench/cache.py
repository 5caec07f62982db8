"""Finished runs on disk, and the record of how often the validation tasks were looked at."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learned_optim.bench.curves import Run, bin_edges
from learned_optim.policy.files import write_atomically

_ARRAYS = ("losses", "evaluated_at", "held_out")


class RunCache:
    """A folder of runs, one file each, named by the hash of everything that shapes the run.

    Files are replaced as a whole, so that several processes may share the folder. A damaged file counts as none and is
    replaced.

    Args:
        folder: made when the first run is stored.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.damaged: list[str] = []  #: names of the files that could not be read

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file of a run."""
        name = hashlib.sha256(_text(key).encode()).hexdigest()[:32]
        return self.folder / "runs" / name[:2] / f"{name}.npz"

    def get(self, key: Mapping[str, Any]) -> Run | None:
        """The run, or ``None``."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                if head["key"] != json.loads(_text(key)):
                    raise ValueError("another run's")
                arrays = {name: file[name].astype(np.float64) for name in _ARRAYS}
            run = Run(**arrays, **head["run"])
            if len(run.losses) != len(bin_edges(run.steps)) - 1 or len(run.held_out) != len(run.evaluated_at):
                raise ValueError("incomplete")
        except Exception:  # zipfile, zlib, numpy and json each have their own for damage
            self.damaged.append(path.name)
            return None
        return run

    def put(self, key: Mapping[str, Any], run: Run) -> None:
        """Store a run.

        Raises:
            OSError: the folder cannot be written.
        """
        scalars = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if f.name not in _ARRAYS}
        arrays = {name: getattr(run, name).astype(np.float32) for name in _ARRAYS}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, head=np.array(_text({"key": dict(key), "run": scalars})), **arrays)
        write_atomically(self.path(key), buffer.getvalue())


def log_look(folder: str | Path, policies: Mapping[str, str], tasks: Sequence[str], seeds: int, new_runs: int) -> None:
    """Note that policies were compared on tasks: choices made on the same tasks again and again fit them in the end.

    Args:
        folder: of the cache; the line goes to its ``looks.jsonl``.
        policies: fingerprints by name.
        tasks: names of the tasks.
        seeds: their number.
        new_runs: runs of learned rules that were not known before; 0 means that a known result was shown again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    line = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "policies": dict(policies), "tasks": list(tasks), "seeds": seeds, "new_runs": new_runs,
    }  # fmt: skip
    with open(folder / "looks.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def read_looks(folder: str | Path) -> list[dict[str, Any]]:
    """The lines that :func:`log_look` wrote, oldest first; a damaged line is left out."""
    path = Path(folder) / "looks.jsonl"
    looks = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            look = json.loads(line)
        except ValueError:
            continue
        if isinstance(look, dict) and isinstance(look.get("policies"), dict):
            looks.append(look)
    return looks


def _text(values: Mapping[str, Any]) -> str:
    # A first loss may be infinite; Python reads its own notation back.
    return json.dumps(values, sort_keys=True)
