"""What a subcommand raises for wrong arguments, and how those are called on a command line."""

from __future__ import annotations

import re


class UsageError(Exception):
    """Wrong arguments, for what the dataclass of a subcommand cannot express; exit status 2."""


def with_flags(text: str) -> str:
    """``text`` with ``SomeConfig.outer_steps``, as the library calls a setting, in the words of a command line."""
    return re.sub(r"\b\w+Config\.(\w+)", lambda match: f"--{match[1].replace('_', '-')}", text)
