"""The subcommands ``meta-train`` and ``plot``; torch is imported once they run."""

# ruff: noqa: T201  (printing is what a command line is for)

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from tyro.conf import Positional, arg

from learned_optim.cli.errors import UsageError, with_flags
from learned_optim.meta_train.config import MetaTrainConfig

_DOC, _ARGS = (MetaTrainConfig.__doc__ or "").split("    Args:\n")
_OWN_ARGS = """    Args:
        out: folder for checkpoints, metrics and the resulting policies.
        resume: continue the run that is in the folder; where there is none yet, begin it.
        settings: TOML or JSON file of settings; options given here besides win over it. With ``--resume`` the run's own
            ``config.toml`` if not given.
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
            hint = Annotated[hint, arg(metavar="POLICY")]
        own.append((field.name, hint, dataclasses.field(default=field.default)))
    return own


def _defaults(command: Any) -> Any:
    """The command with the settings of the file that it names, or of the run that it resumes: what is not given here.

    Raises:
        FileNotFoundError, ValueError: that file is none.
    """
    file = command.settings
    if file is None and command.resume:
        from learned_optim.meta_train.checkpoint import CONFIG

        file = command.out / CONFIG if (command.out / CONFIG).is_file() else None
    return None if file is None else dataclasses.replace(command, **dataclasses.asdict(MetaTrainConfig.from_file(file)))


#: :class:`MetaTrainConfig` with the folder to work in.
MetaTrain = dataclasses.make_dataclass(
    "MetaTrain",
    _fields(),
    frozen=True,
    namespace={
        "__doc__": "Meta-train a policy: make an update rule of your own.\n\n" + _OWN_ARGS + _ARGS,
        "defaults": _defaults,
    },
)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the curves of a meta-training run into its folder."""

    folder: Annotated[Path, Positional, arg(metavar="DIR")]
    """Folder of the run."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """PNG to write; DIR/curves.png if not given."""


def settings_of(command: Any) -> MetaTrainConfig:
    """The settings that a command line asks for.

    Raises:
        UsageError: a value out of range.
    """
    given = {field.name: getattr(command, field.name) for field in dataclasses.fields(MetaTrainConfig)}
    try:
        return MetaTrainConfig(**given)
    except ValueError as error:
        raise UsageError(f"meta-train: {with_flags(str(error))}") from error


class _Terminated(BaseException):
    """SIGTERM came in."""


@contextlib.contextmanager
def _terminations() -> Iterator[None]:
    """SIGTERM raises in the body, once the outer step under way is saved, instead of ending the process unheard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(command: Any) -> int:
    """Run ``learned-optim meta-train``; the exit status is 128 plus the signal's number if one ended it early."""
    config = settings_of(command)
    from learned_optim.meta_train import distributed, meta_train
    from learned_optim.meta_train.result import improved
    from learned_optim.tasks import get_families

    for names in (config.tasks, config.validation_tasks):
        try:
            get_families(names)
        except ValueError as error:
            raise UsageError(f"meta-train: {error}") from error
    with _terminations(), distributed.process_group():
        try:
            result = meta_train(config, out=command.out, resume=command.resume)
        except (KeyboardInterrupt, _Terminated) as stop:
            if distributed.rank() == 0:
                _report_stop(command.out, config)
            return 128 + (signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
        if distributed.rank() == 0:
            _report(command.out, config, result.history)
            if improved(result.history):
                best = os.path.join(os.curdir, command.out, "best")  # without a dot it may be read as a Hub id
                print(f'use it: LearnedOptimizer(model.parameters(), policy="{best}")')
    return 0


def _report(out: Path, config: MetaTrainConfig, history: Sequence[dict[str, Any]]) -> None:
    from learned_optim.meta_train.result import outer_steps_done, verdict

    done = outer_steps_done(history)
    steps = f"{done} of {config.outer_steps} outer steps"
    if done > config.outer_steps:  # on resuming with fewer
        steps = f"{done} outer steps were made already, {config.outer_steps} were asked for"
    print(f"{out}: {steps}, {verdict(history)}")


def _report_stop(out: Path, config: MetaTrainConfig) -> None:
    from learned_optim.meta_train.checkpoint import CURRENT, read_metrics

    if (out / CURRENT).exists():
        _report(out, config, read_metrics(out))
        print("stopped by a signal; continue with --resume")
    else:
        print(f"{out}: stopped by a signal before anything was saved; begin again with --resume")


def plot(command: Plot) -> None:
    """Run ``learned-optim plot``."""
    from learned_optim.meta_train.checkpoint import read_metrics
    from learned_optim.meta_train.curves import draw

    out = command.out or command.folder / "curves.png"
    if not out.suffix:
        out = out.with_suffix(".png")
    metrics = read_metrics(command.folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(metrics, out)
    print(out)
