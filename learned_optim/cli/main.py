"""The command ``learned-optim``: which subcommands there are, and how their errors are said.

A subcommand is a dataclass, whose fields are its arguments (see tyro), and a function that takes it; :data:`COMMANDS`
names both. Where the dataclass has a method ``defaults``, what it returns of an instance is what arguments that are not
given are. Neither is imported before the subcommand is chosen, and the dataclass belongs into a module without torch,
so that no ``--help`` waits for it. The function prints its result and returns its exit status (or nothing: 0); its
errors are exceptions.

Exit status: 0 done · 1 failed, one line on stderr says why · 2 wrong arguments, one line likewise · 130 interrupted ·
143 terminated.
"""

# ruff: noqa: T201  (printing is what a command line is for)

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from learned_optim import __version__
from learned_optim.cli.errors import UsageError
from learned_optim.policy.errors import CachedPolicyWarning

PROGRAM = "learned-optim"


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        summary: half a line for ``learned-optim --help``.
        config: ``"module:Class"`` of the dataclass of its arguments.
        run: ``"module:function"`` of what is called with an instance of it.
    """

    summary: str
    config: str
    run: str


#: Options that had another name.
RENAMED = {"--from": "--start"}

#: In the order of ``--help``.
COMMANDS = {
    "meta-train": Command(
        "make an update rule of your own", "learned_optim.cli.meta_train:MetaTrain", "learned_optim.cli.meta_train:run"
    ),
    "plot": Command(
        "draw a meta-training run", "learned_optim.cli.meta_train:Plot", "learned_optim.cli.meta_train:plot"
    ),
    "bench": Command(
        "measure rules against tuned optimizers", "learned_optim.cli.bench:Bench", "learned_optim.cli.bench:run"
    ),
    "info": Command(
        "what a policy is and how it did", "learned_optim.cli.policies:Info", "learned_optim.cli.policies:info"
    ),
    "pull": Command("get a policy from the Hub", "learned_optim.cli.policies:Pull", "learned_optim.cli.policies:pull"),
    "push": Command(
        "publish a policy on the Hub", "learned_optim.cli.policies:Push", "learned_optim.cli.policies:push"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if ``None``.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _plain_warnings():
            status = _run(arguments)
            sys.stdout.flush()
    except UsageError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `learned-optim info default | head`: nobody reads on. The interpreter would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:  # what the library documents
        return _fail(error, 1)
    return status


def _run(arguments: list[str]) -> int:
    status = None
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h", "help"):
        print(_overview())
    elif name == "--version":
        print(f"{PROGRAM} {__version__}")
    elif name in COMMANDS:
        command = COMMANDS[name]
        config = _parse(_load(command.config), name, arguments[1:])
        if config is not None:
            status = _load(command.run)(config)
    else:
        what = "option" if name.startswith("-") else "command"
        raise UsageError(f"unknown {what} {name!r}{_nearest(name, [*COMMANDS, '--help', '--version'])}")
    return status or 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND ...\n\nOptimizers whose update rule was learned.\n\ncommands:\n{commands}\n\n"
        f"`{PROGRAM} COMMAND --help` says what a command takes; `{PROGRAM} --version` which version this is."
    )


def _parse(config: type[Any], name: str, arguments: list[str]) -> Any:
    """An instance of ``config`` from the arguments; ``None`` after help was printed."""
    import tyro

    def parse(args: list[str], **default: Any) -> tuple[Any, list[str]]:
        return tyro.cli(
            config, args=args, prog=f"{PROGRAM} {name}", return_unknown_args=True,
            config=(tyro.conf.FlagCreatePairsOff,), **default,
        )  # fmt: skip

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = parse(arguments)
    except SystemExit as exit:
        if not exit.code:
            return None
        sentence = _first_sentence(complaint.getvalue())
        # Where a required option is misspelt it counts as missing; that it was misspelt is the better thing to say.
        parsed, unknown = None, re.findall(r"Unrecognized options: (-\S+)", sentence)
        if not unknown:
            raise UsageError(f"{name}: {_in_words(sentence)}; see `{PROGRAM} {name} --help`") from exit
    if not unknown:
        defaults = getattr(parsed, "defaults", lambda: None)()
        return parsed if defaults is None else parse(arguments, default=defaults)[0]
    flag = next((argument for argument in unknown if argument.startswith("-")), None)
    if flag is None:
        raise UsageError(f"{name}: one argument too many, {unknown[0]!r}; see `{PROGRAM} {name} --help`")
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        parse(["--help"])
    flag = flag.partition("=")[0]
    if flag in RENAMED:
        raise UsageError(f"{name}: unknown option {flag!r}, it is called {RENAMED[flag]!r}")
    near = _nearest(flag, sorted(set(re.findall(r"--[\w.-]+", help_text.getvalue()))))
    raise UsageError(f"{name}: unknown option {flag!r}{near}; see `{PROGRAM} {name} --help`")


def _first_sentence(complaint: str) -> str:
    """tyro draws boxes; what is wrong stands between the title and the next rule."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in complaint.splitlines()]
    texts = [line for line in lines if line and not set(line) <= set("-─")]
    hints = ("Argument helptext", "For full helptext")
    complaints = itertools.takewhile(lambda line: not line.startswith(hints), texts[1:] or texts)
    return " ".join(" ".join(complaints).split()).rstrip(".") or "wrong arguments"


def _in_words(sentence: str) -> str:
    """tyro's commonest complaints as somebody would say them who does not know Python."""
    missing = re.findall(r"(?:^Missing from [^:]+: |\(required\) )(--\S+ \S+|\S+) (.*?)\.? (?=\(required\))", sentence)
    if missing:
        return "missing: " + ", ".join(f"{name} ({help_text})" for name, help_text in missing)
    invalid = re.match(
        r"Error parsing (\S+): (invalid literal for int|could not convert string to float).*: ('.*')", sentence
    )
    if invalid:
        kind = "a whole number" if "int" in invalid[2] else "a number"
        return f"{invalid[1]} must be {kind}, found {invalid[3]}"
    return sentence


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _load(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """A warning is one line, without the line of code that raised it."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CachedPolicyWarning)  # even under -W error: it is news, the command goes on
        warnings.showwarning = lambda message, *_, **__: print(f"{PROGRAM}: warning: {message}", file=sys.stderr)
        yield


def _fail(error: BaseException, status: int) -> int:
    # A list in columns, as of all names that there are, stays one; all else is a single line.
    text, columns = str(error), ""
    if match := re.fullmatch(r"(?s)(.*?:)\n((?:  [^\n]*\n?)+)", text):
        text, columns = match.groups()
    text = " ".join(text.split()) or type(error).__name__
    print(f"{PROGRAM}: {text}", *columns.splitlines(), sep="\n", file=sys.stderr)
    return status
