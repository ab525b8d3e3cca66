"""Timelines of a step: when each of its phases begins and ends.

The code of a step knows nothing of this. `install`, which `listening` calls, puts a mark around each function of
`MARKED`. While nobody listens, a mark reads one global variable. It leaves no trace in a graph of torch.compile, so
phases inside a graph are not recorded; a graph that was made before the marks were installed is made anew.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
Mark = TypeVar("Mark")

PHASES = ("gather", "factors", "refresh", "project", "orthogonalize", "elementwise", "apply")
"""The names of all phases, in the order of a step."""
REST = "rest"
"""The name of the time that belongs to no phase."""

PARTS = "steepest.rules.parts"
MARKED: dict[str, Sequence[str]] = {
    "gather": ["steepest.stack.stack:Stack.fill"],
    "factors": [
        f"{PARTS}.factors:Factors.accumulate",
        f"{PARTS}.kl_factors:KLFactors.accumulate_whitened",
        "steepest.rules.kl_shampoo:KLShampoo.update_factors",
    ],
    "refresh": [
        f"{PARTS}.factors:Factors.start",
        f"{PARTS}.factors:Factors.refresh",
        f"{PARTS}.factors:Factors.outdated",
        f"{PARTS}.kl_factors:KLFactors.start",
        f"{PARTS}.kl_factors:KLFactors.refresh",
        "steepest.rules.shampoo:RootsInBasis.update_bases",
        "steepest.rules.inverse_root:InverseRoot.update_bases",
        "steepest.rules.kfac:LayerFisher.update_bases",
    ],
    "project": [
        f"{PARTS}.factors:Factors.project",
        f"{PARTS}.factors:Factors.unproject",
        f"{PARTS}.kl_factors:KLFactors.project",
    ],
    "orthogonalize": [f"{PARTS}.newton_schulz:NewtonSchulz.polar"],
    "elementwise": [f"{PARTS}.moments:adam", "steepest.engine.elementwise:step_elementwise"],
    "apply": ["steepest.engine.step:apply"],
}
"""The functions that perform each phase, as ``module:name``."""

_listener: Timeline[object] | None = None


class Timeline(Generic[Mark]):
    """A record of a step: a mark at its beginning, at every change of phase, and at its end.

    Phases may nest; time in an inner phase does not count for the outer one.

    Args:
        mark: a function that reads a clock, or records an event on a device.

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

    @property
    def phase(self) -> str:
        """The innermost phase that is open."""
        return self._open[-1]

    def enter(self, name: str) -> None:
        """Begin a phase."""
        self._open.append(name)
        self.note()

    def leave(self) -> None:
        """End the innermost phase."""
        self._open.pop()
        self.note()

    def note(self) -> None:
        """Mark the time from which the innermost phase runs."""
        self.marks.append((self.phase, self.mark()))

    def spent(self, between: Callable[[Mark, Mark], float]) -> dict[str, float]:
        """Return the time of each phase, given a function for the time between two marks."""
        found: dict[str, float] = {}
        for (name, start), (_, end) in pairwise(self.marks):
            found[name] = found.get(name, 0) + between(start, end)
        return found


def is_listening() -> bool:
    """Return whether somebody listens."""
    return _listener is not None


@contextmanager
def listening(timeline: Timeline[Mark]) -> Iterator[None]:
    """Record every phase inside a ``with`` block in ``timeline``, with a mark at both ends of the block.

    Raises:
        RuntimeError: if there is a listener already.
    """
    global _listener
    if _listener is not None:
        raise RuntimeError("phases have one listener at a time, and there is one already")
    install()
    timeline.note()
    _listener = timeline  # type: ignore[assignment]
    try:
        yield
    finally:
        _listener = None
        timeline.note()


def phase(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function that performs a phase of a step, one of `PHASES`.

    >>> @phase("apply")
    ... def double(x):
    ...     return 2 * x
    >>> double(3)
    6
    >>> phase("lunch")
    Traceback (most recent call last):
    ValueError: name='lunch': must be one of gather, factors, refresh, project, orthogonalize, elementwise, apply
    """
    if name not in PHASES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(PHASES)}")

    def marked(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling() or _listener is None:  # in this order: graphs must not depend on it
                return function(*args, **kwargs)
            listener = _listener
            listener.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                listener.leave()

        return run

    return marked


@functools.cache
def install() -> None:
    """Put a mark around every function of `MARKED`, wherever a module of steepest holds it; once and for all."""
    for name, places in MARKED.items():
        for place in places:
            module, _, path = place.partition(":")
            owner: object = import_module(module)
            *outer, last = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            function: Callable[..., object] = vars(owner)[last]
            holders = [owner] if outer else [m for n, m in sys.modules.items() if n.startswith("steepest.")]
            for holder in holders:
                if vars(holder).get(last, None) is function:
                    setattr(holder, last, phase(name)(function))
