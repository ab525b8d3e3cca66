"""Marks on the parts of a step, so that whoever measures hears when each begins and ends.

A function that does one such part is marked where it is defined, ``@phase("refresh")``. While nobody listens, a mark
costs one look at a global variable, below a microsecond; inside a graph that torch.compile makes there is nothing
left of it, and nothing to hear. Doctests don't look into marked functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
Mark = TypeVar("Mark")

PHASES = ("gather", "feed", "refresh", "project", "orthogonalize", "elementwise", "apply")
"""All there are, in the order of a step."""
REST = "rest"
"""What is in no phase."""

_listener: Timeline[object] | None = None


class Timeline(Generic[Mark]):
    """What a step did when: a mark at its beginning, at every change of phase, and at its end.

    Phases may nest: while an inner one runs, the outer one's time stands still.

    Args:
        mark: reads a clock, or records an event on a device.

    Example:
        >>> ticks = iter(range(10))
        >>> timeline = Timeline(lambda: next(ticks))
        >>> with listening(timeline):
        ...     phase("project")(phase("apply")(lambda: None))()
        >>> timeline.spent(lambda start, end: end - start)
        {'rest': 2, 'project': 2, 'apply': 1}
    """

    def __init__(self, mark: Callable[[], Mark]) -> None:
        self.mark = mark
        self.marks: list[tuple[str, Mark]] = []
        self._open = [REST]

    def enter(self, name: str) -> None:
        """A phase begins."""
        self._open.append(name)
        self.note()

    def leave(self) -> None:
        """The innermost phase ends."""
        self._open.pop()
        self.note()

    def note(self) -> None:
        """From here on the innermost phase runs."""
        self.marks.append((self._open[-1], self.mark()))

    def spent(self, between: Callable[[Mark, Mark], float]) -> dict[str, float]:
        """The time of each phase, given the time between two marks."""
        found: dict[str, float] = {}
        for (name, start), (_, end) in pairwise(self.marks):
            found[name] = found.get(name, 0) + between(start, end)
        return found


@contextmanager
def listening(timeline: Timeline[Mark]) -> Iterator[None]:
    """Inside the ``with`` block, ``timeline`` hears of every phase; it is marked at both ends.

    Raises:
        RuntimeError: if somebody listens already.
    """
    global _listener
    if _listener is not None:
        raise RuntimeError("phases have one listener at a time, and somebody listens already")
    timeline.note()
    _listener = timeline  # type: ignore[assignment]
    try:
        yield
    finally:
        _listener = None
        timeline.note()


def phase(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Mark a function as a phase of a step, one of `PHASES`.

    >>> @phase("apply")
    ... def double(x):
    ...     return 2 * x
    >>> double(3)
    6
    >>> phase("lunch")
    Traceback (most recent call last):
    ValueError: name='lunch': must be one of gather, feed, refresh, project, orthogonalize, elementwise, apply
    """
    if name not in PHASES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(PHASES)}")

    def marked(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling() or _listener is None:  # in this order: a graph must not depend on it
                return function(*args, **kwargs)
            listener = _listener
            listener.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                listener.leave()

        return run

    return marked
