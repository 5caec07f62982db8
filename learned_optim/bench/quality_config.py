"""What a run of the quality suite is made of; free of torch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, get_args

Baseline = Literal["adamw", "schedule-free", "muon", "soap", "sgd"]

#: What ``quick`` runs: three cheap and unlike tasks.
QUICK_TASKS = ("val_mlp_letters", "val_generated_tables", "val_lstm_word_tied")
QUICK_LENGTH = 60


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """Learned update rules against hand-designed optimizers that are tuned for every single task.

    Args:
        policies: what is measured: bundled names, folders, or Hub repositories. The first one is the subject of the
            summary; the others stand beside it.
        tasks: families of the zoo, or the tags ``validation``, ``train``, ``all``. The default is what choices
            between policies are made on.
        instances: tasks drawn from each family.
        seeds: runs of every setting on every task, with other initial parameters and batches. Three are the least
            that show a spread.
        max_length: cap of the runs' lengths, in inner steps; 0 takes each task's own.
        baselines: which optimizers are tuned per task. The reference is AdamW, so it is always among them.
        keep: settings of each tuned optimizer that are run on the seeds after the first: the best ones of the first
            seed, by each of the figures that settings are chosen by: final training loss, held-out loss at the end and
            lowest held-out loss. 0 runs all of them on all seeds, nearly twice the work of ``keep=4`` at three seeds.
        tune_lr: measure the first policy also with its learning rate and schedule tuned per task, out of six.
        ablations: measure the first policy also with parts of it taken away, see ``learned_optim.bench.ablations``.
        gru: policy with a GRU cell for the ablations; empty takes an untrained one.
        evaluations: held-out losses taken along each run, denser at its beginning.
        processes: runs made at the same time, each with one thread.
        backend: how the learned rule is run, as in ``LearnedOptimizer``.
        cache: folder of finished runs; none means ``learned_optim/bench`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        quick: three tasks, 60 steps, one seed and few settings: a look at the tool, not a measurement.

    Raises:
        ValueError: a value out of range, with what was found.
    """

    policies: tuple[str, ...] = ("default",)
    tasks: tuple[str, ...] = ("validation",)
    instances: int = 1
    seeds: int = 3
    max_length: int = 0
    baselines: tuple[Baseline, ...] = ("adamw", "schedule-free", "muon", "soap", "sgd")
    keep: int = 0
    tune_lr: bool = True
    ablations: bool = False
    gru: str = ""
    evaluations: int = 16
    processes: int = 1
    backend: Literal["auto", "eager", "compiled"] = "auto"
    cache: Path | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"QualityConfig.{name} must be {wanted}, found {getattr(self, name)!r}")

        for name in ("instances", "seeds", "evaluations", "processes"):
            require(getattr(self, name) >= 1, name, "1 or more")
        for name in ("max_length", "keep"):
            require(getattr(self, name) >= 0, name, "0 or more")
        require(len(self.policies) > 0, "policies", "at least one name")
        require(len(self.tasks) > 0, "tasks", "at least one name")
        known = get_args(Baseline)
        require(all(name in known for name in self.baselines), "baselines", f"names out of {known}")
        require("adamw" in self.baselines, "baselines", "a list with 'adamw', which is the reference")
        require(self.backend in ("auto", "eager", "compiled"), "backend", "'auto', 'eager' or 'compiled'")

    def effective(self) -> QualityConfig:
        """What is run: itself, or with ``quick`` what that stands for."""
        if not self.quick:
            return self
        length = min(self.max_length or QUICK_LENGTH, QUICK_LENGTH)
        tasks = QUICK_TASKS if self.tasks == ("validation",) else self.tasks
        return dataclasses.replace(
            self, tasks=tasks, seeds=1, instances=1, max_length=length, evaluations=min(self.evaluations, 4)
        )

    def cache_folder(self) -> Path:
        """Where finished runs are kept."""
        return cache_folder(self.cache)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field that shapes the figures (not the folder and the number of processes)."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {k: v for k, v in values.items() if k not in ("cache", "processes")}


def cache_folder(given: Path | None) -> Path:
    """``given``, or ``learned_optim/bench`` in the user's cache."""
    if given is not None:
        return given.expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification asks to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "learned_optim" / "bench"
