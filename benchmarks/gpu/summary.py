"""The summary of a run as plain text: what failed, what was left out, and all tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WIDEST = 60
"""Characters of the widest cell."""


def summary(content: Mapping[str, Any]) -> str:
    """Return every section in short."""
    lines = [content["command"], f"{content['seconds']:.0f} s of {content['budget']:.0f} s"]
    for name, section in content["sections"].items():
        reason = f": {section['reason']}" if section["reason"] else ""
        lines += ["", f"== {name}: {section['status']}{reason} ({section['seconds']:.1f} s)"]
        for title, found in section["figures"].items():
            lines += _figure(title, found)
        if section["left_out"]:
            lines.append(f"left out: {'; '.join(section['left_out'])}")
    return "\n".join(lines)


def _figure(title: str, found: Any) -> Iterator[str]:
    """Yield a number or a sentence as a line, rows of numbers as a table. Deeper figures stay in the file."""
    if isinstance(found, Mapping):
        found = [{"": key, **(value if isinstance(value, Mapping) else {title: value})} for key, value in found.items()]
    if not isinstance(found, list):
        yield f"{title}: {cell(found)}"
        return
    if not found or any(isinstance(value, list | Mapping) for row in found for value in row.values()):
        return
    heads = list(dict.fromkeys(key for row in found for key in row))
    table = [heads, *([cell(row[key]) if key in row else "" for key in heads] for row in found)]
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    yield f"{title}:"
    for line in table:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def cell(value: Any) -> str:
    """Format a value in a few characters.

    >>> cell(1234.56), cell(None), cell(True), cell("word")
    ('1235', '?', 'True', 'word')
    """
    text = "?" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text[:WIDEST]
