"""One step of the parameters that are not matrices: torch.optim's own functions, on lists of this rank's shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from steepest.engine.lost import safe_norm
from steepest.engine.roster import Roster
from steepest.engine.step import learning_rate, write
from steepest.exchange.bucket import Tensors
from steepest.exchange.shards import is_dtensor, local, meta_shard
from steepest.linalg import attempts
from steepest.linalg.rounding import positions
from steepest.rule import Elementwise, Rule, State
from steepest.stack.stack import state_dtype
from steepest.stack.storage import Storage
from steepest.stack.undo import undoing_each

STORED_AT_ONCE = 2**20
"""The entries whose moments are rounded to 8 bits together."""
LANES = 16
"""The numbers in the widest vector registers, which are AVX-512's, in float32."""


def step_elementwise(roster: Roster, groups: Sequence[Mapping[str, Any]], grads: Tensors) -> Tensor | int:
    """Step the parameters under elementwise rules, those of several groups together where their options are the same.

    Args:
        roster: all parameters, their rules and their state.
        groups: the options of all groups.
        grads: this rank's shard of the gradient of each parameter; None takes no part in the step.

    Returns:
        The number of parameters that were skipped because their gradient is not finite.
    """
    params, laid, peers = roster.params, roster.laid, roster.peers
    batches: dict[Any, list[int]] = {}
    for i in roster.elementwise:
        p = params[i]
        if grads[i] is not None and p.numel():
            batches.setdefault((p.device, p.dtype, peers.get(p)), []).append(i)
    skipped: Tensor | int = 0
    for (*_, holders), members in batches.items():
        entries = []
        for i in members:
            p, grad = params[i], grads[i]
            assert grad is not None
            state = _local_state(p, laid[p].state)
            entries.append(Entry(i, p, local(p), _like_state(state, local(p), grad), state))
        norms = torch.stack(torch._foreach_norm([entry.grad for entry in entries]))
        finite = norms < safe_norm(norms.dtype)
        if holders is not None:
            finite = holders.all(finite)
        waits = attempts.at_hand(finite)
        each: Sequence[Any] = finite.tolist() if waits else finite.unbind()
        skipped = skipped + (each.count(False) if waits else (~finite).sum())
        alike: dict[Any, list[tuple[Entry, Tensor]]] = {}
        for entry, good in zip(entries, each, strict=True):
            number = roster.numbers[entry.index]
            rule, alone = roster.rules[number], 0
            if Storage.of(rule) is not None:  # one at a time, because what is restored takes memory
                alone = entry.index
            options = id(rule), _scalar(groups[number]["lr"]), groups[number]["weight_decay"], alone
            if good is not False:
                alike.setdefault(options, []).append((entry, good))
        for together in alike.values():
            number = roster.numbers[together[0][0].index]
            entries, mask = [entry for entry, _ in together], None if waits else [good for _, good in together]
            _apply(roster.rules[number], groups[number], entries, mask)
        for entry in [entry for together in alike.values() for entry, _ in together]:
            if entry.stepped is not entry.W:
                in_whole = partial(meta_shard, entry.p)
                group, name = groups[roster.numbers[entry.index]], roster.names[entry.index]
                write(group, name, entry.W, entry.stepped, in_whole, entry.state["step"])
    return skipped


@dataclass
class Entry:
    """A parameter, and this rank's shards of it, of its gradient, and of its state."""

    index: int
    p: Tensor
    W: Tensor
    grad: Tensor
    state: State
    """As it is stored between steps."""

    @cached_property
    def stepped(self) -> Tensor:
        """Return the tensor that is stepped: the weights themselves, unless their dtype is too coarse to step in."""
        return _like_state(self.state, self.W, self.W)


def _scalar(lr: float | Tensor) -> float | int:
    """Return what tells one learning rate from another without waiting for a device."""
    return id(lr) if isinstance(lr, Tensor) else lr


def _local_state(p: Tensor, state: State) -> State:
    """Return this rank's shard of a parameter's state."""
    return {name: local(x) for name, x in state.items()} if is_dtensor(p) else state


def _like_state(state: State, p: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` in the dtype and memory layout of p's state in a step: fused kernels pair entries by address."""
    for moment in state.values():
        if moment.shape == p.shape:
            dtype = state_dtype(p)
            same = x.dtype == dtype and x.stride() == moment.stride()
            return x if same else torch.empty_like(moment, dtype=dtype).copy_(x)
    return x if x.dtype == p.dtype and x.stride() == p.stride() else torch.empty_like(p).copy_(x)


def _apply(
    rule: Rule | Elementwise, group: Mapping[str, Any], entries: Sequence[Entry], finite: Sequence[Tensor] | None
) -> None:
    """Step parameters of one dtype and device with the options of one group; undo it where not ``finite``."""
    assert isinstance(rule, Elementwise)
    undo = None
    if finite is not None:
        undo = undoing_each(finite, [[entry.stepped, *entry.state.values()] for entry in entries])
    grads, states, storage = [entry.grad for entry in entries], [entry.state for entry in entries], Storage.of(rule)
    if storage is not None:
        states = [storage.restored(state) for state in states]
        if finite is not None:  # what is infinite has no code
            grads = [torch.where(good, grad, 0) for good, grad in zip(finite, grads, strict=True)]
    with _in_whole_lanes([entry.stepped for entry in entries], grads, states) as stepped:
        rule.apply(*stepped, learning_rate(group, entries[0].stepped), group["weight_decay"])
    for entry, state in zip(entries, states, strict=True):
        if storage is not None and state.keys() != entry.state.keys():
            _store(storage, state, entry)
    if undo is not None:
        undo()


def _store(storage: Storage, state: State, entry: Entry) -> None:
    """Store moments in 8 bits, some rows at a time, because rounding takes some 30 bytes an entry for a moment."""
    whole = meta_shard(entry.p)
    rows = max(STORED_AT_ONCE * len(whole) // max(whole.numel(), 1), 1)
    for start in range(0, len(whole), rows):
        changed, stored = (
            {name: x[start : start + rows] if x.dim() else x for name, x in each.items()}
            for each in (state, entry.state)
        )
        place = positions(whole[start : start + rows], entry.W.device)
        storage.store(changed, stored, entry.state["step"], place)


@contextmanager
def _in_whole_lanes(
    weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]
) -> Iterator[tuple[list[Tensor], list[Tensor], list[State]]]:
    """Yield the tensors to step; on a CPU, one padded vector stands for those that don't fill whole vector registers.

    torch's fused functions round a remainder differently from whole registers. A shard would then differ in its last
    bits from the same part of the whole parameter. Weights and state are copied back at the end.

    Args:
        weights: tensors of one dtype and device.
        grads: of the same shapes and dtype.
        states: of one rule, so that all have the same names; tensors of these shapes, and the number ``step``.
    """
    short: dict[float, list[int]] = {}  # by the count of updates, because a vector has one count
    for i, W in enumerate(weights):
        if W.is_cpu and W.numel() % LANES:
            count = states[i]["step"].item() if attempts.at_hand(W) else i
            short.setdefault(count, []).append(i)
    apart = {i for members in short.values() for i in members}
    rest = [i for i in range(len(weights)) if i not in apart]
    stepped = [weights[i] for i in rest], [grads[i] for i in rest], [states[i] for i in rest]
    moments = [name for name in states[0] if name != "step"]
    back: list[tuple[Tensor, list[Tensor]]] = []  # vectors, and what they stand for
    for first, *others in short.values():
        members = [first, *others]
        padding = weights[first].new_zeros(-sum(weights[i].numel() for i in members) % LANES)
        changed = [[weights[i] for i in members], *([states[i][name] for i in members] for name in moments)]
        W, *state = (_joined(tensors, padding) for tensors in changed)
        back += zip((W, *state), changed, strict=True)
        stepped[0].append(W)
        stepped[1].append(_joined([grads[i] for i in members], padding))
        stepped[2].append({"step": states[first]["step"], **dict(zip(moments, state, strict=True))})
    yield stepped
    for vector, tensors in back:
        lengths = [x.numel() for x in tensors]
        parts = vector[: sum(lengths)].split_with_sizes(lengths)
        torch._foreach_copy_(tensors, [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)])
    for first, *others in short.values():
        for i in others:
            states[i]["step"].copy_(states[first]["step"])


def _joined(tensors: Sequence[Tensor], padding: Tensor) -> Tensor:
    """Return tensors as one vector that ends with the padding."""
    return torch.cat([*(x.reshape(-1) for x in tensors), padding])
