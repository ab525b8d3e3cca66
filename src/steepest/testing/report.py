"""The report of the suite: a verdict for each clause, and a table of all verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from steepest.testing.clause import Clause


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
    refused: Mapping[str, str] | None = None
    """Parameters that the optimizer refused, with its errors; the suite went on without them."""

    @property
    def ok(self) -> bool:
        """Whether no clause is broken."""
        return not self.broken

    @property
    def kept(self) -> Sequence[Finding]:
        """Findings of clauses that the optimizer keeps."""
        return self._with(Verdict.KEPT)

    @property
    def broken(self) -> Sequence[Finding]:
        """Findings of clauses that the optimizer breaks."""
        return self._with(Verdict.BROKEN)

    @property
    def not_applicable(self) -> Sequence[Finding]:
        """Findings of clauses that do not apply to the optimizer."""
        return self._with(Verdict.NOT_APPLICABLE)

    @property
    def summary(self) -> str:
        """The optimizer's name and the number of clauses for each verdict, in one line."""
        return (
            f"{self.name}: {len(self.kept)} clauses kept, {len(self.broken)} broken, "
            f"{len(self.not_applicable)} not applicable"
        )

    def __str__(self) -> str:
        rows = [(str(f.clause.number), f.clause.title, f.verdict.value, f.why) for f in self.findings]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [self.summary]
        lines += [f"not given: a parameter of {shape}, refused: {why}" for shape, why in (self.refused or {}).items()]
        for number, *words in rows:
            cells = [f"{word:<{width}}" for word, width in zip(words, widths[1:], strict=False)]
            lines.append("  ".join([f"{number:>{widths[0]}}", *cells, words[-1]]).rstrip())
        return "\n".join(lines)

    def _with(self, verdict: Verdict) -> Sequence[Finding]:
        return [finding for finding in self.findings if finding.verdict is verdict]
