"""Clauses of the contract, small functions that test one promise each, and the report of what they find."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
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
    needs: tuple[str, ...] = ()
    """Options of which an optimizer must have one for the clause to apply."""
    several: bool = False
    """Whether the clause applies only to optimizers that take several parameters."""
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


REGISTERED: dict[str, Clause] = {}
"""Clauses by name; `steepest.testing.CLAUSES` has them in the contract's order."""


def clause(number: int, title: str, **conditions: Any) -> Callable[[Check], Check]:
    """Register the function below as a clause of chapter ``number``; the conditions are fields of `Clause`."""

    def register(check: Check) -> Check:
        REGISTERED[check.__name__] = Clause(number, title, check, **conditions)
        return check

    return register


class Verdict(Enum):
    """The outcome of a clause."""

    KEPT = "kept"
    BROKEN = "broken"
    NOT_APPLICABLE = "n/a"


@dataclass(frozen=True)
class Finding:
    """The verdict on one clause."""

    clause: Clause
    verdict: Verdict
    why: str = ""
    """The evidence if the clause is broken (expected and seen), the reason if it does not apply."""


@dataclass(frozen=True)
class Report:
    """The verdicts of all clauses on one optimizer.

    Example:
        >>> clause = Clause(5, "p.grad stays as it was", lambda subject: None)
        >>> print(Report("Mine", (Finding(clause, Verdict.BROKEN, "expected a gradient, saw None"),)))
        Mine: 0 clauses kept, 1 broken, 0 not applicable
        5  p.grad stays as it was  broken  expected a gradient, saw None
    """

    name: str
    findings: tuple[Finding, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Parameters that the optimizer refused, with its errors; the suite went on without them."""

    @property
    def ok(self) -> bool:
        """Whether no clause is broken."""
        return not self.broken

    @property
    def kept(self) -> list[Finding]:
        """Findings of clauses that the optimizer keeps."""
        return [finding for finding in self.findings if finding.verdict is Verdict.KEPT]

    @property
    def broken(self) -> list[Finding]:
        """Findings of clauses that the optimizer breaks."""
        return [finding for finding in self.findings if finding.verdict is Verdict.BROKEN]

    @property
    def not_applicable(self) -> list[Finding]:
        """Findings of clauses that do not apply to the optimizer."""
        return [finding for finding in self.findings if finding.verdict is Verdict.NOT_APPLICABLE]

    @property
    def summary(self) -> str:
        """The optimizer's name and the number of clauses for each verdict, in one line."""
        counts = f"{len(self.kept)} clauses kept, {len(self.broken)} broken, {len(self.not_applicable)} not applicable"
        return f"{self.name}: {counts}"

    @property
    def omissions(self) -> list[str]:
        """A line for each parameter that the optimizer refused."""
        return [f"not given: a parameter of {shape}, refused: {why}" for shape, why in self.refused.items()]

    def __str__(self) -> str:
        rows = [(str(f.clause.number), f.clause.title, f.verdict.value, f.why) for f in self.findings]
        number, title, verdict = (max((len(row[i]) for row in rows), default=0) for i in range(3))
        table = [f"{n:>{number}}  {t:<{title}}  {v:<{verdict}}  {why}".rstrip() for n, t, v, why in rows]
        return "\n".join([self.summary, *self.omissions, *table])
