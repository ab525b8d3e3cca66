"""What a clause is: a small function that puts an optimizer to one test, with its promise for a docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Check = Callable[[Any], None]
"""A function of a `steepest.testing.subject.Subject`, which is not imported here because it imports this module."""


class Broken(AssertionError):
    """The clause is broken. Its message is the evidence."""


class NotApplicable(Exception):
    """The clause can't be asked of this optimizer. Its message is the reason."""


@dataclass(frozen=True)
class Clause:
    """One promise, and the function that tests it: it returns, or raises `Broken` or `NotApplicable`."""

    number: int
    """Which chapter of the contract it belongs to."""
    title: str
    """The promise in a few words."""
    check: Check
    slow: bool = False
    """Left out unless it is asked for."""

    @property
    def name(self) -> str:
        """How code calls it."""
        return self.check.__name__

    @property
    def promise(self) -> str:
        """What is promised, and why."""
        return inspect.cleandoc(self.check.__doc__ or "")


CLAUSES: dict[str, Clause] = {}
"""Every clause by name, in the contract's order once `steepest.testing` is imported."""


def clause(number: int, title: str, *, slow: bool = False) -> Callable[[Check], Check]:
    """Register the function below as a clause of chapter ``number``."""

    def register(check: Check) -> Check:
        CLAUSES[check.__name__] = Clause(number, title, check, slow)
        return check

    return register
