"""The subcommand ``bench``: which suites there are, and how they are run. Torch is imported once one runs.

A suite is a frozen dataclass, whose fields are its options, in a module without torch, and a function that is called
with an instance of it, the folder for what it writes and the command line as text; it prints its result. Options of
the same name in several suites must be of the same type and have the same default.
"""

# ruff: noqa: T201  (printing is what a command line is for)

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from tyro.conf import arg

from learned_optim.bench.config import StepBenchConfig
from learned_optim.bench.habits_config import HabitsConfig
from learned_optim.bench.quality_config import QualityConfig
from learned_optim.bench.scale.config import ScaleConfig
from learned_optim.cli.display import print_markdown
from learned_optim.cli.errors import UsageError, with_flags

if TYPE_CHECKING:
    from learned_optim.bench.pool import Progress


class _Bar:
    """A bar with the time left, or elsewhere than on terminals a line now and then.

    Known runs count for nothing, the others for the seconds they take.
    """

    def __init__(self) -> None:
        from tqdm import tqdm

        from learned_optim.meta_train.progress import TimedLines

        self._bar = tqdm(
            total=0.0, disable=None, file=sys.stderr, dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}",
        )  # fmt: skip
        self._known = self._done = 0.0
        self._runs, self._last, self._start = "no runs", "", time.monotonic()
        self._lines = TimedLines(self._line) if self._bar.disable else None

    def __call__(self, progress: Progress) -> None:
        """Show it."""
        cost, self._done = progress.cost_done - self._done, progress.cost_done
        self._known += cost if progress.cached else 0.0
        self._bar.total = max(progress.cost_total - self._known, 1e-9)
        if not progress.cached:
            self._bar.update(cost)
        self._bar.set_description_str(f"{progress.done}/{progress.total} {progress.what}", refresh=False)
        self._runs = f"{progress.done} of {progress.total} runs"
        self._last = progress.what

    def _line(self) -> str:
        from learned_optim.meta_train.progress import how_far

        far = how_far(self._done - self._known, self._bar.total, time.monotonic() - self._start)
        return "; ".join([f"{self._runs} {far}", *([f"last: {self._last}"] if self._last else [])])

    def close(self) -> None:
        """Leave the line."""
        if self._lines is not None:
            self._lines.close()
        self._bar.close()


def run_quality_suite(config: QualityConfig, out: Path, command: str) -> None:
    """Run the suite, print its tables, and write them with the figures and pictures into ``out``.

    ``out`` then holds ``results.json`` of the first policy, ``table.md``, ``plots/`` and, for several policies,
    ``policies/<label>/results.json`` of each.
    """
    from learned_optim.bench.cache import read_looks
    from learned_optim.bench.quality import load_policies, run_quality
    from learned_optim.bench.report import markdown, results, write_results
    from learned_optim.tasks import get_families

    try:
        get_families(config.tasks)
    except ValueError as error:
        raise UsageError(f"bench: {error}") from error
    policies = load_policies(config.policies)  # before the hours
    bar = _Bar()
    try:
        result = run_quality(config, policies=policies, progress=bar)
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept, and the same command goes on from there", file=sys.stderr)
        raise
    finally:
        bar.close()
    text = markdown(result, looks=len(read_looks(config.cache_folder())))
    write_results(out, results(result, command=command))
    if len(policies) > 1:
        for contender in (c for c in result.contenders if c.role == "learned"):
            write_results(out / "policies" / contender.label, results(result, contender, command=command))

    def draw() -> None:
        from learned_optim.bench.plots import draw_all

        draw_all(result, out / "plots")

    _show(out, text, "plots", draw)


def _show(out: Path, text: str, what: str, draw: Callable[[], None]) -> None:
    """Write a suite's tables into ``out`` and print them; ``draw`` what, if matplotlib is installed."""
    from learned_optim.policy.files import write_atomically

    write_atomically(out / "table.md", text.encode())
    print_markdown(text)
    try:
        draw()
    except ImportError as error:
        print(f"no {what}: {error}", file=sys.stderr)
    print(out)


def run_step_suite(config: StepBenchConfig, out: Path, command: str) -> None:
    """Run the suite into ``out``; what is measured next is said on terminals, and elsewhere now and then."""
    from learned_optim.bench.step import run_config, table
    from learned_optim.meta_train.progress import TimedLines

    under_way = ["the first optimizer"]

    def say(what: str) -> None:
        under_way.append(what)
        if sys.stderr.isatty():
            print(what, file=sys.stderr)

    lines = None if sys.stderr.isatty() else TimedLines(lambda: f"measuring {under_way[-1]}")
    try:
        result = run_config(config, out, say)
    finally:
        if lines is not None:
            lines.close()
    print_markdown(table(result))
    print(out)


def run_habits_suite(config: HabitsConfig, out: Path, command: str) -> None:
    """Run the suite, print its tables, and write them with the figures and the picture into ``out``.

    ``out`` then holds ``habits.json``, ``table.md``, ``habits.png`` and ``policies/<label>/results.json``: what each
    policy's results held, with the habits put in.
    """
    from learned_optim.bench.habits import policy_names, run_habits
    from learned_optim.bench.habits_report import card_block, markdown, write_habits
    from learned_optim.bench.quality import load_policies
    from learned_optim.bench.report import write_results

    policies = load_policies(policy_names(config))
    bar = _Bar()
    try:
        values = run_habits(config, policies=policies, progress=bar)
    finally:
        bar.close()
    text = markdown(values)
    write_habits(out / "habits.json", {"command": command, **values})
    for label, policy in policies.items():
        own = {**(policy.results or {}), "habits": card_block(values, label, command)}
        write_results(out / "policies" / label, own)

    def draw() -> None:
        from learned_optim.bench.habits_plots import draw_habits

        draw_habits(values, out / "habits.png")

    _show(out, text, "picture", draw)


def run_scale_suite(config: ScaleConfig, out: Path, command: str) -> None:
    """Make missing cells, and write the tables and the picture of all that are there into ``out``.

    ``out`` then holds ``cells/`` with a file per finished run, ``checkpoints/`` of unfinished ones, ``table.md`` and
    ``scale.png``. Nothing else is needed to go on: the same command makes what is missing.
    """
    from learned_optim.bench.quality import load_policies
    from learned_optim.bench.quality_config import cache_folder
    from learned_optim.bench.scale import text as corpus
    from learned_optim.bench.scale.figures import by_model
    from learned_optim.bench.scale.plan import Entry, listed
    from learned_optim.bench.scale.report import markdown
    from learned_optim.bench.scale.suite import Scale

    def say(what: str, left: list[Entry]) -> None:
        minutes = sum(entry.seconds for entry in left) / 60.0
        print(f"{what}; {len(left)} cells missing, about {minutes:.0f} minutes", file=sys.stderr, flush=True)

    if any(m.line == "text" for m in config.chosen()) and not corpus.corpus_path(cache_folder(config.cache)).is_file():
        print("making the text out of what is installed here: a minute or two, once", file=sys.stderr, flush=True)
    scale = Scale(config, load_policies(config.policies), out)
    if config.cells and not scale.queue():
        names = " or ".join(config.cells)
        print(f"no missing cell is called {names}; without --cells, --dry-run lists what is missing", file=sys.stderr)
    try:
        if not config.dry_run:
            scale.run(say)
    except KeyboardInterrupt:
        print("interrupted: finished cells are kept, and the same command goes on from there", file=sys.stderr)
        raise
    print(listed(scale.queue()))
    rows = by_model(scale.results, scale.shown(), config.rivals)
    text = markdown(rows)

    def draw() -> None:
        from learned_optim.bench.scale import plots

        plots.draw(rows, out / "scale.png")

    _show(out, text, "picture", draw)


class Suite(NamedTuple):
    """A suite: the class of its options, and what runs it."""

    config: type[Any]
    run: Callable[[Any, Path, str], None]


SUITES = {
    "quality": Suite(QualityConfig, run_quality_suite),
    "habits": Suite(HabitsConfig, run_habits_suite),
    "step": Suite(StepBenchConfig, run_step_suite),
    "scale": Suite(ScaleConfig, run_scale_suite),
}


def _texts(config: Any) -> dict[str, str]:
    """What the docstring says of each field."""
    text = (config.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    fields = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", text + "\n", re.MULTILINE | re.DOTALL)
    return {name: " ".join(words.split()) for name, words in fields}


def _fields() -> list[Any]:
    texts: dict[str, str] = {}
    fields: dict[str, Any] = {}
    for suite, (config, _) in SUITES.items():
        hints, own = get_type_hints(config), _texts(config)
        for field in dataclasses.fields(config):
            texts[field.name] = f"{texts.get(field.name, '')} ({suite}) {own.get(field.name, '')}".strip()
            optional = type(None) in get_args(hints[field.name])
            metavar = "PATH" if optional else None  # tyro's own would be {None}|PATH
            # Such a flag is called --no-..., and "(default: True)" would read as if that were the default.
            hint = arg(
                help=texts[field.name], metavar=metavar,
                help_behavior_hint="(done unless this is given)" if field.default is True else None,
            )  # fmt: skip
            hint = Annotated[hints[field.name], hint]
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
    wanted = SUITES[command.suite].config
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
        raise UsageError(f"bench: {with_flags(str(error))}") from error


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


def run(command: Any) -> None:
    """Run ``learned-optim bench``."""
    from learned_optim.policy.files import file_in_the_way

    config, out = config_of(command), command.out or Path("bench") / command.suite
    if (file := file_in_the_way(out)) is not None:  # before the hours
        raise UsageError(f"bench: results are written into the folder {out}, but {file} is a file: give --out a folder")
    SUITES[command.suite].run(config, out, command_line(command))
