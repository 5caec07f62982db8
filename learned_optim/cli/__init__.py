"""The command line, ``learned-optim``. Imports no torch before a subcommand runs.

main.py        which subcommands there are, and how their errors are said
policies.py    ``info``, ``pull``, ``push``
meta_train.py  ``meta-train``, ``plot``
bench.py       ``bench``
display.py     tables for whoever reads, plain lines elsewhere
errors.py      ``UsageError``
"""

from __future__ import annotations

from learned_optim.cli.errors import UsageError
from learned_optim.cli.main import COMMANDS, Command, main

__all__ = ["COMMANDS", "Command", "UsageError", "main"]
