"""Cells: one run each, in one file each. What a cell is called, what identifies it, what is kept of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learned_optim.bench.curves import DIVERGED_ABOVE, FLOOR, Values, first_reaches
from learned_optim.bench.scale.config import Model
from learned_optim.bench.scale.rivals import Setting
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
        """Of the run."""
        return round(self.model.steps * self.setting.part)

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


def speedup(ours: Result, rival: Result) -> float | None:
    """How many times fewer steps ours needs to the rival's loss at its end; ``None`` over a rival that diverged.

    ``T / t`` with T the length of the runs and t the first step at which ours, smoothed, is at or below the rival's
    final held-out loss. Where ours never is: ``t' / T`` with t' the step at which the rival reaches the final loss of
    ours, and no more than 1. Smoothing takes away from ours only: what is low once by chance does not count, and the
    rival's losses stand as they are, since a mean over a learning rate that decays would make them higher.
    Within [0.01, 100], and 0.01 if ours diverged.
    """
    if rival.diverged:
        return None
    if ours.diverged:
        return FLOOR
    length = float(rival.evaluated_at[-1])
    mine = first_reaches(*ours.smoothed(), rival.final)
    ratio = (
        length / mine
        if mine is not None
        else (first_reaches(rival.evaluated_at, rival.held_out, ours.final) or length) / length
    )
    return min(max(ratio, FLOOR), 1.0 / FLOOR)


def speedup_by_length(ours: Sequence[Result], rival: Result) -> float | None:
    """The same for runs with a schedule: ``T / t`` with t the length of the run of ours that ends where the rival ends.

    A learning rate that decays over the last fifth of T steps tells nothing of a run of fewer steps, which would decay
    earlier. So t is interpolated between the lengths of two runs, linearly in the final loss and the logarithm of the
    length. If the shortest one still ends lower than the rival, its length is t.

    Args:
        ours: one seed's runs of one setting, of any lengths, the whole one among them.
        rival: a whole run.
    """
    whole, *rest = sorted(ours, key=lambda r: -float(r.evaluated_at[-1]))
    within = speedup(whole, rival)
    if within is None or whole.diverged or whole.final > rival.final:
        return within
    length = before = math.log(float(whole.evaluated_at[-1]))
    loss = whole.final
    for run in rest:
        now = math.log(float(run.evaluated_at[-1]))
        if run.diverged or run.final > rival.final:
            if not run.diverged:
                length = before + (now - before) * (rival.final - loss) / (run.final - loss)
            break
        length, before, loss = now, now, run.final
    return max(within, float(rival.evaluated_at[-1]) / math.exp(length))


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
