"""Client processes by the dozen: ``huggingface_hub`` reads its environment once, and importing torch takes seconds.

So one process imports torch, and forks for every client. The child sets its environment before it imports
``huggingface_hub``, which its parent never does, and is a process with modules of its own in every other way.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT, TESTS

AT_ONCE = 4
#: A process with threads is no good to fork.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str

    def output(self) -> str:
        """What it printed, if it succeeded."""
        assert self.returncode == 0, self.stderr
        return self.stdout


class Clients:
    """The process that forks; everything it writes lies in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = itertools.count()
        self._started: list[Path] = []
        self._parent = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "helpers.hub_clients"], stdin=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(TESTS))), **_ONE_THREAD},
        )  # fmt: skip

    def start(self, code: str, environment: dict[str, str]) -> Path:
        """Run ``code`` in a client; returns what :meth:`wait` takes."""
        while sum(not (folder / "returncode").exists() for folder in self._started) >= AT_ONCE:
            time.sleep(0.01)
        folder = self._folder / str(next(self._ids))
        folder.mkdir()
        self._started.append(folder)
        assert self._parent.stdin
        self._parent.stdin.write(json.dumps([code, environment, str(folder)]) + "\n")
        self._parent.stdin.flush()
        return folder

    def wait(self, folder: Path, timeout: float = 100.0) -> Finished:
        end = time.monotonic() + timeout
        while not (folder / "returncode").exists():
            assert time.monotonic() < end, (folder / "stderr").read_text()
            assert self._parent.poll() is None, "the forking process has ended"
            time.sleep(0.01)
        return Finished(
            int((folder / "returncode").read_text()), *((folder / n).read_text() for n in ("stdout", "stderr"))
        )

    def run(self, code: str, environment: dict[str, str]) -> Finished:
        return self.wait(self.start(code, environment))

    def close(self) -> None:
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait(timeout=10)


def command(*arguments: str) -> str:
    """Code of a client that runs ``learned-optim``."""
    return f"from learned_optim.cli import main; import sys; sys.exit(main({list(arguments)!r}))"


def _child(code: str, environment: dict[str, str], folder: Path) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        exec(compile(code, "<client>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / "writing").write_text(str(status))
    (folder / "writing").rename(folder / "returncode")
    os._exit(0)


def _serve() -> None:
    import signal

    import learned_optim.optimizer
    import learned_optim.policy.hub  # noqa: F401

    assert "huggingface_hub" not in sys.modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    for line in sys.stdin:
        code, environment, folder = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _child(code, environment, Path(folder))


if __name__ == "__main__":
    _serve()
