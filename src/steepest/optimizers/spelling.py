"""Names may be spelled with any case, hyphens, underscores and blanks."""

from __future__ import annotations

from collections.abc import Iterable


def spelled(name: str, known: Iterable[str]) -> str | None:
    """Return the first of the ``known`` names that differs from ``name`` in spelling only, or None.

    >>> spelled("KL_Soap", ["soap", "kl-soap"]), spelled("soup", ["soap"])
    ('kl-soap', None)
    """
    return next((other for other in known if _bare(other) == _bare(name)), None)


def _bare(name: str) -> str:
    return name.lower().translate(str.maketrans("", "", "-_ "))
