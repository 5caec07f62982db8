"""Values as words of a Markdown page, whoever wrote them."""

from __future__ import annotations

import json
import re


def plain(value: str) -> str:
    """One line without control characters: the files may come from anyone, and this goes to terminals and pages."""
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())[:1000]


def text(value: str | None) -> str:
    """Text that Markdown and HTML leave as it is."""
    escaped = plain(value or "").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escaped)


def code(value: str | None) -> str:
    return f"`{plain(value).replace('`', chr(39))}`" if value else ""


def yaml(value: str) -> str:
    line = plain(value)
    return line if re.fullmatch(r"[A-Za-z][\w./-]*", line) else json.dumps(line)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def seeds(value: int | list[int] | None) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else number(value)
