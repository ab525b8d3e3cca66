"""The engine: the only `torch.optim.Optimizer` here. It gathers, asks the rule, and moves the weights.

    parameter ──view──▶ matrices ──exchange──▶ stack [B, m, n] ──rule──▶ directions ──exchange──▶ parameter

Every optimizer of `steepest.optimizers` is this class with a rule's name and its options filled in. Groups may name
different rules: matrices under one, embeddings and norms under another, in one optimizer object.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest import checkpoint
from steepest.apply import DECAY_METHODS, apply
from steepest.exchange import local
from steepest.rule import Elementwise, Rule, State, Step, check, check_choice
from steepest.rules import RULES
from steepest.stacks import Echo, Run, Stack, beside, lay_out, spread, state_dtype, to_device
from steepest.views import OPTIONS as VIEW_OPTIONS
from steepest.views import View

OPTIONS: dict[str, Any] = {"lr": None, "weight_decay": 0.01, "nonfinite": "skip"}
STACK_OPTIONS: dict[str, Any] = {"weight_decay_method": "decoupled", "stagger": False, "block_size": 0, **VIEW_OPTIONS}


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
        self._stacks: list[Stack] = []
        self._waiting: list[tuple[int, int]] = []  # frozen, by group and position: no state before a gradient
        self._phases: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        self._homes: list[tuple[Tensor, torch.device]] = []  # whom state was laid out for, and where
        self._skipped = torch.zeros((), dtype=torch.int64)
        known = option_defaults(rule)
        for name in options:
            if name not in known:
                raise ValueError(f"{name}={options[name]!r}: {rule} has no such option{nearest(name, known)}")
        super().__init__(params, known | options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own; whatever the group leaves out is filled in."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group={param_group!r}: must be a dict")
        rule = param_group.get("rule", self.defaults["rule"])
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
            self._welcome()
            rules = [_admit(group) for group in self.param_groups]  # whatever is refused is refused before a change
            for stack in self._stacks:
                rule = rules[stack.group]
                assert isinstance(rule, Rule)
                self._step_stack(stack, self.param_groups[stack.group], rule)
            for group, rule in zip(self.param_groups, rules, strict=True):
                if isinstance(rule, Elementwise):
                    self._step_elementwise(group, rule)
        return loss

    @property
    def skipped(self) -> int:
        """How many updates of single matrices their non-finite gradients have cost. Asking waits for the device."""
        return int(self._skipped) + sum(int(stack.skipped.sum()) for stack in self._stacks)

    # One stack, one step: gather, rule, scatter, apply.

    def _step_stack(self, stack: Stack, group: dict[str, Any], rule: Rule) -> None:
        params = [group["params"][seat.index] for seat in stack.seats]
        grads = [p.grad for p in params]
        if all(grad is None for grad in grads):
            return
        stack.settle()
        live = [grad is not None for seat, grad in zip(stack.seats, grads, strict=True) for _ in seat.range]
        G = local.gather(stack, grads)  # [B, m, n]
        finite = self._drop_nonfinite(stack, G, live)
        penalty = local.gather(stack, params) * group["weight_decay"] if _has_penalty(group) else None

        runs = list(stack.runs(rule, live, self._stagger(stack, group, rule)))
        whole = len(runs) == 1 and runs[0].slots == slice(0, stack.size)
        D = None if whole else torch.empty_like(G)
        moved = [False] * stack.size
        for run in runs:
            d = _update(rule, stack, run, G, penalty, finite)  # [b, m, n]
            if d is None:
                continue
            moved[run.slots] = [True] * len(d)
            if D is None:
                D = d
            else:
                D[run.slots] = d
        if D is not None:
            apply(group, stack.seats, D, moved, finite, rule.decay_follows)

    def _drop_nonfinite(self, stack: Stack, G: Tensor, live: list[bool]) -> Tensor | None:
        """Take matrices whose gradient is not finite out of this step.

        On a CPU the answer is at hand, and they leave ``live``. Elsewhere asking would wait for the device: their
        gradient becomes zero, and the mask ``[B, 1, 1]`` that is returned undoes whatever the step does to them.
        """
        norms = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
        finite: Tensor = norms < safe_norm(G.dtype)  # False for NaN
        alive = to_device(live, G.device).view(-1, 1, 1)
        undone = (alive & ~finite).view(-1)
        stack.skipped += undone
        if _at_hand(G):
            live[:] = (alive & finite).view(-1).tolist()
            return None
        G.masked_fill_(~finite, 0)
        stack.undone = Echo(undone.long())
        return finite

    def _stagger(self, stack: Stack, group: Mapping[str, Any], rule: Rule) -> list[int]:
        """The phase of each slot's refresh; spread over all matrices of the group that share a period.

        They queue by name, or by position where there are no names: neither thawing nor loading by name in another
        order changes a phase.
        """
        if not group["stagger"]:
            return [0] * stack.size
        period = rule.period(int(stack.clock[0]))
        key = (stack.group, period)
        if key not in self._phases:
            names = group.get("param_names") or range(len(group["params"]))
            peers = [(k, other) for k, other in enumerate(self._stacks) if other.group == stack.group]
            jobs = sorted(
                (names[s.index], s.piece, slot, k) for k, other in peers for s in other.seats for slot in s.range
            )
            phases = spread([rule.refresh_cost(*self._stacks[k].shape) for *_, k in jobs], period)
            self._phases[key] = {(k, slot): phase for (*_, slot, k), phase in zip(jobs, phases, strict=True)}
        number = self._stacks.index(stack)
        return [self._phases[key][number, slot] for slot in range(stack.size)]

    # Parameters that are no matrices.

    def _step_elementwise(self, group: dict[str, Any], rule: Elementwise) -> None:
        batches: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is not None and p.numel():
                batches.setdefault((p.device, p.dtype), []).append((p, beside(self.state[p], p, p.grad)))
        for batch in batches.values():
            norms = torch.stack(torch._foreach_norm([grad for _, grad in batch]))
            finite = norms < safe_norm(norms.dtype)
            self._skipped = self._skipped.to(finite.device) + (~finite).sum()
            if _at_hand(finite):
                batch = [pair for pair, fine in zip(batch, finite.tolist(), strict=True) if fine]
            self._apply_elementwise(rule, group, batch, None if _at_hand(finite) else finite)

    def _apply_elementwise(
        self, rule: Elementwise, group: dict[str, Any], batch: list[tuple[Tensor, Tensor]], finite: Tensor | None
    ) -> None:
        if not batch:
            return
        params = [p for p, _ in batch]
        weights = [beside(self.state[p], p, p) for p in params]  # p itself, unless its dtype is too coarse to step in
        states: list[State] = [self.state[p] for p in params]
        everything = [[W, *state.values()] for W, state in zip(weights, states, strict=True)]
        kept = None if finite is None else [[x.clone() for x in xs] for xs in everything]
        rule.apply(weights, [grad for _, grad in batch], states, group["lr"], group["weight_decay"])
        if finite is not None and kept is not None:
            for fine, xs, olds in zip(finite, everything, kept, strict=True):
                _undo(fine, xs, olds)
        for p, W in zip(params, weights, strict=True):
            if W is not p:
                p.copy_(W)

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
        for stack in lay_out(rule, number, group, indices):
            self._stacks.append(stack)
            for seat in stack.seats:
                self.state[group["params"][seat.index]].update(stack.views(seat))
        self._phases.clear()

    def _welcome(self, also: Container[Tensor] = ()) -> None:
        """Adopt frozen parameters that have thawed: they have a gradient, or are among ``also``."""
        ready = [
            (number, i)
            for number, i in self._waiting
            if (p := self.param_groups[number]["params"][i]).grad is not None or p in also
        ]
        for number in sorted({number for number, _ in ready}):
            self._adopt(number, [i for n, i in ready if n == number])
        self._waiting = [pair for pair in self._waiting if pair not in ready]

    def state_dict(self) -> dict[str, Any]:
        """The state, by parameter, as tensors of its own: no view drags a whole stack into the file."""
        self._follow()
        self._settle()
        return checkpoint.detached(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state in. Dtypes stay as they are here: float32 factors of a bfloat16 parameter stay float32.

        Raises:
            ValueError: if it doesn't fit: another number of groups or parameters, other names or rules, missing or
                misshapen state, options out of range. Nothing has changed then.
        """
        self._follow()
        self._settle()
        checkpoint.load(self, state_dict, check_options)

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
        self._stacks, self._waiting, self._phases = [], [], {}
        self._skipped = torch.zeros((), dtype=torch.int64)
        for number, group in enumerate(self.param_groups):
            self._waiting += [(number, i) for i in range(len(group["params"]))]
        self._homes = [(p, p.device) for group in self.param_groups for p in group["params"]]
        self._welcome(also=set(saved))
        for p, named in saved.items():
            for name, x in named.items():
                self.state[p][name].copy_(x)


def option_defaults(rule: str) -> dict[str, Any]:
    """Every option of a group under ``rule``, the engine's and the rule's, with its default.

    Raises:
        ValueError: for a rule that does not exist; it names the nearest.

    >>> option_defaults("adamw")["betas"]
    (0.9, 0.999)
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: no such rule{nearest(rule, RULES)}")
    engine = OPTIONS | (STACK_OPTIONS if issubclass(RULES[rule], Rule) else {})
    return {"rule": rule} | engine | RULES[rule].defaults()


def check_options(group: Mapping[str, Any]) -> None:
    """Raise the ValueError that names the first option of a group that is out of range."""
    lr, wd = group["lr"], group["weight_decay"]
    if lr is None:
        raise ValueError("lr=None: a group needs a learning rate, of its own or from the optimizer")
    check(isinstance(lr, Tensor) or lr >= 0, "lr", lr, "a number >= 0")
    check(not isinstance(lr, Tensor) or lr.numel() == 1, "lr", lr, "a number, or a tensor of one element")
    check(wd >= 0, "weight_decay", wd, "a number >= 0")
    check_choice("nonfinite", group["nonfinite"], ("skip", "raise"))
    if "weight_decay_method" in group:
        check_choice("weight_decay_method", group["weight_decay_method"], DECAY_METHODS)
    RULES[group["rule"]].from_group(group)


def safe_norm(dtype: torch.dtype) -> float:
    """The largest gradient norm whose square, whitened by the smallest floor (1e-8), is finite: 1.8e15 in float32."""
    return float(torch.finfo(dtype).max ** 0.5 * 1e-4)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)``, or nothing if nothing is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _update(
    rule: Rule, stack: Stack, run: Run, G: Tensor, penalty: Tensor | None, finite: Tensor | None
) -> Tensor | None:
    """Advance the clocks of one run, and have the rule update it; where ``finite`` is False nothing happens."""
    s = run.slots
    t, state = stack.t[s], {name: x[s] for name, x in stack.state.items()}
    changes = [t, *state.values()]
    kept = None if finite is None else [x.clone() for x in changes]
    t += 1
    stack.clock[s] += 1
    step = Step(t, run.stage, run.refresh, None if penalty is None else penalty[s])
    D = rule.update(G[s], state, step)
    if finite is not None and kept is not None:
        _undo(finite[s], changes, kept)
    return D


def _at_hand(x: Tensor) -> bool:
    """Whether the host can read ``x`` without waiting for a device."""
    return x.device.type == "cpu"


def _undo(finite: Tensor, tensors: Iterable[Tensor], kept: Iterable[Tensor]) -> None:
    """Put back what was kept wherever ``finite`` (leading dimensions of the tensors) is False; no waiting."""
    for x, old in zip(tensors, kept, strict=True):
        x.copy_(torch.where(finite.view(finite.shape[:1] + (1,) * (x.dim() - 1)) if finite.dim() else finite, x, old))


def _dense(p: Tensor) -> Tensor | None:
    """The gradient of ``p``, or None; anything but a dense real tensor is refused."""
    if p.grad is not None and p.grad.is_sparse:
        raise RuntimeError(f"the gradient of a parameter of shape {list(p.shape)} is sparse: only dense ones are taken")
    return p.grad


def _has_penalty(group: Mapping[str, Any]) -> bool:
    return bool(group["weight_decay_method"] == "l2" and group["weight_decay"] != 0)


def _admit(group: Mapping[str, Any]) -> Rule | Elementwise:
    """A group's rule; raise for options and gradients that it doesn't take, NaN only where the group says so."""
    grads = [_dense(p) for p in group["params"]]
    rule = RULES[group["rule"]].from_group(group)
    if group["nonfinite"] != "raise":
        return rule
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    for name, p, grad in zip(names, group["params"], grads, strict=True):
        if grad is not None and not torch.linalg.vector_norm(grad.to(state_dtype(p))) < safe_norm(state_dtype(p)):
            raise FloatingPointError(
                f"the gradient of {name} (shape {list(p.shape)}) is not finite or too large to square; "
                'nonfinite="skip" would leave the parameter out of this step'
            )
    return rule
