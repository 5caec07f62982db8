"""The subcommands ``meta-train`` and ``plot``; torch is imported once they run."""

# ruff: noqa: T201  (printing is what a command line is for)

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from tyro.conf import Positional, arg

from learned_optim.cli.errors import UsageError
from learned_optim.meta_train.config import MetaTrainConfig

if TYPE_CHECKING:
    from learned_optim.meta_train.outer_loop import MetaTrainResult

_DOC, _ARGS = (MetaTrainConfig.__doc__ or "").split("    Args:\n")
_OWN_ARGS = """    Args:
        out: folder for checkpoints, metrics and the resulting policies.
        resume: continue the run that is in the folder; where there is none yet, begin it.
        settings: TOML or JSON file of settings; options given here besides win over it, unless they are the defaults.
"""


def _fields() -> list[Any]:
    hints = get_type_hints(MetaTrainConfig)
    own: list[Any] = [
        ("out", Annotated[Path, arg(metavar="DIR")], dataclasses.field()),
        ("resume", bool, dataclasses.field(default=False)),
        ("settings", Annotated[Path | None, arg(metavar="FILE")], dataclasses.field(default=None)),
    ]
    for field in dataclasses.fields(MetaTrainConfig):
        hint = hints[field.name]
        if field.name == "start":
            hint = Annotated[hint, arg(name="from", metavar="POLICY")]
        own.append((field.name, hint, dataclasses.field(default=field.default)))
    return own


#: :class:`MetaTrainConfig` with the folder to work in.
MetaTrain = dataclasses.make_dataclass(
    "MetaTrain",
    _fields(),
    frozen=True,
    namespace={"__doc__": "Meta-train a policy: make an update rule of your own.\n\n" + _OWN_ARGS + _ARGS},
)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the curves of a meta-training run into its folder."""

    folder: Annotated[Path, Positional, arg(metavar="DIR")]
    """Folder of the run."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """PNG to write; DIR/curves.png if not given."""


def settings_of(command: Any) -> MetaTrainConfig:
    """The settings that a command line asks for."""
    given = {field.name: getattr(command, field.name) for field in dataclasses.fields(MetaTrainConfig)}
    if command.settings is None:
        return MetaTrainConfig(**given)
    defaults = MetaTrainConfig().to_dict()
    changed = {name: value for name, value in MetaTrainConfig(**given).to_dict().items() if value != defaults[name]}
    return MetaTrainConfig.from_dict({**MetaTrainConfig.from_file(command.settings).to_dict(), **changed})


def run(command: Any) -> int:
    """Run ``learned-optim meta-train``; the exit status is 128 plus the signal's number if one ended it early."""
    config = settings_of(command)
    from learned_optim.meta_train import distributed, meta_train
    from learned_optim.tasks import get_families

    for names in (config.tasks, config.validation_tasks):
        try:
            get_families(names)
        except ValueError as error:
            raise UsageError(f"meta-train: {error}") from error
    with distributed.process_group():
        result = meta_train(config, out=command.out, resume=command.resume)
        if distributed.rank() == 0:
            _report(command.out, config, result)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _report(out: Path, config: MetaTrainConfig, result: MetaTrainResult) -> None:
    done = result.history[-1]["outer_step"] + 1 if result.history else 0
    values = [m["validation"] for m in result.history if "validation" in m]
    of = "held-out loss" if config.held_out else "time"
    best = f"best validation {min([0.0, *values]):+.3f} (mean log of {of} against the start)"
    verdict = best if values else "no validation"
    print(f"{out}: {done} of {config.outer_steps} outer steps, {verdict}")
    if result.stopped_by is None:
        print(f'use it: LearnedOptimizer(model.parameters(), policy="{out / "best"}")')
    else:
        print("stopped by a signal; continue with --resume")


def plot(command: Plot) -> None:
    """Run ``learned-optim plot``."""
    from learned_optim.meta_train.checkpoint import read_metrics
    from learned_optim.meta_train.curves import draw

    out = command.out or command.folder / "curves.png"
    draw(read_metrics(command.folder), out)
    print(out)
