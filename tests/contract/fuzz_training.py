"""An optimizer beside a reference in which each parameter is alone, in an optimizer of its own.

Whatever happens to the optimizer, the plainest counterpart happens to the reference: a new optimizer is made of the
present weights and options, and the values that the state shall have are copied into it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import fed
import pytest
import torch
from fuzz_options import DTYPES, SHAPES, VIEWS, Options, Shape, draw, exact, group_options
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

from steepest.engine.group import option_defaults
from steepest.rules import RULES

Entries = dict[str, Tensor]

CONTEXT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}
WHICH = st.integers(0, 5)
"""Chooses among the parameters, groups, entries or values that there are."""
SOME = st.sets(WHICH, max_size=3)


@dataclass
class Twin:
    """A parameter of the optimizer, and the same one alone."""

    name: str
    p: nn.Parameter
    foreign: dict[str, Any] = field(default_factory=dict)
    """What others have put beside its state."""

    def start(self, options: Options, entries: Mapping[str, Tensor] | None = None) -> None:
        """Begin with the weights that the parameter has now, and with fresh state unless some is given."""
        self.q = nn.Parameter(self.p.detach().clone())
        self.have(options, entries or {})

    def have(self, options: Options, entries: Mapping[str, Tensor]) -> None:
        """Go on with these options and this state; entries that are missing are fresh."""
        self.alone = fed.Fed([{"params": [(self.name, self.q)], **options}])
        for name, x in entries.items():
            self.entries[name].copy_(x)

    @property
    def entries(self) -> Entries:
        """The state of the reference; an optimizer that is made later doesn't change it."""
        return dict(self.alone.state[self.q])

    def without(self, name: str) -> Entries:
        """The state of the reference without one entry."""
        return {key: x for key, x in self.entries.items() if key != name}

    def give(self, grad: Tensor | None) -> None:
        """Give both the same gradient; but none to the reference if it is not finite and there is one matrix only."""
        self.p.grad, self.q.grad = grad, None if grad is None else grad.clone()
        matrices = sum(x.numel() for name, x in self.entries.items() if name.startswith("step"))
        if grad is not None and matrices <= 1 and not grad.isfinite().all():
            self.q.grad = None

    def change_in_place(self, weights: Tensor) -> None:
        """Give the parameter other weights, also of another shape or dtype."""
        self.p.grad = None
        self.p.data = weights


@dataclass
class Group:
    """A parameter group: its options, and its parameters in order."""

    options: Options
    twins: list[Twin]

    def form(self) -> Options:
        """The options that lay state out."""
        views = {name for view in VIEWS for name in view}
        names = {"rule", *RULES[self.options["rule"]].layout_options(), *views}
        return {name: value for name, value in self.options.items() if name in names}

    def for_torch(self, named: bool) -> Options:
        """The group as an optimizer is given it."""
        return {"params": [(t.name, t.p) if named else t.p for t in self.twins], **self.options}


class Training(RuleBasedStateMachine):
    """An optimizer, the reference, and what they are compared by."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[Group] = []
        self.foreign: dict[str, Any] = {}
        """What others have put into the state under keys that are no parameters."""
        self.saved: tuple[Any, ...] | None = None
        """A state_dict, and what the reference had then."""
        self.count = 0
        """Seeds weights and gradients."""
        self.events = 0

    @initialize(
        kinds=st.lists(
            st.tuples(group_options(), st.lists(SHAPES, min_size=1, max_size=3), st.booleans()), min_size=1, max_size=2
        ),
        dtype=st.sampled_from(DTYPES),
        named=st.booleans(),
        names_move=st.booleans(),
        stride=st.integers(1, 3),
    )
    def build(
        self,
        kinds: list[tuple[Options, list[Shape], bool]],
        dtype: torch.dtype,
        named: bool,
        names_move: bool,
        stride: int,
    ) -> None:
        """Make one or two groups, each of which may be there twice, with another learning rate."""
        self.named, self.names_move, self.stride = named, names_move, stride
        for options, shapes, twice in kinds:
            self.groups.append(self.group(options, shapes, dtype))
            if twice:
                self.groups.append(self.group(options | {"lr": 0.02}, shapes, dtype))
        self.opt = fed.Fed([group.for_torch(named) for group in self.groups])

    def group(self, options: Options, shapes: list[Shape], dtype: torch.dtype) -> Group:
        """A group of new parameters."""
        alone = {"kl_clip": 0.0} if options["rule"] in fed.CAPTURING else {}  # which would make a step depend on others
        options = option_defaults(options["rule"]) | alone | options
        return Group(options, [self.twin(shape, options, dtype) for shape in shapes])

    def twin(self, shape: Shape, options: Options, dtype: torch.dtype) -> Twin:
        """A new parameter."""
        weights = self.weights(shape, options, dtype)
        twin = Twin(f"p{self.count}", nn.Parameter(weights))
        twin.start(options)
        return twin

    def weights(self, shape: Shape, options: Options, dtype: torch.dtype) -> Tensor:
        """New weights, in the dtype if that keeps the bits, and in float64 otherwise."""
        self.count += 1
        return draw(shape, "weights", self.count, dtype=dtype if exact(shape, options) else torch.float64)

    # What there is.

    @property
    def twins(self) -> list[tuple[Twin, Group]]:
        """All parameters in order, each with its group."""
        return [(twin, group) for group in self.groups for twin in group.twins]

    def pick(self, which: int) -> tuple[Twin, Group]:
        """Pick a parameter."""
        return self.twins[which % len(self.twins)]

    def pick_group(self, which: int) -> tuple[Group, dict[str, Any]]:
        """Pick a group, and return it as the optimizer has it, too."""
        n = which % len(self.groups)
        return self.groups[n], self.opt.param_groups[n]

    def theirs(self, group: Group) -> dict[str, Any]:
        """A group as the optimizer has it."""
        return next(g for mine, g in zip(self.groups, self.opt.param_groups, strict=True) if mine is group)

    def entries(self, twin: Twin) -> dict[str, Any]:
        """What stands in the optimizer's state for a parameter, whether the optimizer has seen it or not."""
        return self.opt.state.setdefault(twin.p, {})

    def alike(self, twin: Twin, group: Group) -> list[Twin]:
        """The other parameters whose state is laid out in the same way."""
        kind = twin.p.shape, twin.p.dtype, group.form()
        return [t for t, g in self.twins if t is not twin and (t.p.shape, t.p.dtype, g.form()) == kind]

    # Steps.

    @invariant()
    def step_after_events(self) -> None:
        self.events += 1
        if self.events % self.stride == 0:
            self.step(set(), set())
            if self.saved is None:
                self.save()

    @rule(missing=SOME, poisoned=SOME)
    def step(self, missing: set[int], poisoned: set[int]) -> None:
        if self.give_gradients(missing, poisoned):
            with pytest.raises(FloatingPointError):
                self.opt.step()
        else:
            self.opt.step()
            self.step_alone()
        self.check()

    @rule(name=st.sampled_from(sorted(CONTEXT)), saves=st.booleans())
    def step_in_a_context(self, name: str, saves: bool) -> None:
        self.give_gradients(set(), set())
        with CONTEXT[name]():
            if saves:
                self.opt.state_dict()
            self.opt.step()
        self.step_alone()
        self.check()

    @rule()
    def step_under_another_default_dtype(self) -> None:
        self.give_gradients(set(), set())
        torch.set_default_dtype(torch.float64)
        try:
            self.opt.step()
        finally:
            torch.set_default_dtype(torch.float32)
        self.step_alone()
        self.check()

    def give_gradients(self, missing: set[int], poisoned: set[int]) -> bool:
        """Return whether a gradient is to be refused."""
        self.count += 1
        refused = False
        for i, (twin, group) in enumerate(self.twins):
            grad = draw(twin.p.shape, "gradient", self.count, i, dtype=twin.p.dtype)
            if i in poisoned and grad.numel():
                grad.view(-1)[-1] = torch.nan if i % 2 else torch.inf  # in the last of its matrices
                refused |= twin.p.requires_grad and i not in missing and group.options["nonfinite"] == "raise"
            twin.give(grad if twin.p.requires_grad and i not in missing else None)
        return refused

    def step_alone(self) -> None:
        """Step the reference."""
        for twin, _ in self.twins:
            twin.alone.step()

    def save(self) -> None:
        """Keep a state_dict, and what the reference has."""
        saved = self.opt.state_dict()
        there = [saved["state"].get(i, {}).keys() > t.foreign.keys() for i, (t, _) in enumerate(self.twins)]
        states = [(t.entries if it else None, t.foreign) for (t, _), it in zip(self.twins, there, strict=True)]
        options = [{name: x for name, x in group.options.items() if not callable(x)} for group in self.groups]
        self.saved = copy.deepcopy((saved, states, options, self.foreign))

    # What must hold.

    def check(self) -> None:
        """Compare everything after a step."""
        for twin, group in self.twins:
            assert same(twin.p.detach(), twin.q.detach(), exact(twin.p.shape, group.options)), f"weights of {twin.name}"
        self.compare([self.opt.state.get(twin.p, {}) for twin, _ in self.twins], self.opt.state)
        assert {key for key in self.opt.state if isinstance(key, Tensor)} <= {twin.p for twin, _ in self.twins}
        for group, theirs in zip(self.groups, self.opt.param_groups, strict=True):
            assert all(same(theirs[name], value) for name, value in group.options.items()), group.options
            assert not self.named or theirs["param_names"] == [twin.name for twin in group.twins]

    def look(self) -> None:
        """Compare what the next step will use, as state_dict shows it."""
        state = self.opt.state_dict()["state"]
        self.compare([state.get(i, {}) for i in range(len(self.twins))], state)

    def compare(self, of_twins: list[dict[str, Any]], state: Mapping[Any, Any]) -> None:
        """Compare the state of all parameters with the reference."""
        for (twin, group), mine in zip(self.twins, of_twins, strict=True):
            foreign = {name: mine[name] for name in twin.foreign}
            assert all(same(value, twin.foreign[name]) for name, value in foreign.items()), f"beside {twin.name}"
            if mine.keys() == foreign.keys():  # it is frozen, or has had no gradient since
                assert not any(x.any() for name, x in twin.entries.items() if is_count(name)), twin.name
                continue
            assert mine.keys() == foreign.keys() | twin.entries.keys(), twin.name
            for name, x in twin.entries.items():
                to_the_bit = exact(twin.p.shape, group.options) or is_count(name)
                assert same(mine[name], x, to_the_bit), f"{name} of {twin.name}"
        assert {key: value for key, value in state.items() if isinstance(key, str)} == self.foreign

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Whatever is written in the block is refused, whoever takes it in, and nothing has moved then."""
        yield
        self.give_gradients(set(), set())
        before = self.everything()
        values = copy.deepcopy([x.detach() if isinstance(x, Tensor) else x for x in before])
        for act in (self.opt.step, self.opt.state_dict, lambda: copy.deepcopy(self.opt)):
            with pytest.raises(ValueError, match=r"\w"):
                act()
        assert all(same(x, y) for x, y in zip(self.everything(), values, strict=True))

    def everything(self) -> list[Any]:
        """All weights, entries and options."""
        state = [x for entries in self.opt.state.values() for x in entries.values()]
        options = [x for group in self.opt.param_groups for name, x in group.items() if name != "params"]
        return [*(twin.p for twin, _ in self.twins), *state, *options]


def is_count(name: str) -> bool:
    """Whether an entry counts updates."""
    return name.split(".")[0] in ("step", "clock")


def same(mine: Any, theirs: Any, to_the_bit: bool = True) -> bool:
    """Whether two tensors, or other things, are equal: to the last bit, or nearly."""
    if not isinstance(theirs, Tensor):
        return bool(mine == theirs) or mine != mine
    if not isinstance(mine, Tensor) or mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    if to_the_bit or not mine.is_floating_point():
        return torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    return torch.allclose(mine, theirs, rtol=1e-6, atol=1e-7, equal_nan=True)
