"""What ``param_groups`` takes the tensors of a model for, as a table."""

from __future__ import annotations

from learned_optim import param_groups

KEYS = ("role", "stacked", "split", "transposed")


def taken(model, **options):
    """By name: what is not the default, the role first; ``-`` where there is no weight decay."""
    table = {}
    for group in param_groups(model, weight_decay=0.1, **options):
        said = [str(group[KEYS[0]])] if "role" in group else ["?"]
        said += [f"{key}={group[key]}" for key in KEYS[1:] if key in group]
        said += ["-"] * (group["weight_decay"] == 0.0)
        table |= dict.fromkeys([name for name, _ in group["params"]], " ".join(said))
    return table
