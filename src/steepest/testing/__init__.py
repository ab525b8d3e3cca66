"""The contract of a PyTorch optimizer, as a test suite for any optimizer.

`check_optimizer` runs some seventy small tests, the *clauses*: functions with a docstring that says what is promised
and why. A clause is kept, broken (with evidence: what was expected, what was seen), or not applicable (with a reason).
In a project's own tests::

    def test_contract():
        report = steepest.testing.check_optimizer(functools.partial(MyOptimizer, lr=1e-3))
        assert report.ok, report

and on the command line: ``steepest check my_package:MyOptimizer --lr 1e-3``. The chapters:

    1   forms of parameters              6   plain state              11  GradScaler
    2   options re-read at every step    7   saving and resuming      12  gradients that are not finite
    3   closures                         8   size of saved state      13  bfloat16
    4   missing gradients                9   steps with lr 0          14  torch.compile (only on request)
    5   what a step leaves unchanged     10  refusals                 15  hooks
    16  autocast, default device and other settings of the caller     17  state and groups that others edit
    18  closures that are evaluated several times

An optimizer gets drawn gradients. One whose first argument is called ``model`` gets a small module, and the same
gradients by a backward pass. One whose step raises TypeError without a closure gets the closure of a convex loss, which
returns what suits it: the loss after a backward pass, or in its graph residuals, ``(outputs, loss)``, or the loss.
Clauses that can't be asked of such an optimizer say why.

The suite needs torch only, and uses nothing of `steepest` but itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

from steepest.testing import closures, construction, edits, gradients, saving, stepping, surroundings  # noqa: F401
from steepest.testing.evidence import Broken, NotApplicable, one_line
from steepest.testing.subject import REGISTERED, Clause, Factory, Subject

__all__ = ["CLAUSES", "Clause", "Finding", "Report", "Verdict", "check_clause", "check_optimizer"]

CLAUSES = dict(sorted(REGISTERED.items(), key=lambda named: named[1].number))
"""Every clause by name, in the contract's order."""


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


def check_optimizer(
    factory: Factory,
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    slow: bool = False,
    only: Collection[str] | None = None,
) -> Report:
    """Check every clause of the contract for an optimizer.

    Args:
        factory: a function ``factory(params, **overrides)`` that constructs the optimizer for parameters in any form
            that torch allows, with some options overridden. A class serves, or a ``functools.partial`` of one.
        name: name of the optimizer in the report; by default its class's.
        dtype: dtype of the parameters, except in clauses about a dtype.
        device: device of the parameters.
        slow: whether to check the slow clauses, which compile (chapter 14).
        only: names of the clauses to check; all by default.

    Raises:
        ValueError: if the optimizer takes no parameter at all, or a name in ``only`` is no clause.

    Example:
        >>> from functools import partial
        >>> report = check_optimizer(partial(torch.optim.SGD, lr=0.1), only=["closure", "nan_gradient"])
        >>> print(report)
        SGD: 1 clauses kept, 1 broken, 0 not applicable
         3  a closure runs with gradients enabled, and its loss is returned  kept
        12  NaN in a gradient poisons neither weights nor state              broken  expected finite numbers after ...
        >>> report.ok, report.broken[0].clause.name
        (False, 'nan_gradient')
    """
    unknown = sorted(set(only or ()) - CLAUSES.keys())
    if unknown:
        raise ValueError(f"only={unknown[0]!r}: no such clause; there are {', '.join(CLAUSES)}")
    chosen = [c for c in CLAUSES.values() if (c.name in only if only is not None else slow or not c.slow)]
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
        subject = Subject(factory, dtype, device)
        name = name or type(subject.start().optimizer).__name__
    return Report(name, tuple(check_clause(clause, subject) for clause in chosen), subject.refused)


def check_clause(clause: Clause, subject: Subject) -> Finding:
    """Check one clause; an error that the clause does not expect is evidence that it is broken.

    >>> check_clause(CLAUSES["random_state"], Subject(torch.optim.SGD)).verdict
    <Verdict.KEPT: 'kept'>
    """
    try:
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
            subject.require(clause)
            clause.check(subject)
    except NotApplicable as reason:
        return Finding(clause, Verdict.NOT_APPLICABLE, str(reason))
    except Broken as evidence:
        return Finding(clause, Verdict.BROKEN, str(evidence))
    except Exception as error:
        return Finding(clause, Verdict.BROKEN, f"expected no error; saw {one_line(error)}")
    return Finding(clause, Verdict.KEPT)
