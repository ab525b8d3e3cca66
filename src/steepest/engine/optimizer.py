"""The engine: the only `torch.optim.Optimizer` here. It gathers, asks the rule, and moves the weights.

    parameter ──view──▶ matrices ──exchange──▶ stack [B, m, n] ──rule──▶ directions ──exchange──▶ parameter

Every optimizer of `steepest.optimizers` is this class with a rule's name and its options filled in. Groups may name
different rules: matrices under one, embeddings and norms under another, in one optimizer object.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest.engine import checkpoint
from steepest.engine import consolidate as consolidation
from steepest.engine.apply import apply
from steepest.engine.elementwise import step_elementwise
from steepest.engine.group import check_options, option_defaults
from steepest.engine.step import directions, finish, safe_norm
from steepest.exchange.lot import Lot, Tensors
from steepest.exchange.placement import local, put
from steepest.exchange.sharing import domains, held_gradient, share
from steepest.rule import Elementwise, Rule, nearest
from steepest.rules import RULES, respelled
from steepest.stack.names import parameter_name
from steepest.stack.stack import Stack, spread, state_dtype
from steepest.view import View

if TYPE_CHECKING:
    from steepest.exchange.domain import Domain


class Optimizer(torch.optim.Optimizer):
    """Steps parameter groups, each by the rule that it names.

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
    """

    def __init__(self, params: Iterable[Any], rule: str = "adamw", **options: Any) -> None:
        self._lots: list[Lot] = []
        self._domains: dict[Tensor, Domain] = {}  # the ranks that hold parts of a parameter, where there are others
        self._elsewhere: dict[Domain, int] = {}  # what the other ranks have skipped
        self._waiting: list[tuple[int, int]] = []  # frozen, by group and position: no state before a gradient
        self._phases: dict[tuple[int, int], dict[tuple[int, int, int], int]] = {}
        self._homes: list[tuple[Tensor, torch.device]] = []  # whom state was laid out for, and where
        self._skipped = torch.zeros((), dtype=torch.int64)
        options = respelled({"rule": rule} | options)
        rule = options.pop("rule")
        known = option_defaults(rule)
        for name in options:
            if name not in known:
                raise ValueError(f"{name}={options[name]!r}: {rule} has no such option{nearest(name, known)}")
        super().__init__(params, known | options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own; whatever the group leaves out is filled in."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group={param_group!r}: must be a dict")
        param_group = respelled({"rule": self.defaults["rule"]} | param_group)
        rule = param_group["rule"]
        known = option_defaults(rule)
        shared = self.defaults if rule == self.defaults["rule"] else {"lr": self.defaults["lr"]}
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
        shared_among = _shared_among(group["params"])
        group |= RULES[rule].settled(group, lambda holds: _on_all(shared_among.values(), holds))
        group["format"] = checkpoint.FORMAT
        self._domains |= shared_among
        for name in self.defaults.keys() - known.keys() - param_group.keys():
            del group[name]  # the other rule's options, which torch fills in everywhere
        number = len(self.param_groups) - 1
        wanted = [i for i, p in enumerate(group["params"]) if p.requires_grad]
        self._waiting += [(number, i) for i, p in enumerate(group["params"]) if not p.requires_grad]
        self._adopt(number, wanted)
        self._homes += [(p, p.device) for p in group["params"]]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        with torch.no_grad():
            self._follow()
            rules = [RULES[group["rule"]].from_group(group) for group in self.param_groups]
            grads = self._take_stock()  # whatever is refused is refused before a change
            _run(self._trip(lot, rules[lot.group], grads[lot.group]) for lot in self._in_order())
            for number, (group, rule) in enumerate(zip(self.param_groups, rules, strict=True)):
                if isinstance(rule, Elementwise):
                    left_out = step_elementwise(rule, group, number, grads[number], self.state, self._domains)
                    self._skipped = left_out + self._skipped
        return loss

    @property
    def skipped(self) -> int:
        """How many updates of single matrices their non-finite gradients have cost. Asking waits for the device.

        Other ranks' matrices count too, as of the beginning of the latest step.
        """
        self._settle()
        mine = sum(stack.skipped for lot in self._lots if lot.counts for stack in lot.stacks)
        return int(self._skipped) + mine + sum(self._elsewhere.values())

    @property
    def failed_decompositions(self) -> int:
        """How often every solver failed on a matrix, in float64 too; asking waits for the device.

        The matrix then keeps its old basis or inverse root, at first the identity, and steps all the same; with a polar
        factor or a basis that are made anew in every step it stays where it is, but for weight decay. Of matrices that
        other ranks step, those ranks know.
        """
        return sum(int(stack.failures.sum()) for stack in self._stacks)

    @property
    def _stacks(self) -> list[Stack]:
        """What this process steps."""
        return [stack for lot in self._lots for stack in lot.stacks]

    # Before a step: who takes part.

    def _take_stock(self) -> list[Tensors]:
        """By group, the parts that this rank holds of the gradients: None for parameters that sit this step out.

        They do if any rank has no gradient for them; all ranks that hold a part agree on that, and on what to refuse.
        """
        self._settle()
        places = [(number, i) for number, group in enumerate(self.param_groups) for i in range(len(group["params"]))]
        absent = {place: _is_absent(self.param_groups[place[0]]["params"][place[1]]) for place in places}
        refused = {place: not absent[place] and _is_refused(self.param_groups[place[0]], place[1]) for place in places}
        for domain, those in self._by_domain(places).items():
            lots = [lot for lot in self._lots if lot.domain == domain and lot.counts]
            mine = sum(stack.skipped for lot in lots for stack in lot.stacks)
            flags = [absent[place] for place in those] + [refused[place] for place in those]
            agreed, everyone = domain.agree(flags, mine)
            absent |= dict(zip(those, agreed[: len(those)], strict=True))
            refused |= dict(zip(those, agreed[len(those) :], strict=True))
            self._elsewhere[domain] = everyone - mine
        for number, i in places:
            if refused[number, i]:
                raise _refusal(self.param_groups[number], number, i)
        self._welcome(place for place in places if not absent[place])
        return [
            [None if absent[number, i] else held_gradient(p) for i, p in enumerate(group["params"])]
            for number, group in enumerate(self.param_groups)
        ]

    def _by_domain(self, places: Iterable[tuple[int, int]]) -> dict[Domain, list[tuple[int, int]]]:
        found: dict[Domain, list[tuple[int, int]]] = {}
        for number, i in places:
            domain = self._domains.get(self.param_groups[number]["params"][i])
            if domain is not None:
                found.setdefault(domain, []).append((number, i))
        return found

    # One lot, one step: gather, rule, spread, apply.

    def _in_order(self) -> list[Lot]:
        """Lots as they set out: a domain's one after the other, so that all its ranks send in the same order.

        Between them might come what only some of these ranks step.
        """
        return sorted(self._lots, key=lambda lot: (lot.travels, () if lot.domain is None else lot.domain.ranks))

    def _trip(self, lot: Lot, rule: Rule | Elementwise, grads: Tensors) -> Iterator[None]:
        """Take a lot's step, with a pause wherever its tensors are on their way."""
        assert isinstance(rule, Rule)
        group = self.param_groups[lot.group]
        arrive = lot.gather(grads)
        weights = [None if grad is None else local(p) for p, grad in zip(group["params"], grads, strict=True)]
        arrive_too = lot.gather(weights) if _has_penalty(group) else None
        if lot.travels:
            yield
        gradients = arrive()
        decaying = None if arrive_too is None else arrive_too()
        made = [
            directions(rule, stack, gradients, decaying, group, self._stagger(stack, group, rule))
            for stack in lot.stacks
        ]
        land = lot.spread([d for d in made if d is not None])
        if lot.travels:
            yield
        apply(group, lot.group, land(), rule.decay_follows)
        answers = yield from lot.borrowed(rule)
        for stack in lot.stacks:
            finish(rule, stack, answers)

    def _stagger(self, stack: Stack, group: Mapping[str, Any], rule: Rule) -> list[int]:
        """The phase of each slot's refresh; spread over all matrices of the group that share a period.

        They queue by name, or by position where there are no names: neither thawing nor loading by name in another
        order changes a phase, nor does it matter which rank steps what.
        """
        if not group["stagger"]:
            return [0] * stack.size
        period = rule.period(int(stack.clock[0]))
        key = (stack.group, period)
        if key not in self._phases:
            names = group.get("param_names") or range(len(group["params"]))
            frozen = {i for number, i in self._waiting if number == stack.group}
            jobs = sorted(
                (names[i], piece, k, i, m, n)
                for i, p in enumerate(group["params"])
                if i not in frozen
                for piece, (b, m, n) in enumerate(View.of(p, group).pieces)
                for k in range(b)
            )
            times = spread([rule.refresh_cost(m, n) for *_, m, n in jobs], period)
            self._phases[key] = {(i, piece, k): at for (_, piece, k, i, *_), at in zip(jobs, times, strict=True)}
        phases = self._phases[key]
        return [phases[(*seat.key, seat.first + k)] for seat in stack.seats for k in range(seat.stop - seat.start)]

    # State: eager for what trains, at the first gradient for what was frozen.

    def _adopt(self, number: int, indices: Sequence[int]) -> None:
        """Allocate state for the parameters at ``indices`` of group ``number``, and show it in ``self.state``."""
        group = self.param_groups[number]
        rule = RULES[group["rule"]].from_group(group)
        if isinstance(rule, Elementwise):
            for i in indices:
                p = group["params"][i]
                self.state[p] = rule.init(torch.empty_like(p, dtype=state_dtype(p), requires_grad=False))
            return
        lots = share(rule, number, group, indices, self._lots, self._domains)
        self._lots += lots
        for lot in lots:
            for i, state in lot.state():
                self.state[group["params"][i]].update(state)
        self._phases.clear()

    def _welcome(self, ready: Iterable[tuple[int, int]]) -> None:
        """Adopt frozen parameters, by group and position, that have thawed."""
        thawed = sorted(set(ready) & set(self._waiting))
        for number in sorted({number for number, _ in thawed}):
            self._adopt(number, [i for n, i in thawed if n == number])
        self._waiting = [place for place in self._waiting if place not in thawed]

    def state_dict(self) -> dict[str, Any]:
        """The state, by parameter, as tensors of its own: no view drags a whole stack into the file."""
        self._follow()
        self._settle()
        return checkpoint.detached(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state in. Dtypes stay as they are here: float32 factors of a bfloat16 parameter stay float32.

        Raises:
            ValueError: if it doesn't fit: other groups, parameters or rules, missing or misshapen state, options out
                of range, a format of a newer steepest. Nothing has changed then.
        """
        self._follow()
        self._settle()
        checkpoint.load(self, state_dict)

    def consolidate(self) -> dict[str, Any] | None:
        """The whole state as a plain dict, on rank 0; None elsewhere. Every rank must ask.

        What `state_dict` is in one process, and one process can load it. In one process, the same as `state_dict`.
        Values come to the host's memory of rank 0 one tensor after the other: for large models use
        torch.distributed.checkpoint instead.
        """
        self._follow()
        self._settle()
        return consolidation.consolidate(self)

    def load_consolidated(self, state_dict: Mapping[str, Any] | None) -> None:
        """Load what `consolidate`, or `state_dict` in one process, returned. Every rank must ask.

        Args:
            state_dict: read on rank 0 only; others may pass None.

        Raises:
            ValueError: as `load_state_dict`, on all ranks. Nothing has changed then.
        """
        self._follow()
        self._settle()
        consolidation.load_consolidated(self, state_dict)

    def _follow(self) -> None:
        """Lay the state out anew if a host has replaced parameters in their groups, or moved them to another device."""
        homes = [(p, p.device) for group in self.param_groups for p in group["params"]]
        if len(homes) != len(self._homes):
            raise RuntimeError(f"there were {len(self._homes)} parameters, now {len(homes)}: add_param_group adds some")
        if all(p is q and device == home for (p, device), (q, home) in zip(homes, self._homes, strict=True)):
            return
        heirs = {q: p for (p, _), (q, _) in zip(homes, self._homes, strict=True)}
        state = self.__getstate__()
        self.__setstate__(state | {"state": {heirs[q]: named for q, named in state["state"].items()}})

    def _settle(self) -> None:
        for stack in self._stacks:
            stack.settle()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        state = {p: {name: x.clone() for name, x in named.items()} for p, named in self.state.items()}
        return {"defaults": self.defaults, "state": state, "param_groups": self.param_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state["state"]
        super().__setstate__(state | {"state": defaultdict(dict)})
        self._lots, self._domains, self._elsewhere, self._waiting, self._phases = [], {}, {}, [], {}
        self._skipped = torch.zeros((), dtype=torch.int64)
        for number, group in enumerate(self.param_groups):
            group["format"] = checkpoint.FORMAT
            self._waiting += [(number, i) for i in range(len(group["params"]))]
            self._domains |= _shared_among(group["params"])
        self._homes = [(p, p.device) for group in self.param_groups for p in group["params"]]
        self._welcome((number, i) for number, i in self._waiting if self.param_groups[number]["params"][i] in saved)
        for p, named in saved.items():
            for name, x in named.items():
                put(self.state[p][name], x)


def _run(trips: Iterable[Iterator[None]]) -> None:
    """Run trips to their ends: while one computes, the next one's tensors come, and those of the one before land."""
    under_way: list[Iterator[None]] = []
    for trip in trips:
        under_way = [t for t in (trip, *under_way) if next(t, DONE) is not DONE]
    while under_way:
        under_way = [t for t in under_way if next(t, DONE) is not DONE]


DONE = object()


def _shared_among(params: Sequence[Tensor]) -> dict[Tensor, Domain]:
    return {p: domain for p, domain in zip(params, domains(params), strict=True) if domain is not None}


def _on_all(domains: Iterable[Domain], holds: bool) -> bool:
    """Whether something holds on all ranks of some domains, which they ask for in the same order."""
    for domain in dict.fromkeys(domains):
        (refuted,), _ = domain.agree([not holds], 0)
        holds = not refuted
    return holds


def _is_absent(p: Tensor) -> bool:
    """Whether a parameter of which this rank holds anything has no gradient; only dense ones are taken."""
    if p.grad is not None and p.grad.is_sparse:
        raise RuntimeError(f"the gradient of a parameter of shape {list(p.shape)} is sparse: only dense ones are taken")
    return p.grad is None and bool(local(p).numel() or not p.numel())


def _is_refused(group: Mapping[str, Any], index: int) -> bool:
    """Whether a gradient is not finite in a group that has none of that."""
    p = group["params"][index]
    if group["nonfinite"] != "raise" or p.grad is None:
        return False
    dtype = state_dtype(p)
    return not bool(torch.linalg.vector_norm(local(p.grad).to(dtype)) < safe_norm(dtype))


def _refusal(group: Mapping[str, Any], number: int, index: int) -> FloatingPointError:
    return FloatingPointError(
        f"the gradient of {parameter_name(group, number, index)} (shape {list(group['params'][index].shape)}) is not "
        'finite or too large to square; nonfinite="skip" would leave the parameter out of this step'
    )


def _has_penalty(group: Mapping[str, Any]) -> bool:
    return bool(group["weight_decay_method"] == "l2" and group["weight_decay"] != 0)
