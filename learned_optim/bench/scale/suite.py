"""The suite: cells one after the other, the most telling per minute first, until there are none or time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from learned_optim.bench.quality_config import cache_folder
from learned_optim.bench.scale import text
from learned_optim.bench.scale.cells import Result, read, read_all, store
from learned_optim.bench.scale.config import MODELS, Model, ScaleConfig
from learned_optim.bench.scale.plan import Entry, queue
from learned_optim.bench.scale.train import Problem, problem, train
from learned_optim.policy.policy import Policy

CELLS, CHECKPOINTS = "cells", "checkpoints"
#: Called with what is done, and what is left in the queue, seconds included.
OnCell = Callable[[str, list[Entry]], None]


class Scale:
    """The cells of a folder and those that are missing.

    Args:
        config: what is measured.
        policies: by label.
        folder: finished cells are files of its ``cells``, unfinished ones of its ``checkpoints``. Files written by
            several machines may be put together there.

    Raises:
        ImportError: the text must be made anew, and ``tokenizers`` is not installed.
        ValueError: a damaged cell; ``cuda`` where there is none.
    """

    def __init__(self, config: ScaleConfig, policies: Mapping[str, Policy], folder: Path) -> None:
        self.config, self.policies, self.folder = config, policies, folder
        # From here on: reading the text counts too.
        self._deadline = time.monotonic() + 60.0 * config.minutes if config.minutes else float("inf")
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("ScaleConfig.device is 'cuda', and torch finds no GPU: 'cpu' runs the small models")
        self.models = config.chosen()
        of_text = any(model.line == "text" for model in self.models)
        self.corpus = text.cached(cache_folder(config.cache)) if of_text else None
        self.results: list[Result] = read_all(folder / CELLS)
        self._problems: dict[Model, Problem] = {}

    def queue(self) -> list[Entry]:
        """What is missing, the most telling per minute first."""
        prints = {label: policy.fingerprint() for label, policy in self.policies.items()}
        data = self.corpus.fingerprint if self.corpus is not None else ""
        return queue(self.config, prints, self.results, data, self.models)

    def shown(self) -> list[Model]:
        """What tables have: all models, or with ``models`` or ``quick`` those that were asked for."""
        return list(self.models if self.config.models or self.config.quick else MODELS.values())

    def run(self, progress: OnCell | None = None) -> bool:
        """Make the missing cells; with ``minutes``, as long as they are expected to end in time.

        Returns:
            Whether none is missing any more.
        """
        while entries := self.queue():
            left = self._deadline - time.monotonic()
            # One that was stopped goes on first, however long it is: that is what checkpoints are for.
            begun = [e for e in entries if self._checkpoint(e).is_file()]
            fitting = begun or [e for e in entries if e.seconds <= left]
            if left <= 0.0 or not fitting:
                return False
            entry = fitting[0]
            if progress is not None:
                progress(f"training {entry.cell.name}", entries)
            result = self._train(entry)
            if result is None:
                return False
            # As it will be read by others: with the digits that the file has.
            self.results.append(read(store(self.folder / CELLS, result)))
        return True

    def _train(self, entry: Entry) -> Result | None:
        model = entry.cell.model
        if model not in self._problems:
            self._problems = {model: problem(model, self.config.device, self.corpus)}  # one at a time in memory
        policy = self.policies.get(entry.cell.setting.policy)
        return train(entry.cell, self._problems[model], policy, self._checkpoint(entry), self._deadline)

    def _checkpoint(self, entry: Entry) -> Path:
        return entry.cell.path(self.folder / CHECKPOINTS).with_suffix(".pt")
