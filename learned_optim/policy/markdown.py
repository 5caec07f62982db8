"""Values as words of a Markdown page, whoever wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence


def plain(value: str) -> str:
    """One line without control characters: the files may come from anyone, and this goes to terminals and pages."""
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())[:1000]


def text(value: str | None) -> str:
    """Text that Markdown and HTML leave as it is; an underscore within a word means nothing to Markdown."""
    escaped = plain(value or "").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", escaped)


def code(value: str | None) -> str:
    return f"`{plain(value).replace('`', chr(39))}`" if value else ""


def yaml(value: str) -> str:
    line = plain(value)
    return line if re.fullmatch(r"[A-Za-z][\w./-]*", line) else json.dumps(line)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def ratio(value: float) -> str:
    """Two decimals where they say anything."""
    return f"{value:.2f}" if 0.1 <= value < 100.0 else f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of a table whose columns are aligned to the right, but for those in ``left``."""
    align = ["---" if i in left else "---:" for i in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, align, *rows)]


def seeds(value: int | list[int] | None) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else number(value)
