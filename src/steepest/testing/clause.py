"""Clauses of the contract: small functions that test one promise each, with the promise as their docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Check = Callable[[Any], None]
"""A function of a `steepest.testing.subject.Subject`, which is not imported here because it imports this module."""


class Broken(AssertionError):
    """The clause is broken; the message is the evidence."""


class NotApplicable(Exception):
    """The clause does not apply to this optimizer; the message is the reason."""


@dataclass(frozen=True)
class Clause:
    """A promise, and the function that tests it, which returns or raises `Broken` or `NotApplicable`."""

    number: int
    """The chapter of the contract."""
    title: str
    """The promise in a few words."""
    check: Check
    slow: bool = False
    """Whether the clause is checked only on request."""

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.check.__name__

    @property
    def promise(self) -> str:
        """The docstring of the function: the promise, and its reason."""
        return inspect.cleandoc(self.check.__doc__ or "")


CLAUSES: dict[str, Clause] = {}
"""Every clause by name, in the contract's order once `steepest.testing` is imported."""


def clause(number: int, title: str, *, slow: bool = False) -> Callable[[Check], Check]:
    """Register the function below as a clause of chapter ``number``."""

    def register(check: Check) -> Check:
        CLAUSES[check.__name__] = Clause(number, title, check, slow)
        return check

    return register
