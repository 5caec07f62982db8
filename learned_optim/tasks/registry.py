"""The zoo by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from .base import TaskFamily
from .families import (
    bootstrapped,
    categorical,
    changing,
    contrastive,
    convnext,
    embeddings,
    fine_tuning,
    fine_tuning_tables,
    forecasting,
    graphs,
    language,
    noise,
    physics,
    sequence_to_sequence,
    synthetic,
    tabular,
    validation_changing,
    validation_control,
    validation_fine_tuning,
    validation_structures,
    validation_users,
    vision,
    vision_perceptrons,
    vision_validation,
)

FAMILIES: dict[str, TaskFamily] = {
    family.name: family
    for module in (
        *(vision_perceptrons, vision, language, tabular, synthetic, vision_validation),
        *(fine_tuning, fine_tuning_tables, contrastive, convnext),
        *(embeddings, sequence_to_sequence, graphs, forecasting, categorical),
        *(changing, bootstrapped, physics, noise),
        *(validation_fine_tuning, validation_changing, validation_control, validation_users, validation_structures),
    )
    for family in module.FAMILIES
}
"""Every family of the zoo by name."""

_TAGS = ("train", "validation", "all")


def get_families(names_or_tags: str | Iterable[str] = "all") -> list[TaskFamily]:
    """Looks families up, in the order asked for and each once.

    Args:
        names_or_tags: names of families, and the tags ``"train"``, ``"validation"`` (all families of that split)
            and ``"all"``; one string or several.

    Raises:
        ValueError: a name is unknown; the message suggests the nearest one.
    """
    families: dict[str, TaskFamily] = {}
    for name in [names_or_tags] if isinstance(names_or_tags, str) else names_or_tags:
        if name in FAMILIES:
            families[name] = FAMILIES[name]
        elif name in _TAGS:
            families |= {key: family for key, family in FAMILIES.items() if name in (family.split, "all")}
        else:
            near = difflib.get_close_matches(name, [*FAMILIES, *_TAGS], n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known names:\n{_columns([*FAMILIES, *_TAGS])}"
            raise ValueError(f"unknown task family {name!r}; {hint}")
    return list(families.values())


def _columns(names: Sequence[str]) -> str:
    """Names below each other, column by column, on lines of about a hundred characters."""
    width = max(map(len, names)) + 2
    height = -(-len(names) // max(1, 100 // width))
    lines = ("".join(name.ljust(width) for name in names[row::height]).rstrip() for row in range(height))
    return "\n".join(f"  {line}" for line in lines)
