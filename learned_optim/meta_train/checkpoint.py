"""The folder of a run: checkpoints that are whole or absent, metrics, and one run at a time.

DIR/config.toml            the settings
DIR/checkpoint.pt          where the run stands; ``checkpoint.previous.pt`` is the one before,
                           ``checkpoint.damaged.pt`` one that could not be read
DIR/metrics.jsonl          a line per outer step
DIR/best/                  the policy that validation liked best, as an artefact
DIR/final/                 the policy after the last outer step
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, TextIO

import torch

from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.policy.files import TEMPORARY, file_in_the_way, naming, temporary_path, write_atomically

#: Of what a checkpoint holds; others are refused.
FORMAT = 4
CURRENT, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
METRICS, CONFIG, LOCK = "metrics.jsonl", "config.toml", ".lock"


def check_folder(path: str | Path, resume: bool) -> None:
    """What a run's folder can be refused for before anything is written.

    Raises:
        NotADirectoryError: there is a file.
        BlockingIOError: another process is running in the folder.
        FileExistsError: the folder holds a run, and ``resume`` is false.
    """
    folder = Path(path)
    if (file := file_in_the_way(folder)) is not None:
        raise NotADirectoryError(f"the run is written into the folder {folder}, but {file} is a file")
    if (folder / LOCK).exists():
        _lock(folder).close()
    _check_resumed(folder, resume)


def _lock(folder: Path) -> TextIO:
    """The lock of a run's folder, held until it is closed."""
    lock = open(folder / LOCK, "a")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        what = f"another process is meta-training in {folder}: wait for it or use another folder"
        raise BlockingIOError(what) from error
    return lock


def _check_resumed(folder: Path, resume: bool) -> None:
    # Settings and an empty log alone are left by a run that failed, or was ended, in its first outer step.
    metrics = folder / METRICS
    if not resume and ((folder / CURRENT).exists() or (metrics.exists() and metrics.stat().st_size > 0)):
        raise FileExistsError(f"{folder} already holds a run: continue it with --resume, or use another folder")


class RunFolder:
    """One run's folder, locked against a second run.

    Args:
        path: made if it is not there.
        resume: continue a run that is there.

    Raises:
        FileExistsError: the folder holds a run, and ``resume`` is false.
        BlockingIOError: another process is running in this folder.
        PermissionError, OSError: the folder cannot be written; said before any work is done.
    """

    def __init__(self, path: str | Path, resume: bool) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        try:
            _check_resumed(self.path, resume)
            for pattern in (TEMPORARY, f"*/{TEMPORARY}"):  # of a run that was killed
                for left_over in self.path.glob(pattern):
                    left_over.unlink()
            probe = self.path / ".probe"
            write_atomically(probe, b"\0" * 1_000_000)  # a full disk is better met now than after an hour
            probe.unlink()
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.close()

    def start(self, config: MetaTrainConfig) -> None:
        """Note the settings."""
        write_atomically(self.path / CONFIG, config.to_toml().encode())

    def save(self, state: dict[str, Any]) -> None:
        """Make ``state`` the current checkpoint and keep the one before."""
        buffer = io.BytesIO()
        torch.save({**state, "format": FORMAT}, buffer)
        current = self.path / CURRENT
        data = buffer.getvalue()
        if current.exists():
            # A link, not a move: at no moment is there no current checkpoint.
            temporary = temporary_path(self.path / PREVIOUS)
            try:
                os.link(current, temporary)
                os.replace(temporary, self.path / PREVIOUS)
            except OSError:  # file systems without links; where the reason is another, this raises as well
                write_atomically(self.path / PREVIOUS, current.read_bytes())
            finally:
                temporary.unlink(missing_ok=True)  # where both already were one file, replacing did nothing
        write_atomically(current, data)

    def load(self, config: MetaTrainConfig) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or ``None`` if there is none.

        A damaged one is renamed, with a warning that names it, so that no later save makes it the previous one in
        place of that which could be read.

        Raises:
            ValueError: it was made with other settings (they are named) or by another version, or none that is there
                can be read.
        """
        damaged = []
        for name in (CURRENT, PREVIOUS):
            path = self.path / name
            if not path.exists():
                continue
            try:
                state = _read(path)
                # Those of another version may have other names.
                saved = MetaTrainConfig.from_dict(state["config"]) if state.get("format") == FORMAT else None
            except MemoryError:
                raise
            except Exception as error:  # what reading damaged bytes raises is no closed list
                damaged.append(f"{path} ({type(error).__name__})")
                continue
            if saved is None:
                raise ValueError(f"{path} was made by another version of learned_optim: start again in another "
                                 f"folder, from {str(self.path / 'best')!r}")  # fmt: skip
            # More outer steps, and more patience, only mean that the run goes on for longer.
            free = ("outer_steps:", "patience:", "threads:")
            differing = [d for d in saved.differences(config) if not d.startswith(free)]
            if differing:
                raise ValueError(f"{path} was made with other settings ({'; '.join(differing)}): "
                                 "resume with the same ones, or use another folder")  # fmt: skip
            if damaged:
                os.replace(self.path / CURRENT, self.path / DAMAGED)
                warnings.warn(f"{damaged[0]} is damaged; continuing from {path}, the damaged one is now {DAMAGED}",
                              RuntimeWarning, stacklevel=2)  # fmt: skip
            return state
        if damaged:
            raise ValueError(f"no checkpoint can be read: {', '.join(damaged)}; start again in another folder")
        return None

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to the metrics."""
        path = self.path / METRICS
        with naming(path), open(path, "a") as file:
            file.write(json.dumps(metrics) + "\n")

    def rewind(self, outer_step: int) -> list[dict[str, Any]]:
        """Drop the metrics of outer steps that the checkpoint does not know; returns those it does."""
        path = self.path / METRICS
        known = [m for m in _whole_lines(path) if m["outer_step"] < outer_step] if path.exists() else []
        write_atomically(path, "".join(json.dumps(m) + "\n" for m in known).encode())
        return known


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint. Any way of being damaged raises something."""
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        broken = archive.testzip()  # torch itself compares no checksums: flipped bits would be loaded as numbers
    if broken is not None:
        raise zipfile.BadZipFile(f"{broken} does not have its checksum")
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, a dict per outer step.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the file is damaged throughout.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run: it has no {METRICS}")
    metrics = _whole_lines(path)
    if not metrics and path.read_bytes().count(b"\n"):
        raise ValueError(f"{path} is damaged: none of its lines can be read")
    return metrics


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The metrics of a file, without lines that whatever ended the run cut off in the middle."""
    whole = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            continue
        if isinstance(metrics, dict) and "outer_step" in metrics:
            whole.append(metrics)
    return whole
