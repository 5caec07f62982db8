"""What a subcommand raises for wrong arguments."""

from __future__ import annotations


class UsageError(Exception):
    """Wrong arguments, for what the dataclass of a subcommand cannot express; exit status 2."""
