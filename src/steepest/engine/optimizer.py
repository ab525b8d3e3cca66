"""The engine: it gathers gradients, asks the rules for directions, and moves the weights.

    parameter ──view──▶ matrices ──gather──▶ stack [B, m, n] ──rule──▶ directions ──scatter──▶ parameter

Every optimizer of `steepest.optimizers` is this class with a rule's name and its options filled in. Groups may name
different rules: matrices under one, embeddings and norms under another, in one optimizer object.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from steepest.engine import checkpoint, consolidate, participants
from steepest.engine.changes import Seen, changed_form, check_rule, remove, renamed, stale, taken_over
from steepest.engine.diagnostics import Diagnosed
from steepest.engine.elementwise import step_elementwise
from steepest.engine.group import (
    check_names,
    check_parameter,
    check_parameters,
    describe,
    listed,
    option_defaults,
    plain_options,
    refuse_uncaptured,
)
from steepest.engine.lost import Lost, look_ahead
from steepest.engine.roster import Roster
from steepest.engine.step import apply, clip, finish, interleave, step_stack
from steepest.exchange.bucket import Bucket, Directions, Move, Tensors
from steepest.exchange.peers import Peers
from steepest.exchange.shards import copy_into
from steepest.linalg import attempts
from steepest.linalg.surroundings import undisturbed
from steepest.rule import Statistics, nearest
from steepest.rules.aliases import ALIASES, resolve
from steepest.stack.names import parameter_names
from steepest.stack.stack import Stack


class Optimizer(Diagnosed):
    """An optimizer that steps each parameter group by the rule that the group names.

    Args:
        params: tensors, groups (dicts), or ``(name, tensor)`` pairs. A group may set ``rule`` and any option.
        rule: the rule of groups that name none.
        options: ``lr``, ``weight_decay`` and the like, and the rule's own, for groups of that rule.

    Raises:
        ValueError: for unknown rules and options out of range, before anything is allocated.

    Example:
        >>> W, b = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.zeros(2))
        >>> opt = Optimizer([{"params": [W], "rule": "soap"}, {"params": [b], "rule": "adamw"}], lr=0.1)
        >>> (W.sum() + b.sum()).backward()
        >>> opt.step()
        >>> b
        Parameter containing:
        tensor([-0.1000, -0.1000], requires_grad=True)
        >>> opt
        Optimizer(
          group 0: soap, lr=0.1, 1 parameter, 4 entries, 108 bytes of state
          group 1: adamw, lr=0.1, 1 parameter, 2 entries, 20 bytes of state
        )
    """

    def __init__(self, params: Iterable[Any], rule: str = "adamw", **options: Any) -> None:
        options = resolve({"rule": rule} | options)
        rule = options["rule"]
        known = option_defaults(rule)
        for name in options:
            if name not in known:
                hint = nearest(name, [*known, *ALIASES])
                raise ValueError(f"{name}={options[name]!r}: {rule} has no such option{hint}")
        defaults = known | options
        stand_in = {"lr": 0.0} if defaults["lr"] is None else {}  # each group may have a rate of its own
        self._roster = Roster(self._biases())
        self._elsewhere: dict[Peers, int] = {}  # the updates that other ranks have skipped
        self._built = False  # state is laid out when all groups are there
        super().__init__(params, plain_options(defaults | stand_in) | dict.fromkeys(stand_in))
        self._built = True
        self._enter(range(len(self.param_groups)))

    _built = True  # as one that was unpickled is

    def __repr__(self) -> str:
        return describe(type(self).__name__, self.param_groups, self._roster.states)

    @undisturbed
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own; options that the group leaves out are filled in."""
        if self._built:
            self._heed()
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group={param_group!r}: must be a dict")
        inherits = param_group.get("rule", self.defaults["rule"]) == self.defaults["rule"]
        param_group = resolve({"rule": self.defaults["rule"]} | param_group)
        check_names(param_group)
        rule = param_group["rule"]
        known = option_defaults(rule)
        shared = self.defaults if inherits else {"lr": self.defaults["lr"]}
        group = known | shared | param_group
        group |= plain_options(group)
        group["params"] = listed(group["params"])
        for i, item in enumerate(group["params"]):
            name, p = item if isinstance(item, tuple) else (f"parameter {i}", item)
            if isinstance(p, Tensor):
                check_parameter(name, p, group)
                self._admit(name, p, group)
        super().add_param_group(group)
        for name in self.defaults.keys() - known.keys():
            del group[name]  # an option of the other rule, which torch fills in everywhere
        if self._built:
            self._enter([len(self.param_groups) - 1])

    @undisturbed
    def _enter(self, numbers: Sequence[int]) -> None:
        """Lay out state for the parameters of new groups."""
        self._roster.enter(self.param_groups, numbers)
        self._show()

    def _show(self) -> None:
        """Show the state that is laid out in ``self.state``, beside entries of others, and remember what is there."""
        for p, laid in self._roster.laid.items():
            self.state.setdefault(p, {}).update(laid.state)
        self._seen = Seen(self.param_groups, self.state)

    # A step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss; it runs with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: if a gradient is not finite and its group says ``nonfinite="raise"``. Nothing has
                changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._watch is None:
            self._step()
        else:
            self._watched(self._watch)
        return loss

    @undisturbed
    @torch.no_grad()
    def _step(self) -> None:
        """Take one step with the gradients that are there."""
        self._heed()
        grads = self._participants()  # raises, if at all, before anything has changed
        self._roster.check_schedules()  # likewise
        captured = self._captured(grads) if self._captures else {}
        buckets = self._roster.buckets
        ahead = [b for b in buckets if not (b.communicates or attempts.at_hand(b.stacks[0].t))]
        lost = look_ahead(ahead, grads) if ahead else {}
        if self._roster.clipped:
            made: list[list[Directions]] = [[] for _ in buckets]
            interleave([self._directions(b, grads, captured, lost, d) for b, d in zip(buckets, made, strict=True)])
            clip(made, buckets, self._roster.clipped)
            interleave([self._move(b, d) for b, d in zip(buckets, made, strict=True)])
        else:
            interleave([self._step_bucket(bucket, grads, captured, lost) for bucket in buckets])
        if self._roster.elementwise:
            self._skipped += step_elementwise(self._roster, self.param_groups, grads)

    def _step_bucket(
        self, bucket: Bucket, grads: Tensors, captured: Mapping[int, Statistics | None], lost: Mapping[Stack, Lost]
    ) -> Iterator[None]:
        """Step the matrices of a bucket; pause wherever tensors travel between ranks."""
        directions: list[Directions] = []
        yield from self._directions(bucket, grads, captured, lost, directions)
        yield from self._move(bucket, directions)

    def _directions(
        self,
        bucket: Bucket,
        grads: Tensors,
        captured: Mapping[int, Statistics | None],
        lost: Mapping[Stack, Lost],
        made: list[Directions],
    ) -> Iterator[None]:
        """Append the directions of a bucket's matrices to ``made``."""
        roster = self._roster
        statistics = (yield from bucket.statistics(captured)) if captured else {}
        gradients, weights = yield from bucket.gather(grads, roster.penalized(grads))
        for stack in bucket.stacks:
            offsets = roster.refresh_offsets(stack, self.param_groups)
            known = (statistics, roster.clipped, lost.get(stack))
            directions = step_stack(stack, gradients, weights, roster.ways, offsets, *known)
            if directions is not None:
                made.append(directions)

    def _move(self, bucket: Bucket, directions: Sequence[Directions]) -> Iterator[None]:
        """Move the weights of a bucket, and let its rules finish."""
        roster = self._roster
        moves: dict[int, list[Move]] = {}
        for move in (yield from bucket.scatter(directions)):
            moves.setdefault(roster.numbers[move.index], []).append(move)
        for number, of_group in moves.items():
            if self._watch is not None:
                self._watch.note(of_group)
            apply(roster.rules[number], self.param_groups[number], roster.names, of_group)
        for stack in bucket.stacks:
            if stack.deferred:
                finish(stack)

    # What an optimizer that captures statistics in a model's layers overrides; see `steepest.engine.capturing`.

    _captures: ClassVar[bool] = False

    def _biases(self) -> Mapping[Tensor, Tensor]:
        """Return the biases that are stepped together with weights, by weight."""
        return {}

    def _marks(self) -> Sequence[set[int]]:
        """Return sets of numbers of parameters, to which those of other ranks are added before a step."""
        return ()

    def _admit(self, name: str, p: Tensor, group: Mapping[str, Any]) -> None:
        """Raise if a parameter's rule needs statistics."""
        refuse_uncaptured(name, group["rule"])

    def _captured(self, grads: list[Tensor | None]) -> Mapping[int, Statistics | None]:
        """Return what was captured, by the number of the weight; None: on other ranks. ``grads`` may become None."""
        return {}

    def _participants(self) -> list[Tensor | None]:
        """Return the gradients that take part in this step; frozen parameters with a gradient get state."""
        roster = self._roster
        grads = [p.grad for p in roster.params]
        roster.refuse_untrainable(grads)
        marks = self._marks() if self._captures else ()
        raising = {number for number, group in enumerate(self.param_groups) if group["nonfinite"] == "raise"}
        if raising or roster.distributed:
            self._elsewhere |= participants.agree(roster, raising, grads, marks)
        thawed = [index for index in roster.frozen if grads[index] is not None]
        if thawed:
            roster.adopt(self.param_groups, thawed)
            self._show()
        return grads

    # What others write to ``param_groups`` and ``state``.

    def _heed(self) -> None:
        """Take in what others have written to groups and state since the last look, or refuse it by name."""
        self._roster.settle()
        groups, roster = self.param_groups, self._roster
        changed = self._seen.changed_options(groups)
        same_parameters = self._seen.same_parameters(groups)
        same_state = self._seen.same_state(self.state)
        if not changed and same_parameters and same_state:
            return
        for number, names in changed.items():
            if "rule" in names:
                check_rule(number, groups[number], roster.laid)
        for number, plain in [(n, plain_options(groups[n], names)) for n, names in changed.items()]:
            groups[number].update(plain)
        # Neither rules nor the layout of state depend on the learning rate, which schedules change at every step.
        others = {n: names for n, names in changed.items() if names != {"lr"}}
        if not same_parameters or any(changed_form(roster.laid, groups[n], names) for n, names in others.items()):
            self._lay_out_anew()
            self._show()
            return
        roster.read_options(groups, others)
        self._seen.note(groups, changed)
        if not same_state:
            roster.take_in(groups, self.state)
            self._show()

    @torch.no_grad()
    def _lay_out_anew(self) -> None:
        """Lay all state out anew, since parameters or options that lay it out are others now, and fill it in."""
        groups, old = self.param_groups, self._roster
        check_parameters(groups, self._seen.dims(groups))  # before names: flat parts have fewer than names
        names = renamed(groups, self._seen)
        values = taken_over(groups, parameter_names(groups), self.state, old.laid)
        gone = stale(self.state, groups, old.laid)
        for number, of_group in names.items():
            groups[number]["param_names"] = of_group
        self._skipped += old.skipped() + sum(self._elsewhere.values())
        self._failures, self._elsewhere = self.failed_decompositions, {}
        self._roster = Roster.filled(groups, values, self._biases())
        remove(self.state, gone, old.laid, self._roster.laid)

    @undisturbed
    def __getstate__(self) -> dict[str, Any]:
        self._heed()
        state = {key: checkpoint.copied(entries) for key, entries in self.state.items()}
        return {"defaults": self.defaults, "state": state, "param_groups": self.param_groups}

    @undisturbed
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"state": defaultdict(dict, state["state"])})
        groups, self._elsewhere = self.param_groups, {}
        for group in groups:
            group.update(plain_options(group))  # an older pickle has fewer
        self._roster = Roster.filled(
            groups, taken_over(groups, parameter_names(groups), self.state, {}), self._biases()
        )
        self._show()

    # Checkpoints.

    @undisturbed
    def state_dict(self) -> dict[str, Any]:
        """Return the state, by parameter, as tensors of its own: no view drags a whole stack into the file."""
        self._heed()
        return checkpoint.detached(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state in. Dtypes stay as they are here: float32 factors of a bfloat16 parameter stay float32.

        Raises:
            ValueError: if it doesn't fit: other groups, parameters or rules, missing or misshapen state, options out
                of range, a format of a newer steepest. Nothing has changed then.
        """
        self._load(state_dict)

    @undisturbed
    def consolidate(self) -> dict[str, Any] | None:
        """Return the whole state as a plain dict on rank 0, and None elsewhere. Every rank must call it.

        It is what `state_dict` returns in one process, and one process can load it. Values are copied to the host's
        memory of rank 0 one tensor after the other: for large models use torch.distributed.checkpoint instead.
        """
        self._heed()
        return consolidate.consolidated(super().state_dict())

    def load_consolidated(self, state_dict: Mapping[str, Any] | None) -> None:
        """Load what `consolidate`, or `state_dict` in one process, returned. Every rank must call it.

        Args:
            state_dict: read on rank 0 only; others may pass None.

        Raises:
            ValueError: as `load_state_dict`, on all ranks. Nothing has changed then.
        """
        self._heed()

        def check(saved: Mapping[str, Any]) -> None:
            checkpoint.match(saved, self.param_groups, self._roster.states)

        self._load(*consolidate.distributed(state_dict, check))

    @undisturbed
    @torch.no_grad()
    def _load(self, state_dict: dict[str, Any], read: Callable[[Tensor], Tensor] = lambda saved: saved) -> None:
        """Check a state as a whole, then copy it in; ``read`` returns the values of a tensor in it."""
        self._heed()
        roster = self._roster
        state_dict = copy.copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved, others, options = checkpoint.match(state_dict, self.param_groups, roster.states)
        roster.adopt(self.param_groups, [i for i in roster.frozen if roster.params[i] in saved])
        self.state.clear()
        for p, entries in saved.items():
            mine = roster.laid[p].state
            for name, x in mine.items():
                copy_into(x, read(entries[name]))
            # Beside the engine's entries there may be others'.
            self.state[p] = {k: checkpoint.copied(v, read) for k, v in entries.items() if k not in mine}
        self.state.update({key: checkpoint.copied(entries, read) for key, entries in others.items()})
        for group, new in zip(self.param_groups, options, strict=True):
            group.update(new)
            group.update(plain_options(group))
        roster.read_options(self.param_groups, range(len(self.param_groups)))
        self._show()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
