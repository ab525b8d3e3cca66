"""The engine: it gathers gradients, asks the rules for directions, and moves the weights.

    parameter ──view──▶ matrices ──gather──▶ stack [B, m, n] ──rule──▶ directions ──scatter──▶ parameter

Every optimizer of `steepest.optimizers` is this class with a rule's name and its options filled in. Groups may name
different rules: matrices under one, embeddings and norms under another, in one optimizer object.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from steepest.engine import checkpoint, consolidate, participants
from steepest.engine.elementwise import step_elementwise
from steepest.engine.group import check_options, describe, option_defaults
from steepest.engine.participants import Gradients
from steepest.engine.step import apply, finish, safe_norm, step_stack
from steepest.exchange.assign import assign, peers_of
from steepest.exchange.bucket import Bucket, Tensors
from steepest.exchange.peers import Peers
from steepest.exchange.shards import copy_into, is_dtensor, local
from steepest.linalg.surroundings import undisturbed
from steepest.rule import Elementwise, Rule, nearest
from steepest.rules import RULES
from steepest.rules.aliases import ALIASES, resolve
from steepest.stack.names import parameter_name
from steepest.stack.stack import Stack, state_dtype
from steepest.stack.stagger import Offsets, group_offsets, slot_offsets
from steepest.view import View


class Optimizer(torch.optim.Optimizer):
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
        self._reset()
        options = resolve({"rule": rule} | options)
        rule = options["rule"]
        known = option_defaults(rule)
        for name in options:
            if name not in known:
                hint = nearest(name, [*known, *ALIASES])
                raise ValueError(f"{name}={options[name]!r}: {rule} has no such option{hint}")
        super().__init__(params, known | options)

    def _reset(self) -> None:
        """Forget all parameters, where they are, and how they are stepped."""
        self._buckets: list[Bucket] = []
        self._peers: dict[Tensor, Peers] = {}  # the ranks that hold shards of a parameter, where other ranks do
        self._distributed = False  # whether there are peers or DTensors
        self._elsewhere: dict[Peers, int] = {}  # the updates that other ranks have skipped
        self._frozen: list[tuple[int, int]] = []  # groups and positions of parameters that have no state yet
        self._offsets: dict[tuple[int, int], Offsets] = {}  # by group and period
        self._devices: list[tuple[Tensor, torch.device]] = []  # the parameters that state was laid out for
        self._skipped = torch.zeros((), dtype=torch.int64, device="cpu")

    def __repr__(self) -> str:
        return describe(type(self).__name__, self.param_groups, self.state)

    @undisturbed
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own; options that the group leaves out are filled in."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group={param_group!r}: must be a dict")
        inherits = param_group.get("rule", self.defaults["rule"]) == self.defaults["rule"]
        param_group = resolve({"rule": self.defaults["rule"]} | param_group)
        rule = param_group["rule"]
        known = option_defaults(rule)
        shared = self.defaults if inherits else {"lr": self.defaults["lr"]}
        group = known | shared | param_group
        params = group["params"]
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        check_options(group)
        for item in group["params"]:
            name, p = item if isinstance(item, tuple) else ("a parameter", item)
            if isinstance(p, Tensor) and not p.is_floating_point():
                raise ValueError(f"{name} of dtype {p.dtype}: only real floating-point parameters can be optimized")
            if isinstance(p, Tensor) and issubclass(RULES[rule], Rule):
                View.of(p, group)
        super().add_param_group(group)
        for name in self.defaults.keys() - known.keys() - param_group.keys():
            del group[name]  # an option of the other rule, which torch fills in everywhere
        number = len(self.param_groups) - 1
        peers = self._note_group(number)
        group |= RULES[rule].settled(group, lambda holds: _on_all(peers.values(), holds))
        self._adopt([(number, i) for i, p in enumerate(group["params"]) if p.requires_grad])

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
        self._step()
        return loss

    @undisturbed
    @torch.no_grad()
    def _step(self) -> None:
        """Take one step with the gradients that are there."""
        self._rebind()
        rules = [RULES[group["rule"]].from_group(group) for group in self.param_groups]
        grads = self._participants()  # raises, if at all, before anything has changed
        _interleave([self._step_bucket(bucket, rules[bucket.group], grads[bucket.group]) for bucket in self._buckets])
        for number, (group, rule) in enumerate(zip(self.param_groups, rules, strict=True)):
            if isinstance(rule, Elementwise):
                skipped = step_elementwise(rule, group, number, grads[number], self.state, self._peers)
                self._skipped = skipped + self._skipped

    def _step_bucket(self, bucket: Bucket, rule: Rule | Elementwise, grads: Tensors) -> Iterator[None]:
        """Step the matrices of a bucket; pause wherever tensors travel between ranks."""
        assert isinstance(rule, Rule)
        group = self.param_groups[bucket.group]
        weights = None
        if group["weight_decay_method"] == "l2" and group["weight_decay"] != 0:
            weights = [None if g is None else local(p) for p, g in zip(group["params"], grads, strict=True)]

        gradients, decaying = yield from bucket.gather(grads, weights)
        directions = []
        for stack in bucket.stacks:
            made = step_stack(rule, stack, gradients, decaying, group, self._refresh_offsets(stack, group, rule))
            if made is not None:
                directions.append(made)
        moves = yield from bucket.scatter(directions)
        apply(group, bucket.group, moves, rule.decay_follows)

        for stack in bucket.stacks:
            if stack.deferred:
                finish(rule, stack)

    def _participants(self) -> Gradients:
        """Return the gradients that take part in this step; a frozen parameter that has a gradient by now gets state.

        A parameter sits the step out if it has no gradient on some rank; all ranks that hold it agree on that.
        """
        grads: Gradients = []
        refused: set[tuple[int, int]] = set()
        for number, group in enumerate(self.param_groups):
            grads.append([])
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is not None and p.is_inference():
                    raise RuntimeError(
                        f"{parameter_name(group, number, i)} (shape {list(p.shape)}) was made under "
                        "torch.inference_mode(), and can't be trained: make it outside, or clone it there"
                    )
                if grad is not None and grad.is_sparse:
                    raise RuntimeError(
                        f"the gradient of a parameter of shape {list(p.shape)} is sparse: only dense gradients work"
                    )
                if group["nonfinite"] == "raise" and grad is not None:
                    dtype = state_dtype(p)
                    if not bool(torch.linalg.vector_norm(local(grad).to(dtype)) < safe_norm(dtype)):
                        refused.add((number, i))
                grads[number].append(grad)
        if self._distributed:
            self._elsewhere |= participants.agree(self.param_groups, grads, refused, self._peers, self._buckets)
        if refused:
            number, i = min(refused)
            group = self.param_groups[number]
            raise FloatingPointError(
                f"the gradient of {parameter_name(group, number, i)} (shape {list(group['params'][i].shape)}) is not "
                'finite or too large to square; nonfinite="skip" would leave the parameter out of this step'
            )
        if self._frozen:
            self._adopt([(n, i) for n, i in self._frozen if grads[n][i] is not None])
        return grads

    def _refresh_offsets(self, stack: Stack, group: Mapping[str, Any], rule: Rule) -> Sequence[int]:
        """Return for each slot of a stack the step of its period in which it refreshes."""
        if not group["stagger"]:
            return [0] * stack.size
        period = rule.period(int(stack.clock[0]))
        key = (stack.group, period)
        if key not in self._offsets:
            frozen = {i for number, i in self._frozen if number == stack.group}
            self._offsets[key] = group_offsets(rule, group, period, frozen)
        return slot_offsets(self._offsets[key], stack)

    # What was skipped, and what failed.

    @property
    def skipped(self) -> int:
        """Return the number of updates of single matrices that were skipped because a gradient was not finite.

        Asking waits for the device. The matrices of other ranks count too, as of the beginning of the latest step.
        """
        self._settle()
        mine = sum(stack.skipped for bucket in self._buckets if bucket.counts for stack in bucket.stacks)
        return int(self._skipped) + mine + sum(self._elsewhere.values())

    @property
    def failed_decompositions(self) -> int:
        """Return how many times every solver failed on a matrix, in float64 too; asking waits for the device.

        The matrix then keeps its old basis or inverse root, at first the identity, and steps all the same. With a polar
        factor or a basis that is computed anew in every step, it stays where it is, except for weight decay. Only the
        matrices that this rank steps are counted.
        """
        return sum(int(stack.failures.sum()) for stack in self._stacks)

    @property
    def _stacks(self) -> list[Stack]:
        """Return the stacks that this process steps."""
        return [stack for bucket in self._buckets for stack in bucket.stacks]

    # State: it is allocated at once for parameters that train, and at the first gradient for frozen ones.

    def _adopt(self, thawed: Iterable[tuple[int, int]]) -> None:
        """Allocate state for parameters that have none, given by group and position, and show it in ``self.state``."""
        thawed = set(thawed)
        for number in sorted({number for number, _ in thawed}):
            group = self.param_groups[number]
            indices = sorted(i for n, i in thawed if n == number)
            rule = RULES[group["rule"]].from_group(group)
            if isinstance(rule, Elementwise):
                for i in indices:
                    p = group["params"][i]
                    self.state[p] = rule.init(torch.empty_like(p, dtype=state_dtype(p), requires_grad=False))
                continue
            buckets = assign(rule, number, group, indices, self._buckets, self._peers)
            for bucket in buckets:
                for i, state in bucket.state():
                    self.state[group["params"][i]].update(state)
            # Peers exchange their buckets one after the other. With buckets in between that only some of the ranks
            # step, ranks would send in different orders, and wait for each other.
            self._buckets += buckets
            self._buckets.sort(key=lambda b: (b.communicates, () if b.peers is None else b.peers.ranks))
            self._offsets.clear()
        self._frozen = [key for key in self._frozen if key not in thawed]

    def _note_group(self, number: int) -> dict[Tensor, Peers]:
        """Note the parameters of a new group, all of them as frozen, and return the ranks that share them."""
        group = self.param_groups[number]
        group["format"] = checkpoint.FORMAT
        peers = peers_of(group["params"])
        self._peers |= peers
        self._distributed = self._distributed or bool(peers) or any(map(is_dtensor, group["params"]))
        self._frozen += [(number, i) for i in range(len(group["params"]))]
        self._devices += [(p, p.device) for p in group["params"]]
        return peers

    def _rebind(self) -> None:
        """Lay the state out anew if parameters in the groups have been replaced, or moved to another device."""
        params = [p for group in self.param_groups for p in group["params"]]
        known = self._devices
        if len(params) != len(known):
            raise RuntimeError(
                f"the groups have {len(params)} parameters, and had {len(known)}: add parameters with add_param_group"
            )
        for p, (q, device) in zip(params, known, strict=True):
            if p is not q or p.device != device:
                state = self.__getstate__()
                new = {q: p for (q, _), p in zip(known, params, strict=True)}
                self.__setstate__(state | {"state": {new[q]: named for q, named in state["state"].items()}})
                break
        self._settle()

    def _settle(self) -> None:
        """Account for what the device has done since the last step."""
        for bucket in self._buckets:
            for stack in bucket.stacks:
                stack.settle()

    @undisturbed
    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        state = {p: {name: x.clone() for name, x in named.items()} for p, named in self.state.items()}
        return {"defaults": self.defaults, "state": state, "param_groups": self.param_groups}

    @undisturbed
    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state["state"]
        super().__setstate__(state | {"state": defaultdict(dict)})
        self._reset()
        for number in range(len(self.param_groups)):
            self._note_group(number)
        self._adopt([(n, i) for n, i in self._frozen if self.param_groups[n]["params"][i] in saved])
        for p, named in saved.items():
            for name, x in named.items():
                copy_into(self.state[p][name], x)

    # Checkpoints.

    @undisturbed
    def state_dict(self) -> dict[str, Any]:
        """Return the state, by parameter, as tensors of its own: no view drags a whole stack into the file."""
        self._rebind()
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
        self._rebind()
        return consolidate.consolidated(super().state_dict())

    def load_consolidated(self, state_dict: Mapping[str, Any] | None) -> None:
        """Load what `consolidate`, or `state_dict` in one process, returned. Every rank must call it.

        Args:
            state_dict: read on rank 0 only; others may pass None.

        Raises:
            ValueError: as `load_state_dict`, on all ranks. Nothing has changed then.
        """
        self._rebind()
        self._load(
            *consolidate.distributed(state_dict, lambda saved: checkpoint.match(saved, self.param_groups, self.state))
        )

    @undisturbed
    @torch.no_grad()
    def _load(self, state_dict: dict[str, Any], read: Callable[[Tensor], Tensor] = lambda saved: saved) -> None:
        """Check a state as a whole, then copy it in; ``read`` returns the values of a tensor in it."""
        self._rebind()
        state_dict = copy.copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved, options = checkpoint.match(state_dict, self.param_groups, self.state)
        self._adopt([(n, i) for n, i in self._frozen if self.param_groups[n]["params"][i] in saved])
        for p, tensors in saved.items():
            for name, x in self.state[p].items():
                copy_into(x, read(tensors[name]))
        for group, new in zip(self.param_groups, options, strict=True):
            group.update(new)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


def _interleave(tasks: Iterable[Iterator[None]]) -> None:
    """Run the steps of buckets interleaved: while one computes, the next one's gradients travel."""
    paused: list[Iterator[None]] = []
    for task in tasks:
        paused = [t for t in (task, *paused) if next(t, DONE) is not DONE]
    while paused:
        paused = [t for t in paused if next(t, DONE) is not DONE]


DONE = object()


def _on_all(peers: Iterable[Peers], holds: bool) -> bool:
    """Return whether something holds on all ranks of some peers, who ask in the same order."""
    for ranks in dict.fromkeys(peers):
        (refuted,), _ = ranks.agree([not holds])
        holds = not refuted
    return holds
