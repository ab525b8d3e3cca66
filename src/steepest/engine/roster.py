"""The roster: all parameters by number, the way in which each is stepped, and where its state lies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steepest.engine.changes import Laid, form_of, stale, taken_over
from steepest.engine.checkpoint import FORMAT, fresh_state
from steepest.engine.consolidate import move_into
from steepest.exchange.assign import assign, peers_of
from steepest.exchange.bucket import Bucket, Tensors
from steepest.exchange.peers import Peers
from steepest.exchange.shards import copy_into, is_dtensor, local
from steepest.rule import Elementwise, Rule, State
from steepest.rules import RULES
from steepest.stack.names import parameter_names
from steepest.stack.stack import Stack, Way, shared
from steepest.stack.stagger import Job, Offsets, dealt, slot_offsets
from steepest.view import View


class Roster:
    """The parameters of all groups, numbered in order, and the state that is laid out for them."""

    def __init__(self, biases: Mapping[Tensor, Tensor]) -> None:
        """Start without parameters; ``biases`` are those that are stepped together with weights, by weight."""
        self.joined = biases
        self.biases: dict[int, int] = {}
        """The same by numbers, of those that are in groups."""
        self.params: list[Tensor] = []
        self.numbers: list[int] = []
        """The number of each parameter's group."""
        self.names: list[str] = []
        self.rules: list[Rule | Elementwise] = []
        """The rule of each group."""
        self.ways: list[Way | None] = []
        """The way in which each group is stepped; None under an elementwise rule."""
        self.clipped: dict[int, float] = {}
        """The groups whose rule clips directions, with its limit κ."""
        self.elementwise: list[int] = []
        """The parameters under elementwise rules."""
        self.laid: dict[Tensor, Laid] = {}
        """The state of each parameter that has some."""
        self.frozen: set[int] = set()
        """The parameters that have no state yet."""
        self.untrainable: list[int] = []
        """The parameters that were made under inference mode."""
        self.buckets: list[Bucket] = []
        self.peers: dict[Tensor, Peers] = {}
        """The ranks that hold shards of a parameter, where other ranks do."""
        self.distributed = False
        """Whether there are such parameters, or DTensors."""
        self._offsets: Offsets = {}

    @classmethod
    @torch.no_grad()
    def filled(
        cls, groups: Sequence[dict[str, Any]], values: Mapping[Tensor, State], biases: Mapping[Tensor, Tensor]
    ) -> Roster:
        """Return the roster of all groups, with these values in the state of their parameters."""
        roster = cls(biases)
        roster.enter(groups, range(len(groups)), {p for p, state in values.items() if state})
        for p, state in values.items():
            for name, x in state.items():
                move_into(roster.laid[p].state[name], x)
        return roster

    @property
    def stacks(self) -> list[Stack]:
        """Return the stacks that this process steps."""
        return [stack for bucket in self.buckets for stack in bucket.stacks]

    @property
    def states(self) -> dict[Tensor, State]:
        """Return the state of each parameter that has some."""
        return {p: laid.state for p, laid in self.laid.items()}

    def enter(self, groups: Sequence[dict[str, Any]], numbers: Iterable[int], having: Collection[Tensor] = ()) -> None:
        """Number the parameters of new groups, and lay out state for those that train.

        Args:
            groups: all groups.
            numbers: the numbers of those that are new.
            having: frozen parameters that want state nevertheless.
        """
        first = len(self.params)
        for number in numbers:
            groups[number]["format"] = FORMAT
            self.params += groups[number]["params"]
            self.numbers += [number] * len(groups[number]["params"])
        entered = range(first, len(self.params))
        places = {p: i for i, p in enumerate(self.params)}
        joined = [(places[w], places[b]) for w, b in self.joined.items() if w in places and b in places]
        self.biases = {w: b for w, b in joined if groups[self.numbers[w]].get("bias")}
        peers = peers_of(self.params[first:])
        self.peers |= peers
        self.distributed = self.distributed or bool(peers) or any(map(is_dtensor, self.params[first:]))
        for number in numbers:
            group = groups[number]
            group |= RULES[group["rule"]].settled(
                group, partial(_on_all, [peers[p] for p in group["params"] if p in peers])
            )
        self.names = parameter_names(groups)
        self.read_options(groups, numbers)
        self.elementwise += [i for i in entered if self.ways[self.numbers[i]] is None]
        self.untrainable += [i for i in entered if self.params[i].is_inference()]
        self.frozen |= set(entered)
        self.adopt(groups, [i for i in entered if self.params[i].requires_grad or self.params[i] in having])

    def read_options(self, groups: Sequence[Mapping[str, Any]], numbers: Iterable[int]) -> None:
        """Take the rules of some groups, and the ways in which they are stepped, from their options."""
        for number in numbers:
            group = groups[number]
            rule, way = RULES[group["rule"]].from_group(group), None
            if isinstance(rule, Rule):
                penalty = group["weight_decay"] if group["weight_decay_method"] == "l2" else 0.0
                way = Way(rule, penalty, group["compile"], group["cuda_graph"], group["stagger"])
                with suppress(TypeError):  # a schedule of refreshes may have no hash
                    way = shared(way)
            self.rules[number : number + 1] = [rule]
            self.clipped.pop(number, None)
            if isinstance(rule, Rule) and rule.kl_clip > 0:
                self.clipped[number] = rule.kl_clip
            if way is not (self.ways[number] if number < len(self.ways) else None):
                self._offsets = {}
            self.ways[number : number + 1] = [way]

    def adopt(self, groups: Sequence[Mapping[str, Any]], indices: Iterable[int]) -> None:
        """Lay out state for parameters that have none."""
        weights = {bias: weight for weight, bias in self.biases.items()}
        wanted = {weights.get(i, i) for i in indices} & self.frozen  # a layer's weight and bias have one state
        made: dict[int, State] = {i: {} for i in sorted(wanted | {self.biases[i] for i in wanted if i in self.biases})}
        for i in made:
            if isinstance(self.rules[self.numbers[i]], Elementwise):
                made[i] = fresh_state(self.params[i], groups[self.numbers[i]])
        matrices = [(i, self.numbers[i]) for i in made if self.ways[self.numbers[i]] is not None and i not in weights]
        for i, number in matrices:
            if groups[number].get("bias") and i not in self.biases:
                raise ValueError(f"{self.names[i]}: bias=True in its group, and no group has a bias of its layer")
        if matrices:
            buckets = assign(self.ways, groups, self.params, matrices, self.buckets, self.peers, self.biases)
            for bucket in buckets:
                for i, state in bucket.state():
                    made[i].update(state)
            # Peers exchange their buckets one after the other. With buckets in between that only some of the ranks
            # step, ranks would send in different orders, and wait for each other.
            self.buckets += buckets
            self.buckets.sort(key=lambda b: (b.communicates, () if b.peers is None else b.peers.ranks))
            self._offsets = {}
        for i, state in made.items():
            self.laid[self.params[i]] = Laid.of(self.params[i], form_of(groups[self.numbers[i]]), state)
        self.frozen -= made.keys()

    @torch.no_grad()
    def take_in(self, groups: Sequence[Mapping[str, Any]], shown: Mapping[Any, Any]) -> None:
        """Copy the entries that others have put into the state that is shown; make anew what they have deleted."""
        values = taken_over(groups, self.names, shown, self.laid)
        stale(shown, groups, self.laid)
        self.adopt(groups, [i for i in self.frozen if values.get(self.params[i])])
        changed: dict[int, State] = {}
        for i, p in enumerate(self.params):
            state, theirs = self.laid[p].state if p in self.laid else {}, values.get(p, {})
            if state and theirs is not state:
                fresh = fresh_state(p, groups[self.numbers[i]]) if len(theirs) < len(state) else {}
                changed[i] = {name: fresh[name] if name not in theirs else theirs[name] for name in state}
        self._renew(changed)
        for i, state in changed.items():
            for name, x in self.laid[self.params[i]].state.items():
                copy_into(x, state[name])

    def _renew(self, indices: Collection[int]) -> None:
        """Move state to other memory, so that tensors of it that others hold go on showing what they show now."""
        states: dict[int, State] = {}
        for i in indices:
            if self.ways[self.numbers[i]] is None:
                states[i] = {name: torch.empty_like(x) for name, x in self.laid[self.params[i]].state.items()}
        for bucket in self.buckets:
            if any(not {s.index, s.bias}.isdisjoint(indices) for stack in bucket.stacks for s in stack.segments):
                for stack in bucket.stacks:
                    stack.renew()
                for i, state in bucket.state():
                    states.setdefault(i, {}).update(state)
        for i, state in states.items():
            p = self.params[i]
            self.laid[p] = replace(self.laid[p], state=self.laid[p].state | state)

    def refuse_untrainable(self, grads: Tensors) -> None:
        """Raise for sparse gradients, and for gradients of parameters that were made under inference mode."""
        for index, grad in enumerate(grads):
            if grad is not None and grad.is_sparse:
                raise RuntimeError(
                    f"the gradient of {self.names[index]} (shape {list(grad.shape)}) is sparse: only dense gradients "
                    "work"
                )
        for index in self.untrainable:
            if grads[index] is not None:
                raise RuntimeError(
                    f"{self.names[index]} (shape {list(self.params[index].shape)}) was made under "
                    "torch.inference_mode(), and can't be trained: make it outside, or clone it there"
                )

    def settle(self) -> None:
        """Account for what the device has done since the last step."""
        for bucket in self.buckets:
            for stack in bucket.stacks:
                stack.settle()

    def skipped(self) -> int:
        """Return how many updates of single matrices were skipped."""
        return sum(stack.skipped for bucket in self.buckets if bucket.counts for stack in bucket.stacks)

    def penalized(self, grads: Tensors) -> Tensors | None:
        """Return the weights that take part where weight decay is part of the gradient; None if it is nowhere."""
        if not any(way is not None and way.penalty for way in self.ways):
            return None
        ways = [self.ways[number] for number in self.numbers]
        return [
            local(p) if grad is not None and way is not None and way.penalty else None
            for p, grad, way in zip(self.params, grads, ways, strict=True)
        ]

    def refresh_offsets(self, stack: Stack, groups: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        """Return for each slot of a stack the fraction of its period after which it refreshes."""
        if not any(way is not None and way.stagger for way in self.ways):
            return [0.0] * stack.size
        if not self._offsets:
            self._offsets = self._dealt(groups)
        return slot_offsets(self._offsets, stack)

    def _dealt(self, groups: Sequence[Mapping[str, Any]]) -> Offsets:
        """Deal offsets to the matrices of all groups; those that are stepped in the same way share the period."""
        orders = [name for group in groups for name in group.get("param_names") or range(len(group["params"]))]
        jobs: dict[int, tuple[Way, list[Job]]] = {}
        for index, (p, number) in enumerate(zip(self.params, self.numbers, strict=True)):
            way = self.ways[number]
            if way is not None and way.stagger and index not in self.frozen and index not in self.biases.values():
                order = (number, orders[index]) if isinstance(orders[index], int) else (0, orders[index])
                jobs.setdefault(id(way), (way, []))[1].append((order, index, View.of(p, groups[number])))
        return {key: offset for way, of_way in jobs.values() for key, offset in dealt(way.rule, of_way).items()}

    def check_schedules(self) -> None:
        """Raise if a schedule of refreshes gives nonsense for this step."""
        scheduled = [way.rule for way in self.ways if way and callable(getattr(way.rule, "precondition_frequency", 0))]
        if scheduled:
            for stack in self.stacks:
                for number, start, stop in stack.groups:
                    if (way := self.ways[number]) and way.rule in scheduled:
                        way.rule.due(max(stack.clock[start:stop].tolist()), 0.0)


def _on_all(peers: Iterable[Peers], holds: bool) -> bool:
    """Return whether something holds on all ranks of some peers, who ask in the same order."""
    for ranks in dict.fromkeys(peers):
        (refuted,), _ = ranks.agree([not holds])
        holds = not refuted
    return holds
