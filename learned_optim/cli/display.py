"""Tables and pages for whoever reads: drawn by rich on terminals, where it is installed, and plain lines elsewhere.

Plain lines are aligned and never wrapped, so that they can be searched and cut into columns.
"""

# ruff: noqa: T201  (printing is what a command line is for)

from __future__ import annotations

import html
import re
import sys
from collections.abc import Sequence
from typing import Any


def _console() -> Any:
    """rich's console, or ``None`` where nobody reads or rich is not installed."""
    if not _somebody_reads():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False)


def _somebody_reads() -> bool:
    return sys.stdout.isatty()


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, numbers: bool = False) -> None:
    """Print a table.

    Args:
        rows: of equal length.
        header: names of the columns; shown on terminals only, unless ``numbers``.
        numbers: whether columns after the first are aligned to the right.
    """
    console = _console()
    if console is None:
        lines = [header, *rows] if header and numbers else rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
            if numbers:
                cells[1:] = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            print("  ".join(cells).rstrip())
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD if header else None, show_header=bool(header), pad_edge=False)
    for i in range(len(rows[0])):
        title = Text(header[i].replace(" ", "\n") if numbers else header[i]) if header else ""
        justify = "right" if numbers and i else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=numbers)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # text may come from anyone: no markup
    if numbers:  # figures that are cut in two cannot be read: rather longer lines than that
        console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def print_heading(text: str) -> None:
    """Print the title of what follows, after an empty line."""
    console = _console()
    if console is None:
        print(f"\n{text}\n")
        return
    from rich.text import Text

    console.print(Text(f"\n{text}", style="bold"))


def print_markdown(text: str) -> None:
    """Print a page of Markdown of our own making: as it is, or drawn."""
    console = _console()
    if console is None:
        print(text)
        return
    from rich.markdown import Markdown

    console.print(Markdown(text))


def print_items(texts: Sequence[str]) -> None:
    """Print sentences of a model card as a list."""
    print_table([("-", unescaped(text)) for text in texts])


def print_card(lines: Sequence[str]) -> None:
    """Print a part of a model card: its list of ``- name: value`` as a table, its tables, and the rest as it is."""
    pairs: list[tuple[str, str]] = []
    cells: list[list[str]] = []

    def flush() -> None:
        if pairs:
            print_table(pairs)
        if cells:
            print_table(cells[1:], cells[0], numbers=True)
        pairs.clear()
        cells.clear()

    for line in lines:
        if line.startswith("- "):
            name, colon, value = line[2:].partition(": ")
            pairs.append((unescaped(name), unescaped(value)) if colon else ("", unescaped(name)))
        elif line.startswith("|"):
            if not set(line) <= set("|-: "):
                cells.append([unescaped(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        else:
            flush()
            if not line.startswith("```"):
                print(unescaped(line))
    flush()


def unescaped(text: str) -> str:
    """What a reader of the Markdown sees."""
    text = re.sub(r"(?<!\\)(\*\*|`)", "", text)
    return html.unescape(re.sub(r"\\([\\`*_\[\]|])", r"\1", text))
