"""The contract of a PyTorch optimizer, as a suite for any of them, ours or not.

`check_optimizer` puts an optimizer to some fifty small tests. Each is a *clause*: a function with a docstring that says
what is promised and why. A clause is kept, broken (with the evidence: what was expected, what was seen), or not
applicable (with the reason). In a project's own tests::

    def test_contract():
        report = steepest.testing.check_optimizer(functools.partial(MyOptimizer, lr=1e-3))
        assert report.ok, report

and on the command line: ``steepest check my_package:MyOptimizer --lr 1e-3``. The chapters:

    1   what parameters come as          6   what state holds         11  GradScaler
    2   options re-read at every step    7   saving and resuming      12  gradients that are not finite
    3   closures                         8   size of what is saved    13  bfloat16
    4   gradients that are missing       9   steps with lr 0          14  torch.compile (only if asked for)
    5   what a step leaves alone         10  what is refused          15  hooks

It knows nothing of `steepest`: it needs torch only, and looks at an optimizer from outside.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from steepest.testing import construction, hazards, precision, saving, settings, stepping
from steepest.testing.clause import CLAUSES, Broken, Clause, NotApplicable
from steepest.testing.evidence import one_line
from steepest.testing.report import Finding, Report, Verdict
from steepest.testing.subject import Factory, Subject

__all__ = ["CLAUSES", "Clause", "Finding", "Report", "Verdict", "check_clause", "check_optimizer"]

MODULES = (construction, settings, stepping, saving, hazards, precision)

_in_order = sorted(CLAUSES.values(), key=lambda clause: clause.number)
CLAUSES.clear()
CLAUSES.update({clause.name: clause for clause in _in_order})


def check_optimizer(
    factory: Factory,
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    slow: bool = False,
    only: Collection[str] | None = None,
) -> Report:
    """Put an optimizer to every clause of the contract.

    Args:
        factory: ``factory(params, **overrides)`` builds one, for parameters in any form that torch allows, with some
            options set otherwise. A class serves, or a ``functools.partial`` that fills in its learning rate.
        name: what the report calls it; by default the class's name.
        dtype: what parameters are, but for the clauses that are about a dtype.
        device: where they are.
        slow: whether to include the slow clause, which compiles (chapter 14).
        only: names of the clauses to check; all by default.

    Raises:
        ValueError: if it can't optimize a single parameter, or a name in ``only`` is no clause.

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
    with _undisturbed():
        subject = Subject(factory, dtype, device)
        name = name or type(subject.start().optimizer).__name__
    return Report(name, tuple(check_clause(clause, subject) for clause in chosen), subject.refused)


def check_clause(clause: Clause, subject: Subject) -> Finding:
    """One clause's verdict. Whatever the optimizer raises where the clause expects no error is evidence.

    >>> check_clause(CLAUSES["random_state"], Subject(torch.optim.SGD)).verdict
    <Verdict.KEPT: 'kept'>
    """
    try:
        with _undisturbed():
            clause.check(subject)
    except NotApplicable as reason:
        return Finding(clause, Verdict.NOT_APPLICABLE, str(reason))
    except Broken as evidence:
        return Finding(clause, Verdict.BROKEN, str(evidence))
    except Exception as error:
        return Finding(clause, Verdict.BROKEN, f"expected no error; saw {one_line(error)}")
    return Finding(clause, Verdict.KEPT)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random states are put back, and warnings are nobody's concern here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.random.fork_rng():
            yield
