"""Diagnostics: what the latest step did, and how the factors and bases are that it was taken in.

A step computes nothing for them, and waits for nothing. `Diagnosed.diagnostics` computes everything when it is called,
from the state and from the directions of the latest step. Steps free those, unless somebody has called it before: from
the first call on, the optimizer keeps references to the directions of its latest step.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from steepest.engine import phases
from steepest.engine.roster import Roster
from steepest.exchange.bucket import Bucket, Move
from steepest.exchange.peers import Peers
from steepest.exchange.shards import local
from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.surroundings import undisturbed
from steepest.rule import Elementwise, Refreshing, State
from steepest.stack.stack import Stack, to_device

SIDES = ("L", "R", "A", "B")
"""The names of Kronecker factors in states."""
COLUMNS = 256
"""Columns of a basis that a drift is computed from: with all of a longer one, a call would cost as much as a step."""
ITERATIONS = 20
"""Products by which a largest eigenvalue is estimated where there is no basis."""


class Diagnosed(torch.optim.Optimizer, ABC):
    """The part of an optimizer that tells how it is."""

    _roster: Roster
    _elsewhere: dict[Peers, int]
    _skipped: Tensor | int = 0
    _failures = 0
    _watch: Watch | None = None

    @property
    def _stacks(self) -> list[Stack]:
        return self._roster.stacks

    @property
    def skipped(self) -> int:
        """Return the number of updates of single matrices that were skipped because a gradient was not finite.

        Asking waits for the device. The matrices of other ranks count too, as of the beginning of the latest step.
        """
        self._roster.settle()
        return int(self._skipped) + self._roster.skipped() + sum(self._elsewhere.values())

    @property
    def failed_decompositions(self) -> int:
        """Return how many times every solver failed on a matrix, in float64 too; asking waits for the device.

        The matrix then keeps its old basis or inverse root, at first the identity, and steps all the same. With a polar
        factor or a basis that is computed anew in every step, it stays where it is, except for weight decay. Only the
        matrices that this rank steps are counted.
        """
        return self._failures + sum(int(stack.failures.sum()) for stack in self._stacks)

    @undisturbed
    @torch.no_grad()
    def diagnostics(self, per_parameter: bool = False, *, times: bool = False) -> dict[str, float]:
        """Return how the latest step went, and how factors and bases are: plain numbers, for a log.

        Keys are ``rule/quantity``, and ``rule/parameter/quantity`` with ``per_parameter``. Of several matrices there is
        the largest number, of ``effective_rank`` the mean:

        ==========================  ====================================================================================
        ``update_rms``              root mean square of the latest direction, before the learning rate
        ``update_to_weight``        ``lr · ‖D‖ / ‖W‖``, by the norms of all matrices together
        ``condition_number``        of the Kronecker factors, at most 1/eps; of those with inverses (K-FAC), damped
        ``basis_drift``             ``‖offdiag(Qᵀ K Q)‖ / ‖K‖``: 0 for eigenvectors; below 1e-3 it is rounding
        ``effective_rank``          ``(tr K)² / ‖K‖²`` as a share of the side, in (0, 1]
        ``refresh_age``             the steps since the last refresh of a basis or root was due
        ``failed_decompositions``   as the property counts them
        ==========================  ====================================================================================

        Beside them stand ``optimizer/skipped``, ``optimizer/failed_decompositions``, and with ``times`` the
        milliseconds of each phase of the latest step (``time/refresh``). What isn't known is left out: directions of
        matrices, and phases, at the first call that asks for them, because steps keep them only from then on.
        Directions take as much memory as the weights.

        Nothing is computed between two calls. A call waits once for each device. Between ranks nothing is sent:
        directions and weights are this rank's shards, factors are those of the matrices that this rank steps.

        Args:
            per_parameter: whether each parameter is shown, too.
            times: whether the phases of steps are timed from now on.

        Example:
            >>> from steepest import SOAP
            >>> W = torch.nn.Parameter(torch.eye(3))
            >>> opt, log = SOAP([("w", W)], lr=0.1, weight_decay=0.0), {}
            >>> for _ in range(2):
            ...     W.square().sum().backward()
            ...     opt.step()
            ...     log = opt.diagnostics(per_parameter=True)
            >>> log["soap/refresh_age"], round(log["soap/w/effective_rank"], 3)
            (1.0, 1.0)
        """
        self._roster.settle()
        watch = self._watch = self._watch or Watch()
        watch.timed = watch.timed or times
        readings, tallies = Readings(), Tallies(self._roster, per_parameter)
        _read_updates(readings, watch, self._roster, self.param_groups)
        for stack in self._stacks:
            _read_factors(readings, stack, self._roster)
        readings.note(("skipped",), torch.as_tensor(self._skipped))
        for (what, *where), numbers in readings.read():
            if what == "skipped":
                total = numbers[0] + self._roster.skipped() + sum(self._elsewhere.values())
            elif what in UPDATES:
                tallies.add_update(where[0], what, numbers[0])
            else:
                tallies.add_factors(where[0], what, numbers)
        for stack in self._stacks:
            tallies.add_ages(stack, self._roster.refresh_offsets(stack, self.param_groups))
        found = tallies.shown()
        failed = sum(x for name, x in found.items() if name.endswith("/failed_decompositions") and name.count("/") == 1)
        found |= {"optimizer/skipped": total, "optimizer/failed_decompositions": float(self._failures + failed)}
        return found | watch.times()

    @abstractmethod
    def _step(self) -> None: ...

    def _watched(self, watch: Watch) -> None:
        """Take one step, and keep what diagnostics need of it."""
        with watch.watching(self._roster.buckets):
            self._step()
        watch.roster, watch.rates = self._roster, [group["lr"] for group in self.param_groups]


class Watch:
    """What is kept of the latest step: references to its moves, its learning rates, and marks if it is timed."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.rates: list[float | Tensor] = []
        self.roster: Roster | None = None
        self.timed = False
        self.timeline: phases.Timeline[Any] | None = None

    @contextmanager
    def watching(self, buckets: Sequence[Bucket]) -> Iterator[None]:
        """Forget the step before, and time the one in the ``with`` block if that is wanted."""
        self.moves, self.rates, self.timeline = [], [], None
        if not self.timed or phases.is_listening():
            yield
            return
        on_gpu = any(bucket.device.type == "cuda" for bucket in buckets)
        self.timeline = phases.Timeline(_event if on_gpu else time.perf_counter)
        with phases.listening(self.timeline):
            yield

    def times(self) -> dict[str, float]:
        """Return the milliseconds of each phase, once the device has finished the step."""
        if self.timeline is None:
            return {}
        last = self.timeline.marks[-1][1]
        if isinstance(last, float):
            spent = self.timeline.spent(lambda start, end: 1e3 * (end - start))
        else:
            last.synchronize()
            spent = self.timeline.spent(lambda start, end: start.elapsed_time(end))
        return {f"time/{name}": x for name, x in spent.items()}


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Readings:
    """Numbers on devices, which are read together: the host waits once for each device."""

    def __init__(self) -> None:
        self.noted: dict[torch.device, list[tuple[tuple[Any, ...], Tensor]]] = {}

    def note(self, key: tuple[Any, ...], x: Tensor) -> None:
        """Have ``x`` read under a key, which need not be unique."""
        self.noted.setdefault(x.device, []).append((key, x.detach().reshape(-1).double()))

    def read(self) -> list[tuple[tuple[Any, ...], list[float]]]:
        """Return the numbers that were noted, with their keys."""
        found: list[tuple[tuple[Any, ...], list[float]]] = []
        for noted in self.noted.values():
            numbers = iter(torch.cat([x for _, x in noted]).tolist())
            found += [(key, [next(numbers) for _ in range(x.numel())]) for key, x in noted]
        return found


# What the step did.

UPDATES = ("squares", "entries", "moved", "weights")
"""Sums of D², of the entries of D, of (lr D)² and of W²."""


def _read_updates(readings: Readings, watch: Watch, roster: Roster, groups: Sequence[Mapping[str, Any]]) -> None:
    """Note the sizes of the latest directions, and of their weights."""
    for move in watch.moves if watch.roster is roster else ():
        D = move.D
        entries = D.isfinite().sum() if move.may_stay else torch.tensor(D.numel(), device=D.device)
        _note_update(readings, move.index, D.nan_to_num() if move.may_stay else D, entries, move.W, watch, roster)
    for index in roster.elementwise:
        p = roster.params[index]
        rule = roster.rules[roster.numbers[index]]
        if p not in roster.laid or not p.numel():
            continue
        assert isinstance(rule, Elementwise)
        state = {name: local(x) for name, x in roster.laid[p].state.items()}
        latest = rule.latest(state)
        if latest is not None:
            entries = latest.numel() * (state["step"] > 0).to(latest.device)
            D = torch.where(entries > 0, latest, 0.0)  # it is 0/0 before the first step
            _note_update(readings, index, D, entries, local(p), watch, roster, groups)


def _note_update(
    readings: Readings,
    index: int,
    D: Tensor,
    entries: Tensor,
    W: Tensor,
    watch: Watch,
    roster: Roster,
    groups: Sequence[Mapping[str, Any]] = (),
) -> None:
    number = roster.numbers[index]
    rate = watch.rates[number] if number < len(watch.rates) else groups[number]["lr"]
    squares = torch.linalg.vector_norm(D, dtype=torch.float64).square()
    weights = torch.linalg.vector_norm(W, dtype=torch.float64).square()
    rate = rate.detach().reshape(()).to(squares.device, torch.float64) if isinstance(rate, Tensor) else rate
    for what, x in zip(UPDATES, (squares, entries, squares * rate**2, weights), strict=True):
        readings.note((what, index), x)


# How factors are.


def _read_factors(readings: Readings, stack: Stack, roster: Roster) -> None:
    """Note how the Kronecker factors of a stack are, slot by slot; NaN for those that have seen no gradient."""
    with fp32_matmul_precision("highest"):
        for side in SIDES:
            if side in stack.state:
                roots = [getattr(roster.rules[segment.group], "root", 1) for segment in stack.segments]
                slots = [root for root, s in zip(roots, stack.segments, strict=True) for _ in range(s.start, s.stop)]
                for what, x in factor_health(stack.state, side, to_device(slots, stack.device)).items():
                    readings.note((what, stack), x)
    readings.note(("failed_decompositions", stack), stack.failures)


def factor_health(state: State, side: str, root: int | Tensor = 1) -> dict[str, Tensor]:
    """Return numbers ``[B]`` about one side's factors ``K [B, d, d]``, with one matrix product at most.

    ``P`` in the state, where there is no basis, is a root's inverse: ``P ≈ K^(-1/root)``, with a
    root for each matrix.

    >>> state = {"L": torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), "Q_L": torch.eye(2)[None]}
    >>> {name: round(x.item(), 3) for name, x in factor_health(state, "L").items()}
    {'effective_rank': 0.8, 'condition_number': 1.0, 'basis_drift': 0.447}
    """
    K, Q, P = state[side], state.get(f"Q_{side}"), state.get(f"P_{side}")
    norm = torch.linalg.vector_norm(K, dim=(-2, -1), dtype=torch.float64)  # [B]
    trace = K.diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=torch.float64)
    found = {"effective_rank": (trace / norm).square() / K.shape[-1]}
    if Q is not None:
        weights, whole = torch.ones((), dtype=torch.float64, device=K.device), norm.square()
        if f"lambda_{side}" in state:
            λ = state[f"lambda_{side}"].double()  # [B, d]
        elif "in_basis" in state:  # KL-SOAP's factors stand in their bases' coordinates
            λ = K.diagonal(dim1=-2, dim2=-1).double()
        else:
            Q = Q.to(K.dtype)
            if Q.shape[-1] > COLUMNS:
                Q, weights = _some_columns(Q)
            KQ = K @ Q  # [B, d, c]
            λ = (Q * KQ).sum(dim=-2, dtype=torch.float64)
            whole = (weights * torch.linalg.vector_norm(KQ, dim=-2, dtype=torch.float64).square()).sum(dim=-1)
        top = λ.amax(dim=-1)
        found["condition_number"] = top / torch.maximum(λ.amin(dim=-1), torch.finfo(K.dtype).eps * top)
        found["basis_drift"] = (1 - (weights * λ.square()).sum(dim=-1) / whole).clamp(min=0).sqrt()
    elif P is not None:
        found["condition_number"] = (_largest(K) * _largest(P) ** root).clamp(min=1.0)
    return found


def _some_columns(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return `COLUMNS` columns of bases ``Q [B, d, d]``, and for how many each stands: the first, and evenly others.

    Columns are ordered by descending eigenvalue, so the first are most of the factor, and the last has the smallest.
    """
    d, half = Q.shape[-1], COLUMNS // 2
    others = [half + (d - half - 1) * i // (half - 1) for i in range(half)]
    weights = torch.ones(COLUMNS, dtype=torch.float64, device=Q.device)
    weights[half:] = (d - half) / half
    return Q.index_select(-1, to_device([*range(half), *others], Q.device)), weights


def _largest(K: Tensor) -> Tensor:
    """Return about the largest eigenvalue of ``K [B, d, d]``, symmetric, from its row with the largest diagonal."""
    start = K.diagonal(dim1=-2, dim2=-1).argmax(dim=-1).view(-1, 1, 1).expand(-1, 1, K.shape[-1])
    x = K.gather(-2, start).mT  # [B, d, 1]
    for _ in range(ITERATIONS):
        norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True, dtype=torch.float64)
        x = K @ (x / norm.clamp(min=1e-300)).to(K.dtype)
    largest: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64)
    return largest


# What is shown.


@dataclass
class Tally:
    """What was found of some matrices: those of one parameter, or all under one rule."""

    sums: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def shown(self) -> dict[str, float]:
        """Return one number for each quantity."""
        found, sums = {}, self.sums
        if sums.get("entries", 0) > 0:
            found["update_rms"] = math.sqrt(sums["squares"] / sums["entries"])
            if sums["weights"] > 0:
                found["update_to_weight"] = math.sqrt(sums["moved"] / sums["weights"])
        for what, numbers in self.numbers.items():
            if known := [x for x in numbers if not math.isnan(x)]:
                mean = sum(known) / len(known)
                found[what] = {"effective_rank": mean, "failed_decompositions": sum(known)}.get(what, max(known))
        return found


class Tallies:
    """The tallies of all rules, and of all parameters if they are wanted."""

    def __init__(self, roster: Roster, per_parameter: bool) -> None:
        self.roster = roster
        self.per_parameter = per_parameter
        self.found: dict[str, Tally] = {}

    def of(self, index: int) -> list[Tally]:
        """Return the tallies that a parameter belongs to."""
        rule = self.roster.rules[self.roster.numbers[index]].name
        keys = [rule, f"{rule}/{self.roster.names[index]}"] if self.per_parameter else [rule]
        return [self.found.setdefault(key, Tally()) for key in keys]

    def add_update(self, index: int, what: str, number: float) -> None:
        """Add one of `UPDATES` of a parameter."""
        for tally in self.of(index):
            tally.sums[what] = tally.sums.get(what, 0.0) + number

    def add_factors(self, stack: Stack, what: str, numbers: Sequence[float]) -> None:
        """Add a quantity of all slots of a stack."""
        for segment in stack.segments:
            for tally in self.of(segment.index):
                tally.numbers.setdefault(what, []).extend(numbers[segment.slots])

    def add_ages(self, stack: Stack, offsets: Sequence[float]) -> None:
        """Add the numbers of steps since the last refresh was due, of all slots of a stack."""
        clocks = stack.clock.tolist()
        for number, start, stop in stack.groups:
            rule = self.roster.rules[number]
            if isinstance(rule, Refreshing) and any(name.startswith(("Q_", "P_")) for name in stack.state):
                age = cache(rule_age(rule))
                ages = [math.nan] * stack.size
                ages[start:stop] = [age(clocks[slot], offsets[slot]) for slot in range(start, stop)]
                self.add_factors(stack, "refresh_age", ages)

    def shown(self) -> dict[str, float]:
        """Return everything under flat keys."""
        return {f"{key}/{name}": x for key, tally in self.found.items() for name, x in tally.shown().items()}


def rule_age(rule: Refreshing[Any]) -> Callable[[int, float], float]:
    """Return the steps since a refresh was due, by clock and offset: 0 if it was in the latest step; NaN if never.

    >>> from steepest.rules import RULES
    >>> age = rule_age(RULES["soap"](precondition_frequency=5))
    >>> [age(clock, 0.0) for clock in (0, 1, 3, 6, 7)]
    [nan, 0.0, 2.0, 0.0, 1.0]
    """

    def age(clock: int, offset: float) -> float:
        return next((float(clock - 1 - at) for at in range(clock - 1, -1, -1) if rule.due(at, offset)), math.nan)

    return age
