"""What the latest step did: the sizes of its directions, and of the weights that they moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.engine.diagnostics.readings import Readings
from steepest.engine.diagnostics.watch import Watch
from steepest.engine.roster import Roster
from steepest.exchange.shards import local
from steepest.rule import Elementwise
from steepest.stack.storage import Storage

UPDATES = ("squares", "entries", "moved", "weights")
"""Sums of D², of the entries of D, of (lr D)² and of W²."""


def note_updates(readings: Readings, watch: Watch, roster: Roster, groups: Sequence[Mapping[str, Any]]) -> None:
    """Note the sizes of the latest directions, and of their weights, under (what, index of the parameter)."""
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
        state, storage = {name: local(x) for name, x in roster.laid[p].state.items()}, Storage.of(rule)
        latest = rule.latest(state if storage is None else storage.restored(state))
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
