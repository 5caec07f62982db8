"""The quality suite: learned rules against optimizers tuned per task. :func:`run_quality` makes the runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from learned_optim.bench.ablations import ablations
from learned_optim.bench.baselines import ADAMW_1E3, DEFAULT_LR, DEFAULT_WEIGHT_DECAY, Setting, grid, missing
from learned_optim.bench.cache import RunCache, log_look
from learned_optim.bench.curves import Run, final_loss
from learned_optim.bench.pool import OnProgress, Pool
from learned_optim.bench.quality_config import QualityConfig
from learned_optim.bench.runs import RunSpec, behaviour, find_task
from learned_optim.policy.policy import Policy
from learned_optim.tasks import FAMILIES, Task, get_families
from learned_optim.tasks.base import one_thread

REFERENCE = "AdamW, tuned"
FIXED = "AdamW 1e-3"
_BASELINES = {"adamw": REFERENCE, "schedule-free": "schedule-free AdamW, tuned", "muon": "Muon, tuned",
              "soap": "SOAP, tuned", "sgd": "SGD with momentum, tuned"}  # fmt: skip

Figure = Literal["training loss", "held-out loss at the end", "lowest held-out loss"]
#: What a setting is chosen by, of each run; ``None`` where there is no held-out data.
CHOSEN_BY: Mapping[Figure, Callable[[Run], float | None]] = {
    "training loss": final_loss,
    "held-out loss at the end": lambda run: run.final_held_out,
    "lowest held-out loss": lambda run: run.lowest_held_out,
}
HELD_OUT: tuple[Figure, ...] = ("held-out loss at the end", "lowest held-out loss")

Role = Literal["learned", "learned, tuned", "baseline", "ablation"]


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """Something that is measured: an optimizer with one setting, or with the best of several for each task.

    Args:
        name: in tables.
        role: what it is.
        settings: what it is tuned over.
        policy: of a learned one.
        label: of the policy that was asked for; ablations bear that of the policy they were made from.
    """

    name: str
    role: Role
    settings: tuple[Setting, ...]
    policy: Policy | None = None
    label: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """How a contender did on a task at the setting with the lowest value of a figure (mean over the seeds)."""

    setting: Setting
    runs: tuple[Run, ...]  #: one per seed

    @property
    def diverged(self) -> bool:
        """Whether any of the runs did."""
        return any(run.diverged for run in self.runs)


@dataclasses.dataclass(frozen=True, eq=False)
class TaskResult:
    """All contenders on one task."""

    task: str
    split: str  #: of the zoo, or empty
    steps: int
    chosen_by: Mapping[Figure, Mapping[str, Choice]]  #: by the figure that was lowest and the contender's name

    @property
    def choices(self) -> Mapping[str, Choice]:
        """By the contender's name, at the setting with the lowest final training loss."""
        return self.chosen_by["training loss"]


@dataclasses.dataclass(frozen=True, eq=False)
class QualityResult:
    """What :func:`run_quality` measured; :mod:`learned_optim.bench.report` makes figures and tables of it."""

    config: QualityConfig
    contenders: tuple[Contender, ...]
    tasks: tuple[TaskResult, ...]
    notes: tuple[str, ...]
    new_runs: int  #: made now; the others were known

    def subject(self) -> Contender:
        """The first policy with nothing tuned."""
        return next(c for c in self.contenders if c.role == "learned")


def run_quality(
    config: QualityConfig,
    *,
    tasks: Sequence[Task] | None = None,
    policies: Mapping[str, Policy] | None = None,
    progress: OnProgress | None = None,
) -> QualityResult:
    """Train every task with every setting, or take the runs from the cache.

    Interrupted, it can be called again and goes on where it was. Nothing is printed.

    Args:
        config: what is run.
        tasks: tasks of one's own, instead of the zoo's that ``config.tasks`` names.
        policies: policies by label, instead of those that ``config.policies`` names.
        progress: called after every run.

    Raises:
        ValueError: an unknown task or policy, or settings out of range.
        OSError: the cache cannot be written.
    """
    config = config.effective()
    policies = load_policies(config.policies) if policies is None else policies
    contenders, notes = _contenders(config, policies)
    wanted: list[str | Task] = list(tasks) if tasks is not None else list(_names(config))
    cache = RunCache(config.cache_folder())
    with Pool(cache, config.processes, progress) as pool:
        plans = [_Plan(task, config, contenders) for task in wanted]
        for plan in plans:
            pool.announce(plan.first)
        for plan in plans:
            plan.make(pool, plan.first)
            if config.keep and config.seeds > 1:
                rest = plan.rest()
                pool.announce(rest)
                plan.make(pool, rest)
    results = [
        TaskResult(p.name, p.split, p.steps, {f: {c.name: p.choose(c, f) for c in contenders} for f in CHOSEN_BY})
        for p in plans
    ]
    if cache.damaged:
        notes.append(f"{len(cache.damaged)} damaged files in the cache were made again")
    if any(p.split == "validation" for p in plans):
        new = sum(spec.setting.optimizer == "learned" for spec in pool.new)
        prints = {label: policy.fingerprint() for label, policy in policies.items()}
        log_look(cache.folder, prints, [p.name for p in plans], config.seeds, new)
    return QualityResult(config, tuple(contenders), tuple(results), tuple(notes), len(pool.new))


def load_policies(names: Sequence[str]) -> dict[str, Policy]:
    """Policies by label: the name itself, or as much of a folder's end as tells it from the others.

    Raises:
        ValueError, FileNotFoundError: as ``Policy.from_pretrained``; or a name given twice.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"a policy is named twice: {', '.join(names)}")
    parts = {name: Path(name).expanduser().parts for name in names}
    labels = {}
    for name, own in parts.items():
        depth = 1
        while depth < len(own) and any(p[-depth:] == own[-depth:] for n, p in parts.items() if n != name):
            depth += 1
        labels["/".join(own[-depth:]) or name] = name
    return {label: Policy.from_pretrained(name) for label, name in labels.items()}


def _names(config: QualityConfig) -> list[str]:
    return [f"{family.name}/{i}" for family in get_families(config.tasks) for i in range(config.instances)]


def _contenders(config: QualityConfig, policies: Mapping[str, Policy]) -> tuple[list[Contender], list[str]]:
    if not policies:
        raise ValueError("there is no policy to measure")
    contenders: list[Contender] = []
    notes: list[str] = []

    def learned(policy: Policy, setting: Setting) -> Setting:
        decay = DEFAULT_WEIGHT_DECAY
        return dataclasses.replace(
            setting, weight_decay=decay, policy=policy.fingerprint(), backend=config.backend
        )  # fmt: skip

    default = Setting("learned", DEFAULT_LR)
    for number, (label, policy) in enumerate(policies.items()):
        contenders.append(Contender(f"learned: {label}", "learned", (learned(policy, default),), policy, label))
        if number == 0 and config.tune_lr:
            settings = tuple(learned(policy, setting) for setting in grid("learned", quick=config.quick))
            contenders.append(Contender(f"learned: {label}, lr tuned", "learned, tuned", settings, policy, label))
    for baseline in config.baselines:
        why = missing(baseline)
        if why is not None:
            notes.append(why)
            continue
        contenders.append(Contender(_BASELINES[baseline], "baseline", grid(baseline, quick=config.quick)))
    contenders.append(Contender(FIXED, "baseline", (ADAMW_1E3,)))
    if config.ablations:
        label, policy = next(iter(policies.items()))
        rows, remarks = ablations(policy, Policy.from_pretrained(config.gru) if config.gru else None)
        notes += remarks
        for row in rows:
            setting = learned(row.policy, dataclasses.replace(default, memory=row.memory))
            contenders.append(Contender(row.name, "ablation", (setting,), row.policy, label))
    return contenders, notes


class _Plan:
    """The runs of one task."""

    def __init__(self, task: str | Task, config: QualityConfig, contenders: Sequence[Contender]) -> None:
        self.config, self.contenders = config, contenders
        family = FAMILIES.get(task.rpartition("/")[0]) if isinstance(task, str) else None
        self.split = family.split if family else ""
        self._task, task = task, find_task(task)
        self.name = task.name
        self.steps = min(task.length, config.max_length) if config.max_length else task.length
        with one_thread():
            self._behaviour, seconds = behaviour(task)
        self._cost = 1.5 * seconds * self.steps
        self._specs: dict[tuple[Setting, int], RunSpec] = {}  # contenders share settings, and shared ones are run once
        self._runs: dict[RunSpec, Run] = {}
        rest = range(1, config.seeds)
        self.first = [
            spec for c in contenders for s in c.settings
            for seed in (0, *(rest if len(c.settings) == 1 or not config.keep else ()))
            if (spec := self._spec(s, seed, c.policy)) is not None
        ]  # fmt: skip

    def _spec(self, setting: Setting, seed: int, policy: Policy | None) -> RunSpec | None:
        """A new spec, or ``None`` if there is one."""
        if (setting, seed) in self._specs:
            return None
        spec = RunSpec(
            self._task, self.steps, seed, setting, policy, self.config.evaluations, self._behaviour, self._cost
        )  # fmt: skip
        self._specs[setting, seed] = spec
        return spec

    def make(self, pool: Pool, specs: Sequence[RunSpec]) -> None:
        self._runs |= pool.run(specs)

    def rest(self) -> list[RunSpec]:
        """The best settings of the first seed by each of the figures, on the other seeds."""
        specs = []
        for c in self.contenders:
            for figure in CHOSEN_BY:
                best = self._ranked(c.settings, figure, seeds=1)[: self.config.keep]
                specs += [self._spec(s, seed, c.policy) for s in best for seed in range(1, self.config.seeds)]
        return [spec for spec in specs if spec is not None]

    def _of(self, setting: Setting) -> list[Run]:
        specs = [self._specs.get((setting, seed)) for seed in range(self.config.seeds)]
        return [self._runs[spec] for spec in specs if spec in self._runs]

    def _ranked(self, settings: Sequence[Setting], figure: Figure, seeds: int) -> list[Setting]:
        return sorted(settings, key=lambda s: _mean(figure, self._of(s)[:seeds]))

    def choose(self, contender: Contender, figure: Figure) -> Choice:
        complete = [s for s in contender.settings if len(self._of(s)) == self.config.seeds]
        best = self._ranked(complete, figure, self.config.seeds)[0]
        return Choice(best, tuple(self._of(best)))


def _mean(figure: Figure, runs: Sequence[Run]) -> float:
    """Mean of a figure, the training loss where it is not known; infinite if any run diverged: that never wins."""
    if any(run.diverged for run in runs):
        return math.inf
    values = [CHOSEN_BY[figure](run) for run in runs]
    return sum(final_loss(run) if value is None else value for run, value in zip(runs, values, strict=True)) / len(runs)
