"""Many runs, in this process or in several, from the cache where they are known."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from learned_optim.bench.cache import RunCache
from learned_optim.bench.curves import Run
from learned_optim.bench.runs import RunSpec, train


class Progress(NamedTuple):
    """What a caller is told after every run, and once before the first."""

    done: int  #: runs
    total: int
    cost_done: float  #: expected seconds of one process
    cost_total: float
    what: str  #: the last finished run, in words
    cached: bool  #: whether it was known


OnProgress = Callable[[Progress], None]


class Pool:
    """Makes runs and keeps them. A context manager: leaving it, an interruption included, ends its processes.

    Args:
        cache: where runs are kept.
        processes: at the same time; 1 makes them in this process. Others are started afresh ("spawn"), so that a
            script that uses them needs ``if __name__ == "__main__":``.
        progress: called after every run.
    """

    def __init__(self, cache: RunCache, processes: int, progress: OnProgress | None) -> None:
        self.cache = cache
        self.processes = processes
        self.new: list[RunSpec] = []  #: runs that were made, not known before
        self._progress = progress
        self._done = self._total = 0
        self._cost_done = self._cost_total = 0.0
        self._executor: ProcessPoolExecutor | None = None
        self._before = set(multiprocessing.active_children())

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor is not None:
            clean = exception[0] is None
            if not clean:
                for child in set(multiprocessing.active_children()) - self._before:
                    child.terminate()
            self._executor.shutdown(wait=clean, cancel_futures=True)

    def announce(self, specs: Sequence[RunSpec]) -> None:
        """Count runs that will be made, so that the time left is known."""
        self._total += len(specs)
        self._cost_total += sum(spec.cost for spec in specs)
        self._tell("", False)

    def run(self, specs: Sequence[RunSpec]) -> dict[RunSpec, Run]:
        """The runs, all of which were announced."""
        results: dict[RunSpec, Run] = {}
        todo = []
        for spec in specs:
            known = self.cache.get(spec.key())
            if known is None:
                todo.append(spec)
            else:
                results[spec] = known
                self._finished(spec, True)
        if self.processes == 1 or len(todo) < 2:
            for spec in todo:
                results[spec] = run = train(spec)
                self.cache.put(spec.key(), run)
                self._finished(spec, False)
            return results
        return results | self._in_processes(todo)

    def _in_processes(self, specs: list[RunSpec]) -> dict[RunSpec, Run]:
        for spec in specs:
            try:
                pickle.dumps(spec)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"task {spec.task_name!r} cannot be sent to another process ({error}); use processes=1"
                ) from error
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.processes, context, initializer=_quiet_interruption)
        results: dict[RunSpec, Run] = {}
        waiting = iter(specs)
        running: dict[Future[Run], RunSpec] = {}
        while True:
            # No more than the processes take: an interruption then leaves nothing behind.
            while len(running) < self.processes and (spec := next(waiting, None)) is not None:
                running[self._executor.submit(_train_and_store, spec, str(self.cache.folder))] = spec
            if not running:
                return results
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                spec = running.pop(future)
                results[spec] = future.result()
                self._finished(spec, False)

    def _finished(self, spec: RunSpec, cached: bool) -> None:
        self._done += 1
        self._cost_done += spec.cost
        if not cached:
            self.new.append(spec)
        self._tell(f"{spec.task_name}, {spec.setting.optimizer} {spec.setting}, seed {spec.seed}", cached)

    def _tell(self, what: str, cached: bool) -> None:
        if self._progress is not None:
            self._progress(Progress(self._done, self._total, self._cost_done, self._cost_total, what, cached))


def _train_and_store(spec: RunSpec, folder: str) -> Run:
    run = train(spec)
    RunCache(Path(folder)).put(spec.key(), run)
    return run


def _quiet_interruption() -> None:
    # Ctrl-C reaches every process of a terminal; only the parent should speak.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
