"""learned_optim: a drop-in ``torch.optim`` optimizer whose update rule was learned.

Names are imported on first use, so that ``learned-optim --help`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learned_optim.groups import param_groups as param_groups
    from learned_optim.optimizer import LearnedOptimizer as LearnedOptimizer
    from learned_optim.policy.policy import Policy as Policy
    from learned_optim.rule.config import PolicyConfig as PolicyConfig

__version__ = "0.1.0"

_WHERE = {
    "LearnedOptimizer": "learned_optim.optimizer",
    "Policy": "learned_optim.policy.policy",
    "PolicyConfig": "learned_optim.rule.config",
    "param_groups": "learned_optim.groups",
}
__all__ = ["LearnedOptimizer", "Policy", "PolicyConfig", "__version__", "param_groups"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'learned_optim' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
