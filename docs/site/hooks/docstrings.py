"""Read steepest's docstrings as Markdown.

They are written for `help` and for doctest: examples stand under "Example:" or by themselves, ``::`` precedes code, and
pages are named by their paths.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

ARGUMENTS = re.compile(r"^ {4}\w+(?:,\s+\w+)+:", re.MULTILINE)  # described together, over several lines
DOCTEST = re.compile(r"(?:^ *>>>.*\n(?: *\S.*(?:\n|\Z))*)+", re.MULTILINE)
PAGE = re.compile(r"\bdocs/([\w-]+)\.md\b")


class Docstrings(Extension):
    """Give griffe each docstring in the form that it reads as sections, and the rest of it as Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """Return a docstring with its code fenced, its pages linked, and its example under the heading that griffe knows.

    >>> print(markdown("Return 1 (docs/one.md).\\n\\nAs in::\\n\\n    one()\\n\\nExample:\\n    1"))
    Return 1 ([docs/one.md](../one.md)).
    <BLANKLINE>
    As in:
    <BLANKLINE>
        one()
    <BLANKLINE>
    Examples:
        1
    """
    text, heading, example = docstring.partition("\nExample:\n")
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = ARGUMENTS.sub(lambda names: "    " + " ".join(names[0].split()), text)
    text = PAGE.sub(r"[\g<0>](../\1.md)", text)
    return DOCTEST.sub(_fenced, text) + heading.replace("Example", "Examples") + example


def _fenced(code: re.Match[str]) -> str:
    return f"```pycon\n{textwrap.dedent(code[0]).rstrip()}\n```\n"
