"""Extension of griffe (``mkdocs.yml``): docstrings are written for ``help()`` and Sphinx, the site reads Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

#: What is replaced, in this order, and by what.
CHANGES = (
    (re.compile(r":\w+:`~?([^`]+)`"), r"`\1`"),  # roles such as :class:`Policy`
    (re.compile(r"^ *\.\. code-block:: \w+\n", re.MULTILINE), ""),
    (re.compile(r"::$", re.MULTILINE), ":"),
    (re.compile(r"^Example:$", re.MULTILINE), "Examples:"),  # a section to griffe
    (re.compile(r"^(=+ +=.*\n(?:.*\n)*?=+ +=.*)$(?!\n\S)", re.MULTILINE), r"```text\n\1\n```"),  # tables
)


class MarkdownDocstrings(Extension):
    """Makes Markdown of the few marks of Sphinx that the docstrings use."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            for pattern, replacement in CHANGES:
                obj.docstring.value = pattern.sub(replacement, obj.docstring.value)
