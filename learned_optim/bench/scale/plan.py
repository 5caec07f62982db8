"""Which cells are missing, and which of them tells most per minute."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from learned_optim.bench.scale.cells import Cell, Result, speedup
from learned_optim.bench.scale.config import Model, Rival, ScaleConfig, ladder
from learned_optim.bench.scale.rivals import Setting, ours, tuning

#: What a cell tells, as its weight: ours, which every comparison needs; a rival's first rate on a model; the rest of
#: its tuning; further seeds, and ours in fewer steps.
OF_OURS, OF_FIRST, OF_TUNING, OF_SEEDS = 8.0, 8.0, 4.0, 2.0
#: Floating-point operations per second, and seconds of a GPU's step and of compilation, for models not yet timed.
RATE = {"cpu": 8e10, "cuda": 1.5e14}
LEAST_STEP, COMPILATION = 12e-3, 60.0


_NOWHERE = Path()


class Entry(NamedTuple):
    """A missing cell."""

    cell: Cell
    weight: float
    seconds: float  #: that it is expected to take

    @property
    def value(self) -> float:
        """What it tells per minute; a larger model tells more, as the root of its parameters."""
        return self.weight * (self.cell.model.parameters / 1e6) ** 0.5 / (self.seconds / 60.0)


class Tuned(NamedTuple):
    """How far a rival's tuning on a model has come."""

    best: Setting | None
    tried: tuple[Setting, ...]
    missing: tuple[Setting, ...]  #: further ones may follow from these

    @property
    def done(self) -> bool:
        return not self.missing


def tuned(
    rival: Rival, models: Sequence[Model], results: Sequence[Result], elsewhere: Sequence[Result] = ()
) -> dict[str, Tuned]:
    """A rival's tuning by model, by the final held-out losses of seed 0.

    Args:
        rival: which one.
        models: that are looked at. The grid of each begins around the best of the next smaller model of all that
            was measured, whether it is one of these or not.
        results: of one device and one text.
        elsewhere: of any device and text: where a smaller model was not measured here, the best setting that it has
            there is where the larger one's grid begins. It ends, as ever, where this device's runs say.
    """
    states: dict[str, Tuned] = {}
    smaller: dict[str, Setting] = {}
    for model in ladder(models):
        losses = _losses(rival, model, results)
        missing, best = tuning(rival, losses, smaller.get(model.line))
        states[model.name] = Tuned(best, tuple(losses), tuple(missing))
        if (hint := best or _best_elsewhere(rival, model, elsewhere)) is not None:
            smaller[model.line] = hint
    return states


def _losses(rival: Rival, model: Model, results: Iterable[Result]) -> dict[Setting, float]:
    """Final losses of whole runs of seed 0, by setting."""
    return {
        r.cell.setting: r.final for r in results
        if r.cell.model == model and r.cell.seed == 0 and r.cell.setting.optimizer == rival
        and r.cell.setting.part == 1.0
    }  # fmt: skip


def _best_elsewhere(rival: Rival, model: Model, results: Sequence[Result]) -> Setting | None:
    """The best setting among the runs of that device and that text that most of the model's were made with."""
    places: dict[tuple[str, str], dict[Setting, float]] = {
        place: _losses(rival, model, (r for r in results if (r.cell.device, r.cell.data) == place))
        for place in dict.fromkeys((r.cell.device, r.cell.data) for r in results)
    }
    most = max(places.values(), key=len, default={})
    return tuning(rival, most, None)[1]


def queue(
    config: ScaleConfig,
    policies: Mapping[str, str],
    results: Sequence[Result],
    data: str,
    models: Sequence[Model],
) -> list[Entry]:
    """The missing cells of the configuration, the most telling per minute first.

    Args:
        config: what is to be measured.
        policies: fingerprints by label.
        results: what there is.
        data: fingerprint of the text.
        models: that the configuration chooses.
    """
    known = {r.cell.path(_NOWHERE).name for r in results}
    mine = [r for r in results if r.cell.device == config.device and r.cell.data in ("", data)]
    entries: dict[str, Entry] = {}

    def add(model: Model, setting: Setting, seed: int, weight: float) -> None:
        of_text = data if model.line == "text" else ""
        cell = Cell(model, setting, seed, config.device, of_text, policies.get(setting.policy, ""))
        wanted = not config.cells or any(fnmatch(cell.name, pattern) for pattern in config.cells)
        if wanted and cell.path(_NOWHERE).name not in known:
            entries.setdefault(cell.name, Entry(cell, weight, seconds(cell, mine)))

    for model in models:
        for label in policies:
            for setting in ours(label):
                for seed in range(model.seeds):
                    add(model, setting, seed, OF_SEEDS if seed else OF_OURS)
            for exponent in config.exponents:
                for setting in ours(label, exponent):
                    add(model, setting, 0, OF_TUNING)
        for rival in config.rivals:
            state = tuned(rival, models, mine, results)[model.name]
            for i, setting in enumerate(state.missing):
                add(model, setting, 0, OF_TUNING if i or state.tried else OF_FIRST)
            if state.done and state.best is not None:
                for seed in range(1, model.seeds):
                    add(model, state.best, seed, OF_SEEDS)
                for label, seed in itertools.product(policies, range(model.seeds)):
                    of_seed = [r for r in mine if r.cell.model == model and r.cell.seed == seed]
                    for setting in _shorter(ours(label), policies[label], state.best, of_seed):
                        add(model, setting, seed, OF_SEEDS)
    return sorted(entries.values(), key=lambda entry: -entry.value)


def _shorter(mine: Sequence[Setting], fingerprint: str, rival: Setting, results: Sequence[Result]) -> Iterator[Setting]:
    """The next shorter runs that are needed to compare settings of ours with a rival's; see ``cells.speedup``.

    Args:
        mine: whole runs.
        fingerprint: of the policy.
        rival: a whole run, the best of its tuning.
        results: of one model and one seed.
    """
    runs = {whole: [r for r in results if r.cell.is_part_of(whole) and r.cell.policy in ("", fingerprint)]
            for whole in (*mine, rival)}  # fmt: skip
    for setting in mine:
        if all(any(r.cell.setting == whole for r in runs[whole]) for whole in (setting, rival)):
            found = speedup(runs[setting], runs[rival])
            if found is not None and found.missing is not None:
                yield found.missing


def seconds(cell: Cell, results: Sequence[Result]) -> float:
    """Expected seconds of a cell: those of the model's other runs, or else what its operations take."""
    model = cell.model
    own = [r for r in results if r.cell.model == model]
    optimizer = [r for r in own if r.cell.setting.optimizer == cell.setting.optimizer] or own
    if optimizer:
        # Evaluations take about a fifth more.
        return 1.2 * cell.steps * statistics.median(r.step_seconds for r in optimizer)
    guess = model.work * cell.setting.part / RATE[cell.device]
    return 1.2 * guess if cell.device == "cpu" else COMPILATION + 1.2 * max(guess, LEAST_STEP * cell.steps)


def listed(entries: Sequence[Entry]) -> str:
    """The queue for the eye, in its order."""
    if not entries:
        return "no cell is missing"
    lines = [f"{entry.seconds / 60.0:7.1f}  {entry.cell.name}" for entry in entries]
    return "\n".join([f"{len(lines)} cells are missing, with the minutes that each is expected to take:", *lines])
