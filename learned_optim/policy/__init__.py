"""Policies: weights and configuration of the rule, as files, by name, and on the Hub. Names are imported on first use.

policy.py       ``Policy``, the module that holds them: start here
resolve.py      what the name of a policy means
hub.py          repositories on the Hugging Face Hub
hub_errors.py   what the Hub and its client raise, as our exceptions
files.py        a policy as four files in a folder; the atomic writer of this package
filenames.py    what these files are called
results.py      what results.json may hold
card.py         the model card
markdown.py     values as words of it
fingerprint.py  which rule it is, in 16 digits
errors.py       our exceptions
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learned_optim.policy.policy import Policy as Policy
    from learned_optim.rule.config import PolicyConfig as PolicyConfig

_WHERE = {"Policy": "learned_optim.policy.policy", "PolicyConfig": "learned_optim.rule.config"}
__all__ = ["Policy", "PolicyConfig"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'learned_optim.policy' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
