"""Cells: one run each, in one file each. What a cell is called, what identifies it, what is kept of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from learned_optim.bench.curves import DIVERGED_ABOVE, FLOOR, Values, first_reaches
from learned_optim.bench.scale.config import Model
from learned_optim.bench.scale.rivals import Setting, shorter
from learned_optim.policy.files import write_atomically

#: Goes up when runs made before are no longer comparable.
FORMAT = 1
#: Held-out losses taken along a run, at equal distances.
EVALUATIONS = 40
#: Of them that a smoothed one is the mean of: it and those before it.
SMOOTHING = 3


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run to be made.

    Args:
        model: what is trained.
        setting: the optimizer.
        seed: number of the seed.
        device: ``cpu`` or ``cuda``.
        data: fingerprint of the text; empty for images, which are the same everywhere.
        policy: fingerprint of the policy (``learned`` only).
    """

    model: Model
    setting: Setting
    seed: int
    device: str
    data: str = ""
    policy: str = ""

    @property
    def name(self) -> str:
        return f"{self.model.name}.{self.setting.text}.s{self.seed}"

    @property
    def steps(self) -> int:
        """How many the run takes."""
        return round(self.model.steps * self.setting.part)

    def is_part_of(self, whole: Setting) -> bool:
        """Whether this is the run of that setting, or one over fewer steps."""
        return dataclasses.replace(self.setting, part=1.0) == whole

    def key(self) -> dict[str, Any]:
        """Everything that shapes the run, as plain JSON types."""
        values = dataclasses.asdict(self)
        for name in ("seeds", "device"):  # what is done with a model, not what it is
            del values["model"][name]
        if self.setting.part == 1.0:  # cells of whole runs are called what they were before there were others
            del values["setting"]["part"]
        return {"format": FORMAT, "evaluations": EVALUATIONS, **values}

    def path(self, folder: Path) -> Path:
        """The file; runs that differ in anything have different ones."""
        return folder / f"{self.name}.{self.device}-{hashlib.sha256(_text(self.key()).encode()).hexdigest()[:8]}.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A finished cell.

    Args:
        cell: which one.
        evaluated_at: steps after which held-out losses were taken, from 0 to the end.
        held_out: those losses; ``inf`` from where the run diverged.
        losses: mean training losses between them, one fewer.
        step_seconds: of an iteration (gradient, clipping and update), typical of the run: processor seconds of one
            thread, or seconds of a GPU.
        update_seconds: the optimizer's part of it.
        facts: date, versions, name of the GPU.
    """

    cell: Cell
    evaluated_at: Values
    held_out: Values
    losses: Values
    step_seconds: float
    update_seconds: float
    facts: dict[str, str]

    @property
    def final(self) -> float:
        """Held-out loss at the end; ``inf`` where it diverged."""
        return float(self.held_out[-1])

    @property
    def diverged(self) -> bool:
        """Not finite at the end, or above 1.5 times the first one."""
        return not math.isfinite(self.final) or self.final > DIVERGED_ABOVE * float(self.held_out[0])

    def smoothed(self) -> tuple[Values, Values]:
        """Steps, and the mean of each held-out loss with the two before it."""
        padded = np.concatenate([np.full(SMOOTHING - 1, self.held_out[0]), self.held_out])
        return self.evaluated_at, np.lib.stride_tricks.sliding_window_view(padded, SMOOTHING).mean(1)


class Speedup(NamedTuple):
    """Of ours over a rival."""

    value: float
    missing: Setting | None  #: the run that would change it; others may follow from that one

    @property
    def is_final(self) -> bool:
        """Whether no run is missing that would change it."""
        return self.missing is None


def speedup(ours: Sequence[Result], rival: Sequence[Result]) -> Speedup | None:
    """How many times fewer steps one needs to end where the other ends; ``None`` over a rival that diverged.

    A learning rate that decays over the last fifth of T steps says nothing of a run of fewer steps, which would decay
    earlier. So whoever ends lower is trained over fewer steps, too: T over the number with which it would end where
    the other ends, or the inverse if that is the rival. With a constant rate any step of ours is the end of a run:
    there it is the first step at which ours, smoothed, is at or below the rival's end. Smoothing takes away from ours
    only: what is low once by chance does not count.

    Within [0.01, 100], and 0.01 if ours diverged.

    Args:
        ours: one seed's runs of one setting, the whole one among them.
        rival: likewise.
    """
    whole, other = (max(runs, key=lambda r: r.cell.steps) for runs in (ours, rival))
    if other.diverged:
        return None
    if whole.diverged:
        return Speedup(FLOOR, None)
    length, missing = float(whole.cell.steps), None
    if (reached := reached_at(whole, other.final)) is not None:
        ratio = length / reached
    elif whole.final > other.final:
        steps, missing = ending_at(rival, whole.final)
        ratio = steps / length
    else:
        steps, missing = ending_at(ours, other.final)
        ratio = length / steps
    return Speedup(min(max(ratio, FLOOR), 1.0 / FLOOR), missing)


def reached_at(run: Result, loss: float) -> float | None:
    """The first step at which a run with a constant rate, smoothed or at its end, is at or below a loss, if any."""
    if run.cell.setting.schedule != "constant":
        return None
    step = first_reaches(*run.smoothed(), loss)
    return float(run.cell.steps) if step is None and run.final <= loss else step


class Ending(NamedTuple):
    """A run that would end at some loss."""

    steps: float
    missing: Setting | None  #: the next shorter run, unless one ends above that loss or is as short as any will be


def ending_at(runs: Sequence[Result], loss: float) -> Ending:
    """The length of run that would end at a loss, between those of the two runs next to it.

    Interpolated linearly in the final loss and the logarithm of the length. If all end lower, the shortest run's; if
    there is but one, the step at which it reaches the loss, which is too late where its rate decays.

    Args:
        runs: of one seed and setting; the longest ends at the loss or lower.
        loss: held out.
    """
    longest, *rest = sorted(runs, key=lambda r: -r.cell.steps)
    before = longest
    for run in rest:
        if run.diverged:
            return Ending(before.cell.steps, None)
        if run.final > loss:
            part = (loss - before.final) / (run.final - before.final)
            return Ending(before.cell.steps * (run.cell.steps / before.cell.steps) ** part, None)
        before = run
    reached = None if rest else first_reaches(longest.evaluated_at, longest.held_out, loss)
    following = None if before.final == loss else shorter(before.cell.setting)
    return Ending(reached or before.cell.steps, following)


def time_ratio(ours: Iterable[Result], rival: Iterable[Result]) -> float:
    """Time of an iteration over the rival's.

    The gradient is the same work for both: its quickest measurement stands for both, whatever else was running.
    """
    ours, rival = list(ours), list(rival)
    gradient = min(r.step_seconds - r.update_seconds for r in (*ours, *rival))
    mine, its = (gradient + min(r.update_seconds for r in results) for results in (ours, rival))
    return mine / its


def store(folder: Path, result: Result) -> Path:
    """Write a cell's file, as a whole or not at all."""

    def numbers(values: Values) -> list[float | None]:
        return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]

    content = {
        "cell": result.cell.name, "key": result.cell.key(), "parameters": result.cell.model.parameters,
        "evaluated_at": [int(t) for t in result.evaluated_at], "held_out": numbers(result.held_out),
        "losses": numbers(result.losses), "step_seconds": float(f"{result.step_seconds:.4g}"),
        "update_seconds": float(f"{result.update_seconds:.4g}"), "facts": result.facts,
    }  # fmt: skip
    path = result.cell.path(folder)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def read(path: Path) -> Result:
    """A cell's file.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        key = content["key"]
        if key["format"] != FORMAT:
            raise ValueError(f"its format is {key['format']}, this version reads {FORMAT}")
        cell = Cell(
            Model(**key["model"]), Setting(**key["setting"]), key["seed"], key["device"], key["data"], key["policy"]
        )
        at, held_out, losses = (
            np.array([math.inf if v is None else v for v in content[name]], dtype=float)
            for name in ("evaluated_at", "held_out", "losses")
        )
        if not len(at) == len(held_out) == len(losses) + 1:
            raise ValueError(
                f"it has {len(at)} evaluations, {len(held_out)} held-out and {len(losses)} training losses"
            )
        return Result(cell, at, held_out, losses, content["step_seconds"], content["update_seconds"], content["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a cell of the scale suite: {error!r}; move it away, and the cell is made again"
        ) from error


def read_all(folder: Path) -> list[Result]:
    """Every cell of a folder, by name.

    Raises:
        ValueError: a damaged file.
    """
    return [read(path) for path in sorted(folder.glob("*.json"))]


def _text(values: Any) -> str:
    return json.dumps(values, sort_keys=True)
