"""Errands: refreshes of single factors, done by ranks that have less to do than the matrix's owner.

With more ranks than matrices the dearest matrix sets the pace, whoever owns it. Where refreshes follow their step
(``refresh_async``), a plan lends them out, each factor's by itself (`steepest.exchange.plan.Loan`): after a step in
which one is due, the owner sends the factor and its basis, the borrower computes the new basis, sends it back, and
keeps nothing. Owners do all else, so state lives where it lived, and results are the same bits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any as Errand
from typing import Any as Solved

from torch import Tensor

from steepest.exchange.domain import Domain
from steepest.exchange.shipment import Shipment
from steepest.rule import Rule
from steepest.stack.stack import Answers, Seat, Stack
from steepest.stack.storage import Storage

ORDER = 1
"""Where in a `Solved` the order of columns stands."""


def offers(rule: Rule, pieces: Sequence[tuple[int, int, int]], itemsize: int) -> tuple[tuple[str, float, int], ...]:
    """What a `steepest.exchange.plan.Job` of some pieces ``(b, m, n)`` may lend, if it is one piece.

    By name, with its FLOPs in a step on the average, and the bytes that travel whenever it is due.
    """
    if len(pieces) != 1:
        return ()
    ((b, m, n),) = pieces
    return tuple(
        (name, b * errand.work.total, b * _entries(errand) * itemsize) for name, errand in rule.errands(m, n).items()
    )


def _entries(errand: Errand) -> int:
    """That travel for one matrix, there and back."""
    return (len(errand.needs) + errand.gives - 1) * errand.side**2 + errand.side


@dataclass(frozen=True)
class Lent:
    """An errand that is lent, as every rank of its domain knows it."""

    name: str
    errand: Errand
    seat: Seat
    """Of the matrices that it is for; on their owner in a stack, elsewhere in none."""
    stack: Stack | None
    """That stack, on the owner."""
    owner: int
    borrower: int

    @property
    def due(self) -> bool:
        """On the owner: whether the step has left it for afterwards."""
        return self.stack is not None and self.stack.has_put_off(self.seat)

    def needs(self, like: Tensor) -> list[Tensor]:
        """What the borrower gets, ``[b, d, d]`` each: on the owner as it is, elsewhere to be filled."""
        if self.stack is not None:
            kept = {name: self.stack.state[name][self.seat.slots] for name in self.errand.needs}
            state = Storage(self.stack.storage.bases).restored(kept)  # moments aren't among them
            return [state[name] for name in self.errand.needs]
        return [like.new_empty(self._shape()) for _ in self.errand.needs]

    def answer(self, like: Tensor) -> list[Tensor]:
        """What the owner gets, a `Solved` to be filled.

        One dtype travels, so the order does as floating-point numbers, in which such integers are exact.
        """
        square = self._shape()
        return [like.new_empty(square[:-1] if k == ORDER else square) for k in range(self.errand.gives)]

    def _shape(self) -> tuple[int, int, int]:
        return self.seat.stop - self.seat.start, self.errand.side, self.errand.side


def borrowed(rule: Rule, domain: Domain, lent: Sequence[Lent], like: Tensor) -> Generator[None, None, Answers]:
    """Have those errands done that are due; pauses while tensors are under way, the same number of times on all ranks.

    Returns:
        What the borrowers found, on the owners; the order of columns as integers.
    """
    if not lent:
        return {}
    agreed, _ = domain.agree([one.due for one in lent], 0)
    due = [one for one, is_due in zip(lent, agreed, strict=True) if is_due]
    if not due:
        return {}
    questions = [one.needs(like) if domain.me in (one.owner, one.borrower) else [] for one in due]
    away = _ship(domain, [(one.owner, one.borrower, x) for one, x in zip(due, questions, strict=True)], like)
    yield
    away.unload()
    answers = [one.answer(like) if domain.me == one.owner else [] for one in due]
    for k, one in enumerate(due):
        if domain.me == one.borrower:
            answers[k] = [x.to(like.dtype).contiguous() for x in rule.solve(*questions[k])]
    back = _ship(domain, [(one.borrower, one.owner, x) for one, x in zip(due, answers, strict=True)], like)
    yield
    back.unload()
    found: dict[tuple[int, int], dict[str, Solved]] = {}
    for one, answer in zip(due, answers, strict=True):
        if domain.me == one.owner:
            solved = tuple(x.long() if k == ORDER else x for k, x in enumerate(answer))
            found.setdefault(one.seat.key, {})[one.name] = solved
    return found


def _ship(domain: Domain, routes: Sequence[tuple[int, int, list[Tensor]]], like: Tensor) -> Shipment:
    """Tensors from one rank to another, each in a list that is to be read on the one and to be filled on the other."""
    outgoing: list[list[Tensor]] = [[] for _ in domain.ranks]
    incoming: list[list[Tensor]] = [[] for _ in domain.ranks]
    for source, target, tensors in routes:
        if source == domain.me:
            outgoing[target] += tensors
        if target == domain.me:
            incoming[source] += tensors
    return Shipment(domain, outgoing, incoming, like)
