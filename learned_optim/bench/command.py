"""The subcommand ``bench``: which suites there are. Torch is imported once one runs.

A suite is a frozen dataclass, whose fields are its options, in a module without torch, and a function
``run(config, out, command)`` that is called with an instance of it, the folder for what it writes and the command line
as text; it prints its result and returns the exit status (or nothing: 0). Options of the same name in several suites
must be of the same type and have the same default.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from tyro.conf import arg


class Suite(NamedTuple):
    """Where a suite stands: ``"module:Class"`` and ``"module:function"``."""

    config: str
    run: str


SUITES = {
    "quality": Suite("learned_optim.bench.quality_config:QualityConfig", "learned_optim.bench.quality_command:run"),
    "step": Suite("learned_optim.bench.config:StepBenchConfig", "learned_optim.bench.step_command:run"),
}


def _load(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


_CONFIGS: dict[str, Any] = {name: _load(suite.config) for name, suite in SUITES.items()}


def _texts(config: Any) -> dict[str, str]:
    """What the docstring says of each field."""
    text = (config.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", text + "\n", re.MULTILINE | re.DOTALL)
    return {name: " ".join(words.split()) for name, words in found}


def _fields() -> list[Any]:
    texts: dict[str, str] = {}
    fields: dict[str, Any] = {}
    for suite, config in _CONFIGS.items():
        hints, own = get_type_hints(config), _texts(config)
        for field in dataclasses.fields(config):
            texts[field.name] = f"{texts.get(field.name, '')} ({suite}) {own.get(field.name, '')}".strip()
            optional = type(None) in get_args(hints[field.name])
            metavar = "PATH" if optional else None  # tyro's own would be {None}|PATH
            hint = Annotated[hints[field.name], arg(help=texts[field.name], metavar=metavar)]
            fields[field.name] = (field.name, hint, dataclasses.field(default=field.default))
    suites = Literal[tuple(SUITES)]  # pyright: ignore[reportInvalidTypeForm]
    return [
        ("suite", Annotated[suites, arg(help="What is measured.")], dataclasses.field()),
        ("out", Annotated[Path | None, arg(metavar="DIR", help="Folder for the results; bench/SUITE if not given.")],
         dataclasses.field(default=None)),
        *fields.values(),
    ]  # fmt: skip


#: The options of all suites together.
Bench = dataclasses.make_dataclass(
    "Bench", _fields(), frozen=True,
    namespace={"__doc__": "Measure learned update rules against hand-designed optimizers."},
)  # fmt: skip


def config_of(command: Any) -> Any:
    """The configuration of the suite that a command line asks for.

    Raises:
        UsageError: an option of another suite, or a value out of range.
    """
    from learned_optim.cli import UsageError

    wanted = _CONFIGS[command.suite]
    own = {field.name: field for field in dataclasses.fields(wanted)}
    given = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name in ("suite", "out") or value == field.default:
            continue
        if field.name not in own:
            raise UsageError(f"bench: --{field.name.replace('_', '-')} is no option of the suite {command.suite}")
        given[field.name] = value
    try:
        return wanted(**given)
    except ValueError as error:
        raise UsageError(f"bench: {error}") from error


def command_line(command: Any) -> str:
    """The command line that would be typed for ``command``, without the folders of this machine."""
    words = ["learned-optim", "bench", "--suite", command.suite]
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name in ("suite", "out", "cache", "processes") or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{flag}", *(_portable(str(v)) for v in values)]
    return shlex.join(words)


def _portable(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word


def run(command: Any) -> int | None:
    """Run ``learned-optim bench``."""
    config = config_of(command)
    out = command.out or Path("bench") / command.suite
    return _load(SUITES[command.suite].run)(config, out, command_line(command))
