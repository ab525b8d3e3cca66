"""What the callbacks of trainers share, which log an optimizer's diagnostics: when, and of which optimizer."""

from __future__ import annotations

from typing import Any

from steepest.engine.diagnostics import Diagnosed


def checked(every: int) -> int:
    """Return the number of steps between two logs.

    Raises:
        ValueError: If it is no integer of at least 1.
    """
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every={every!r}: must be a number of steps, an integer >= 1")
    return every


def diagnosed(optimizer: Any) -> Diagnosed:
    """Return a host's optimizer, or the one that it wraps, if that is one of this package.

    Raises:
        TypeError: If it is another's, which has no diagnostics.
    """
    inner = optimizer if isinstance(optimizer, Diagnosed) else getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Diagnosed):
        raise TypeError(f"{type(inner).__name__} has no diagnostics to log: use an optimizer of steepest")
    return inner
