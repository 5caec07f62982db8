"""From cells to figures: ours against each tuned rival, model by model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import fmean

from learned_optim.bench.curves import geometric_mean, spread
from learned_optim.bench.scale.cells import Result, speedup, time_ratio
from learned_optim.bench.scale.config import Model, Rival
from learned_optim.bench.scale.plan import Tuned, tuned
from learned_optim.bench.scale.rivals import Schedule, Setting, ours


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """Runs of one setting on a model, by seed.

    Args:
        name: of the optimizer, for readers.
        results: by seed; empty where they are missing.
        setting: of the whole runs; ``None`` of a rival that was not run.
        tuning: of a rival.
        shorter: runs with the same schedule over fewer steps.
    """

    name: str
    results: tuple[Result, ...]
    setting: Setting | None = None
    tuning: Tuned | None = None
    shorter: tuple[Result, ...] = ()

    def of_seed(self, seed: int) -> list[Result]:
        """The whole run and the shorter ones."""
        return [r for r in (*self.results, *self.shorter) if r.cell.seed == seed]

    @property
    def loss(self) -> float | None:
        """Final held-out loss, mean over the seeds; ``None`` where there is none."""
        return fmean(r.final for r in self.results) if self.results else None


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Ours against a rival.

    Args:
        steps: speedup in steps, geometric mean over the seeds that both have.
        deviation: its standard deviation over the seeds; ``None`` for one seed.
        iteration: time of an iteration over the rival's.
        seeds: how many.
        is_final: whether no run is missing that would change it: the rival is tuned, and whoever ends lower was
            trained over as few steps as it takes to end above the other.
    """

    steps: float
    deviation: float | None
    iteration: float
    seeds: int
    is_final: bool

    @property
    def time(self) -> float:
        """Speedup in time."""
        return self.steps / self.iteration


@dataclasses.dataclass(frozen=True, eq=False)
class OfModel:
    """What is known of a model.

    Args:
        model: which one.
        device: that most of its cells were made on; cells of one device and one text are compared.
        ours: by policy and schedule.
        rivals: at their best settings so far.
        others: ours at other learning rates than the default.
    """

    model: Model
    device: str
    ours: tuple[Runs, ...]
    rivals: tuple[Runs, ...]
    others: tuple[Runs, ...]

    @property
    def results(self) -> tuple[Result, ...]:
        """Of the runs that are shown."""
        return tuple(r for runs in (*self.ours, *self.rivals) for r in runs.results)


SCHEDULES: dict[Schedule, str] = {"constant": "constant lr", "decay": "with decay"}
RIVALS: dict[Rival, str] = {"adamw": "AdamW", "muon": "Muon", "soap": "SOAP"}


def compare(ours: Runs, rival: Runs) -> Comparison | None:
    """``None`` while runs are missing, or where the rival diverged."""
    its = {r.cell.seed: r for r in rival.results}
    pairs = [(r, its[r.cell.seed]) for r in ours.results if r.cell.seed in its]
    speedups = (speedup(ours.of_seed(r.cell.seed), rival.of_seed(r.cell.seed)) for r, _ in pairs)
    found = [s for s in speedups if s is not None]
    if not found:
        return None
    values = [s.value for s in found]
    iteration = time_ratio([r for r, _ in pairs], [r for _, r in pairs])
    is_final = all(s.is_final for s in found) and (rival.tuning is None or rival.tuning.done)
    return Comparison(geometric_mean(values), spread(values), iteration, len(values), is_final)


def by_model(results: Sequence[Result], models: Sequence[Model], rivals: Sequence[Rival]) -> list[OfModel]:
    """Each model with what there is of it.

    Of a model, the cells of that device and that text count that it has most of, and of a policy those of the
    fingerprint that was measured last.

    Args:
        results: all cells.
        models: in the order of the tables.
        rivals: that are to be compared with.
    """
    rows = []
    for model in models:
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in results:
            if result.cell.model == model:
                groups.setdefault((result.cell.device, result.cell.data), []).append(result)
        (device, data), own = max(groups.items(), key=lambda item: len(item[1]), default=(("", ""), []))
        own = _latest(own)
        same = [r for r in results if r.cell.device == device and r.cell.data in ("", data)]
        of_rivals = []
        for rival in rivals:
            state = tuned(rival, models, same, results)[model.name]
            name = RIVALS[rival]
            of_rivals.append(
                Runs(name, (), tuning=state) if state.best is None else _runs(name, state.best, own, state)
            )
        mine = [r for r in own if r.cell.setting.optimizer == "learned"]
        labels = sorted({r.cell.setting.policy for r in mine}) or ["default"]
        settings = [setting for label in labels for setting in ours(label)]
        whole = {r.cell.setting for r in mine if r.cell.setting.part == 1.0}
        others = sorted(whole - set(settings), key=lambda s: (s.policy, s.schedule, s.exponent))
        of_ours, of_others = (tuple(_runs(_name(s), s, mine) for s in some) for some in (settings, others))
        rows.append(OfModel(model, device, of_ours, tuple(of_rivals), of_others))
    return rows


def _runs(name: str, setting: Setting, results: Sequence[Result], tuning: Tuned | None = None) -> Runs:
    alike = [r for r in results if r.cell.is_part_of(setting)]
    own = _by_seed([r for r in alike if r.cell.setting == setting])
    return Runs(name, own, setting, tuning, _by_seed([r for r in alike if r.cell.setting != setting]))


def _name(setting: Setting) -> str:
    rate = f", lr {setting.lr:g}" if setting.exponent else ""
    return f"{setting.policy}, {SCHEDULES[setting.schedule]}{rate}"


def _by_seed(results: Sequence[Result]) -> tuple[Result, ...]:
    return tuple(sorted(results, key=lambda r: r.cell.seed))


def _latest(results: Sequence[Result]) -> list[Result]:
    newest: dict[str, tuple[str, str]] = {}
    for r in results:
        label = r.cell.setting.policy
        newest[label] = max(newest.get(label, ("", "")), (r.facts.get("date", ""), r.cell.policy))
    return [r for r in results if r.cell.policy == newest[r.cell.setting.policy][1]]
