"""The format of ``config.json``: its version, what earlier ones said, and the types that JSON does not keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT_VERSION = 4


def of_this_format(values: Mapping[str, Any], version: int) -> dict[str, Any]:
    """What a configuration of an earlier format says in this one.

    Formats 1 and 2 had no pace, 1 to 3 were not orthogonalised; 2 and 3 could balance rows and columns.

    Raises:
        ValueError: it does balance them.
    """
    values = dict(values)
    if version > 1 and values.pop("balance", 0.0):
        raise ValueError("rows and columns are balanced, which this learned_optim no longer does: use 0.1")
    for name in ("balance_floor", "balance_bound") if version > 1 else ():
        values.pop(name, None)
    without = {"orthogonal": 0.0, "orthogonal_iterations": 3, "orthogonal_aspect": 16.0, "orthogonal_shortening": 0.0}
    if version < 3:
        without |= {"pace_gain": 0.0, "pace_rate": 0.0, "pace_growth": 0.01, "pace_bound": 0.7}
    return {**without, **values, "format_version": FORMAT_VERSION}


def typed(name: str, value: Any, like: Any) -> Any:
    """``value`` as read from JSON, in the type of the field's default ``like``."""

    def scalar(x: Any, sample: Any) -> Any:
        wanted = type(sample)
        if wanted is float and isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**1023:
            return float(x)  # larger ones are no floats
        if type(x) is not wanted:
            raise ValueError(f"key {name!r} must hold {wanted.__name__}, found {x!r:.80}")
        return x

    if isinstance(like, tuple):
        if not isinstance(value, list | tuple):
            raise ValueError(f"key {name!r} must hold a list, found {value!r}")
        return tuple(scalar(x, like[0]) for x in value)
    return scalar(value, like)
