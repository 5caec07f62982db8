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
from learned_optim.bench.runs import Job, train


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
        self.new: list[Job] = []  #: made, not found
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

    def announce(self, jobs: Sequence[Job]) -> None:
        """Count jobs that will be run, so that the time left is known."""
        self._total += len(jobs)
        self._cost_total += sum(job.cost for job in jobs)
        self._tell("", False)

    def run(self, jobs: Sequence[Job]) -> dict[Job, Run]:
        """The runs of announced jobs."""
        results: dict[Job, Run] = {}
        todo = []
        for job in jobs:
            known = self.cache.get(job.key())
            if known is None:
                todo.append(job)
            else:
                results[job] = known
                self._finished(job, True)
        if self.processes == 1 or len(todo) < 2:
            for job in todo:
                results[job] = run = train(job)
                self.cache.put(job.key(), run)
                self._finished(job, False)
            return results
        return results | self._in_processes(todo)

    def _in_processes(self, jobs: list[Job]) -> dict[Job, Run]:
        for job in jobs:
            try:
                pickle.dumps(job)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                name = job.task if isinstance(job.task, str) else job.task.name
                raise ValueError(
                    f"task {name!r} cannot be sent to another process ({error}); use processes=1"
                ) from error
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.processes, context, initializer=_quiet_interruption)
        results: dict[Job, Run] = {}
        waiting = iter(jobs)
        running: dict[Future[Run], Job] = {}
        while True:
            # No more than the processes take: an interruption then leaves nothing behind.
            while len(running) < self.processes and (job := next(waiting, None)) is not None:
                running[self._executor.submit(_train_and_store, job, str(self.cache.folder))] = job
            if not running:
                return results
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                results[job] = future.result()
                self._finished(job, False)

    def _finished(self, job: Job, cached: bool) -> None:
        self._done += 1
        self._cost_done += job.cost
        if not cached:
            self.new.append(job)
        name = job.task if isinstance(job.task, str) else job.task.name
        self._tell(f"{name}, {job.setting.optimizer} {job.setting}, seed {job.seed}", cached)

    def _tell(self, what: str, cached: bool) -> None:
        if self._progress is not None:
            self._progress(Progress(self._done, self._total, self._cost_done, self._cost_total, what, cached))


def _train_and_store(job: Job, folder: str) -> Run:
    run = train(job)
    RunCache(Path(folder)).put(job.key(), run)
    return run


def _quiet_interruption() -> None:
    # Ctrl-C reaches every process of a terminal; only the parent should speak.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
