"""Two processes that stay, or four: functions of a test module run in all at once, over gloo.

Starting a process costs seconds, so one pair serves all tests of a module:

    ranks = pytest.fixture(scope="module")(two_processes)

    def test_...(ranks):
        first, second = ranks(function_of_the_module, argument)   # in both; the rank comes as the first argument
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

SECONDS = 120


class Ranks:
    """Call it with a function, to be importable by name, and arguments that can be pickled."""

    def __init__(self, pipes: list[Any]) -> None:
        self._pipes = pipes

    def __call__(self, function: Callable, *arguments: Any) -> list[Any]:
        """What each process returned.

        Raises:
            AssertionError: a function failed; with its traceback.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(SECONDS), f"process {rank} did not answer"
            answers.append(pipe.recv())
        for rank, (failure, _) in enumerate(answers):
            assert not failure, f"process {rank}:\n{failure}"
        return [answer for _, answer in answers]


def two_processes() -> Iterator[Ranks]:
    """A fixture's body."""
    yield from _processes(2)


def four_processes() -> Iterator[Ranks]:
    """Another's; they take twice as long to start."""
    yield from _processes(4)


def _processes(size: int) -> Iterator[Ranks]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe() for _ in range(size)]
        started = [
            context.Process(target=_serve, args=(rank, size, ends[rank][1], str(Path(folder) / "store")), daemon=True)
            for rank in range(size)
        ]
        for process in started:
            process.start()
        for _, theirs in ends:
            theirs.close()
        try:
            yield Ranks([ours for ours, _ in ends])
        finally:
            for ours, _ in ends:
                ours.close()
            for process in started:
                process.join(10)
                if process.is_alive():
                    process.kill()


def _serve(rank: int, size: int, pipe: Any, store: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS // 2)
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", module="learned_optim")
                warnings.filterwarnings("error", message=".*learned_optim.*")
                answer = ("", function(rank, *arguments))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
    torch.distributed.destroy_process_group()
