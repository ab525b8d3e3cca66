"""Any sequence of events leaves each parameter where it would be alone, in an optimizer of its own.

Steps, gradients that are missing or NaN, and whatever torch.optim's users write to ``param_groups`` and ``state``: the
engine's stacks, slots, clocks and copies must not show. `alone` has the reference. FUZZ=10000 in the environment runs
that many sequences; ``--hypothesis-seed`` chooses others.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from alone import (
    ALIGNED,
    BAD,
    COUNTS,
    DTYPES,
    LAYOUTS,
    MISALIGNED,
    Group,
    Options,
    Twin,
    changes,
    draw,
    exact,
    flat,
    group_options,
    same,
    valid,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from steepest.engine.group import option_defaults
from steepest.engine.optimizer import Optimizer
from steepest.rules import RULES

CONTEXTS = False
"""Whether steps are also taken under contexts that change what torch makes: autocast, other default dtypes and devices."""
RUNS = int(os.environ.get("FUZZ", "60"))

WHICH = st.integers(0, 5)
"""Chooses among the parameters, groups or entries that there are."""
SOME = st.sets(WHICH, max_size=3)
SHAPE = st.sampled_from(ALIGNED + MISALIGNED)
CONTEXT: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Training(RuleBasedStateMachine):
    """An optimizer beside the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[Group] = []
        self.foreign: dict[str, Any] = {}
        """What others have put into the state under keys that are no parameters."""
        self.saved: tuple[Any, ...] | None = None
        self.count = 0
        self.events = 0

    @initialize(
        kinds=st.lists(
            st.tuples(group_options(), st.lists(SHAPE, min_size=1, max_size=3), st.booleans()), min_size=1, max_size=2
        ),
        dtype=st.sampled_from(DTYPES),
        named=st.booleans(),
        names_move=st.booleans(),
        stride=st.integers(1, 3),
    )
    def build(
        self,
        kinds: list[tuple[Options, list[Any], bool]],
        dtype: torch.dtype,
        named: bool,
        names_move: bool,
        stride: int,
    ) -> None:
        self.named, self.names_move, self.stride = named, names_move, stride
        for options, shapes, twice in kinds:
            self.groups.append(self.group(options, shapes, dtype))
            if twice:
                self.groups.append(self.group(options | {"lr": 0.02}, shapes, dtype))
        self.opt = Optimizer([group.for_torch(named) for group in self.groups])

    def group(self, options: Options, shapes: list[Any], dtype: torch.dtype) -> Group:
        options = option_defaults(options["rule"]) | options
        twins = [self.twin(shape, options, dtype) for shape in shapes]
        for twin in twins:
            twin.start(options)
        return Group(options, twins)

    def twin(self, shape: Any, options: Options, dtype: torch.dtype) -> Twin:
        weights = self.weights(shape, options, dtype)
        return Twin(f"p{self.count}", nn.Parameter(weights))

    def weights(self, shape: Any, options: Options, dtype: torch.dtype) -> Tensor:
        """New weights, in the dtype if that keeps the bits, and in float64 otherwise."""
        self.count += 1
        return draw(shape, "weights", self.count, dtype=dtype if exact(shape, options) else torch.float64)

    # What there is.

    @property
    def twins(self) -> list[tuple[Twin, Group]]:
        return list(flat(self.groups))

    def pick(self, which: int) -> tuple[Twin, Group]:
        return self.twins[which % len(self.twins)]

    def pick_group(self, which: int) -> tuple[Group, dict[str, Any]]:
        n = which % len(self.groups)
        return self.groups[n], self.opt.param_groups[n]

    def entries(self, twin: Twin) -> dict[str, Any]:
        """What stands in the optimizer's state for a parameter now."""
        return self.opt.state.setdefault(twin.p, {})

    def others(self, twin: Twin, group: Group) -> list[Twin]:
        """The parameters whose state is laid out in the same way."""
        kind = twin.p.shape, twin.p.dtype, group.form()
        return [t for t, g in self.twins if t is not twin and (t.p.shape, t.p.dtype, g.form()) == kind]

    # Steps.

    @invariant()
    def step_after_events(self) -> None:
        self.events += 1
        if self.events % self.stride == 0:
            self.step(set(), set(), self.events % 2 == 0)

    @rule(missing=SOME, poisoned=SOME, looks=st.booleans())
    def step(self, missing: set[int], poisoned: set[int], looks: bool) -> None:
        refused = self.give_gradients(missing, poisoned)
        if refused:
            with pytest.raises(FloatingPointError):
                self.opt.step()
        else:
            self.opt.step()
            self.step_alone()
        self.check(looks)

    @precondition(lambda self: CONTEXTS)
    @rule(name=st.sampled_from(sorted(CONTEXT)))
    def step_in_a_context(self, name: str) -> None:
        self.give_gradients(set(), set())
        with CONTEXT[name]():
            self.opt.step()
        self.step_alone()
        self.check(looks=True)

    @precondition(lambda self: CONTEXTS)
    @rule()
    def step_under_another_default_dtype(self) -> None:
        self.give_gradients(set(), set())
        torch.set_default_dtype(torch.float64)
        try:
            self.opt.step()
        finally:
            torch.set_default_dtype(torch.float32)
        self.step_alone()
        self.check(looks=True)

    def step_alone(self) -> None:
        for twin, _ in self.twins:
            twin.alone.step()

    def give_gradients(self, missing: set[int], poisoned: set[int]) -> bool:
        """Return whether a gradient is to be refused."""
        self.count += 1
        refused = False
        for i, (twin, group) in enumerate(self.twins):
            grad = draw(twin.p.shape, "gradient", self.count, i, dtype=twin.p.dtype)
            if i in poisoned and grad.numel():
                grad.view(-1)[-1] = torch.nan  # in the last of its matrices
            takes_part = twin.p.requires_grad and i not in missing
            twin.give(grad if takes_part else None)
            refused |= takes_part and i in poisoned and group.options["nonfinite"] == "raise"
        return refused

    @rule()
    def look(self) -> None:
        """Whoever looks at the state before the next step sees what the step will use."""
        saved = self.opt.state_dict()
        self.check_entries(
            {twin.name: saved["state"].get(i, {}) for i, (twin, _) in enumerate(self.twins)}, saved["state"]
        )

    def check(self, looks: bool) -> None:
        for twin, group in self.twins:
            assert same(twin.p.detach(), twin.q.detach(), exact(twin.p.shape, group.options)), f"weights of {twin.name}"
        self.check_entries({twin.name: self.opt.state.get(twin.p, {}) for twin, _ in self.twins}, self.opt.state)
        params = {twin.p for twin, _ in self.twins}
        assert {key for key in self.opt.state if isinstance(key, Tensor)} <= params
        for group, theirs in zip(self.groups, self.opt.param_groups, strict=True):
            for name, value in group.options.items():
                assert same(theirs[name], value, True), name
            assert not self.named or theirs["param_names"] == [twin.name for twin in group.twins]
        if looks:
            self.look()

    def check_entries(self, state: dict[str, dict[str, Any]], whole: dict[Any, Any]) -> None:
        for twin, group in self.twins:
            mine, theirs, to_the_bit = dict(state[twin.name]), twin.entries, exact(twin.p.shape, group.options)
            for name, value in twin.foreign.items():
                assert same(mine.pop(name), value, True), f"{name} of {twin.name}"
            if not mine:  # as long as it has had no gradient
                assert not any(x.any() for name, x in theirs.items() if name in COUNTS), twin.name
            else:
                assert mine.keys() == theirs.keys(), twin.name
                for name, x in theirs.items():
                    assert same(mine[name], x, to_the_bit or name.split(".")[0] in COUNTS), f"{name} of {twin.name}"
        assert {key: value for key, value in whole.items() if isinstance(key, str)} == self.foreign

    # Entries of the state.

    @rule(
        which=WHICH,
        entry=WHICH,
        how=st.sampled_from(["clone", "half", "double", "bfloat16", "number", "transposed", "grad", "borrowed"]),
    )
    def rebind_an_entry(self, which: int, entry: int, how: str) -> None:
        twin, group = self.pick(which)
        if not twin.entries:
            return
        name = sorted(twin.entries)[entry % len(twin.entries)]
        x = twin.entries[name]
        floats, counts = x.is_floating_point(), name.split(".")[0] in COUNTS
        y: Any = x.clone()
        if how == "half":
            y = x + 2 if counts else x / 2 if floats else x // 2
        elif how in ("double", "bfloat16") and floats:
            y = x.double() if how == "double" else x.bfloat16()
        elif how == "number" and x.numel() == 1 and (floats or counts):
            y = x.item()
        elif how == "transposed" and x.dim() > 1:
            y = y.mT.contiguous().mT
        elif how == "grad" and floats:
            y = y.requires_grad_()
        elif how == "borrowed" and (others := self.others(twin, group)):
            z = self.entries(others[0]).get(name)
            y = z if isinstance(z, Tensor) else y
        self.entries(twin)[name] = y
        value = y.detach().to(x.dtype) if isinstance(y, Tensor) else torch.full_like(x, y)
        twin.have(group.options, twin.entries | {name: value})

    @rule(which=WHICH, entry=WHICH)
    def write_to_an_entry(self, which: int, entry: int) -> None:
        self.look()
        twin, group = self.pick(which)
        mine = self.entries(twin)
        names = [name for name, x in sorted(twin.entries.items()) if x.is_floating_point() and name in mine]
        if names:
            name = names[entry % len(names)]
            mine[name].mul_(2)
            twin.entries[name].mul_(2)

    @rule(which=WHICH, entry=WHICH)
    def delete_an_entry(self, which: int, entry: int) -> None:
        twin, group = self.pick(which)
        if twin.entries:
            name = sorted(twin.entries)[entry % len(twin.entries)]
            self.entries(twin).pop(name, None)
            twin.have(group.options, twin.without(name))

    @rule(which=WHICH, how=st.sampled_from(["clear", "delete", "replace"]))
    def clear_a_state(self, which: int, how: str) -> None:
        twin, group = self.pick(which)
        if how == "clear":
            self.entries(twin).clear()
        elif how == "delete":
            self.opt.state.pop(twin.p, None)
        else:
            self.opt.state[twin.p] = {}
        twin.foreign = {}
        twin.have(group.options, {})

    @rule(how=st.sampled_from(["clear", "dict", "defaultdict"]))
    def clear_all_state(self, how: str) -> None:
        if how == "clear":
            self.opt.state.clear()
        else:
            self.opt.state = {} if how == "dict" else defaultdict(dict)
        for twin, group in self.twins:
            twin.foreign = {}
            twin.have(group.options, {})
        self.foreign = {}

    @rule(which=WHICH, reverses=st.booleans())
    def rebind_a_state(self, which: int, reverses: bool) -> None:
        twin, _ = self.pick(which)
        entries = list(self.entries(twin).items())
        self.opt.state[twin.p] = dict(entries[::-1] if reverses else entries)

    @rule(which=WHICH, other=WHICH)
    def swap_states(self, which: int, other: int) -> None:
        a, group = self.pick(which)
        others = self.others(a, group)
        if not others:
            return
        b = others[other % len(others)]
        if not a.p.requires_grad or not b.p.requires_grad:
            return
        self.opt.state[a.p], self.opt.state[b.p] = self.entries(b), self.entries(a)
        a.foreign, b.foreign = b.foreign, a.foreign
        of_a, of_b = a.entries, b.entries
        group_of_b = next(g for t, g in self.twins if t is b)
        a.have(group.options, of_b)
        b.have(group_of_b.options, of_a)

    @rule(which=WHICH, what=st.sampled_from(["text", "counter", "tensor", "key", "none"]))
    def put_something_else(self, which: int, what: str) -> None:
        twin, _ = self.pick(which)
        if what == "key":
            self.opt.state["rounds"] = self.foreign["rounds"] = {"done": self.count}
        elif what == "none":
            for name in twin.foreign:
                del self.entries(twin)[name]
            twin.foreign = {}
        else:
            value = {"text": "slow", "counter": self.count, "tensor": torch.full((3,), float(self.count))}[what]
            self.entries(twin)[what] = twin.foreign[what] = value

    @rule(which=WHICH, entry=WHICH, how=st.sampled_from(["shape", "text", "count", "int"]))
    def put_what_does_not_fit(self, which: int, entry: int, how: str) -> None:
        twin, _ = self.pick(which)
        mine = self.entries(twin)
        names = [n for n, x in twin.entries.items() if n in mine and x.numel() > 1 and x.is_floating_point()]
        counts = [n for n in twin.entries if n in mine and n.split(".")[0] in COUNTS]
        names = counts if how == "count" else [n for n in names if n not in counts]
        if not names:
            return
        name = names[entry % len(names)]
        x = twin.entries[name]
        value = {
            "shape": torch.zeros(*x.shape, 2),
            "text": "zero",
            "count": torch.full_like(x, -1),
            "int": torch.zeros(x.shape, dtype=torch.int32),
        }[how]
        old = mine[name]
        with self.refused():
            mine[name] = value
        mine[name] = old

    # Options.

    @rule(which=WHICH, option=st.integers(0, 40), value=WHICH)
    def change_an_option(self, which: int, option: int, value: int) -> None:
        group, theirs = self.pick_group(which)
        known = sorted(changes(group.options["rule"], self.named).items())
        name, values = known[option % len(known)]
        new = {name: values[value % len(values)]}
        if not valid(group.options | new):
            return
        theirs[name] = group.options[name] = new[name]
        for twin in group.twins:
            twin.have(group.options, twin.entries)

    @rule(which=WHICH, option=WHICH, value=WHICH)
    def change_an_option_of_the_layout(self, which: int, option: int, value: int) -> None:
        """It is refused where it would lay the state of some parameter out in another way."""
        group, theirs = self.pick_group(which)
        names = [name for name in RULES[group.options["rule"]].layout_options() if name != "basis_dtype"]
        if not names:
            return
        name = names[option % len(names)]
        values = [
            v for v in [*LAYOUTS[name], RULES[group.options["rule"]].defaults()[name]] if v != group.options[name]
        ]
        new = values[value % len(values)]
        if all(self.lays_out_alike(twin, group.options, {name: new}) for twin in group.twins):
            return
        self.look()
        with self.refused():
            theirs[name] = new
        theirs[name] = group.options[name]

    def lays_out_alike(self, twin: Twin, options: Options, new: Options) -> bool:
        if not self.opt.state.get(twin.p):
            return True
        other = Optimizer([nn.Parameter(twin.q.detach().clone())], **options | new)
        (entries,) = other.state.values()
        return {k: (x.shape, x.dtype) for k, x in entries.items()} == {
            k: (x.shape, x.dtype) for k, x in twin.entries.items()
        }

    @rule(which=WHICH, option=st.integers(0, 20), value=WHICH)
    def set_an_option_out_of_range(self, which: int, option: int, value: int) -> None:
        group, theirs = self.pick_group(which)
        names = [name for name in BAD if name in group.options]
        name = names[option % len(names)]
        with self.refused():
            theirs[name] = BAD[name][value % len(BAD[name])]
        theirs[name] = group.options[name]

    # Parameters and groups.

    def lists(self, group: dict[str, Any]) -> list[list[Any]]:
        """The lists of a group that have a place for each parameter, as far as they are moved along."""
        return [group[key] for key in (("params", "param_names") if self.named and self.names_move else ("params",))]

    def before_moves(self) -> None:
        """Where names stay behind they are known by the places that the parameters had, so one look is one move."""
        self.saved = None
        if self.named and not self.names_move:
            self.look()

    @rule(which=WHICH, a=WHICH, b=WHICH)
    def reorder_a_group(self, which: int, a: int, b: int) -> None:
        group, theirs = self.pick_group(which)
        if group.twins:
            self.before_moves()
            a, b = a % len(group.twins), b % len(group.twins)
            for xs in [group.twins, *self.lists(theirs)]:
                xs.insert(b, xs.pop(a))

    @rule(which=WHICH, there=WHICH, at=WHICH)
    def move_to_another_group(self, which: int, there: int, at: int) -> None:
        twin, group = self.pick(which)
        fitting = [n for n, g in enumerate(self.groups) if g.form() == group.form()]
        n, m = self.groups.index(group), fitting[there % len(fitting)]
        if m == n:
            return
        self.before_moves()
        source, target = self.opt.param_groups[n], self.opt.param_groups[m]
        i, j = group.twins.index(twin), at % (len(self.groups[m].twins) + 1)
        for xs, ys in zip([group.twins, *self.lists(source)], [self.groups[m].twins, *self.lists(target)], strict=True):
            ys.insert(j, xs.pop(i))
        twin.have(self.groups[m].options, twin.entries)

    @rule(a=WHICH, b=WHICH)
    def swap_groups(self, a: int, b: int) -> None:
        self.saved = None
        a, b = a % len(self.groups), b % len(self.groups)
        for groups in (self.groups, self.opt.param_groups):
            groups[a], groups[b] = groups[b], groups[a]

    @rule(which=WHICH, shape=SHAPE, same_shape=st.booleans(), state=st.sampled_from(["stays", "deleted", "moves"]))
    def replace_a_parameter(self, which: int, shape: Any, same_shape: bool, state: str) -> None:
        twin, group = self.pick(which)
        self.before_moves()
        self.look()
        theirs = self.opt.param_groups[self.groups.index(group)]
        old, dtype = twin.p, twin.p.dtype
        has_state = self.entries(twin).keys() > twin.foreign.keys()
        shape = tuple(old.shape) if same_shape else shape
        twin.p = nn.Parameter(self.weights(shape, group.options, dtype))
        theirs["params"][group.twins.index(twin)] = twin.p
        entries = twin.entries if state == "moves" and shape == tuple(old.shape) and has_state else {}
        if state == "moves":
            self.opt.state[twin.p] = self.opt.state.pop(old, {})
        else:
            if state == "deleted" or twin.foreign:
                self.opt.state.pop(old, None)
            twin.foreign = {}
        twin.start(group.options)
        twin.have(group.options, entries)
        self.look()

    @rule(which=WHICH, shape=SHAPE)
    def give_a_parameter_another_shape(self, which: int, shape: Any) -> None:
        twin, group = self.pick(which)
        if shape != tuple(twin.p.shape):
            self.saved = None
            self.look()
            twin.weights_are(self.weights(shape, group.options, twin.p.dtype))
            twin.have(group.options, {})
            self.look()

    @rule(dtype=st.sampled_from(DTYPES), which=st.one_of(st.just(set(range(20))), SOME))
    def convert(self, dtype: torch.dtype, which: set[int]) -> None:
        self.look()  # state that is converted twice is rounded twice
        for i, (twin, group) in enumerate(self.twins):
            if i in which and exact(twin.p.shape, group.options):
                entries = twin.entries
                twin.weights_are(twin.p.detach().to(dtype))
                twin.have(group.options, entries)

    @rule(options=group_options(), shapes=st.lists(SHAPE, min_size=1, max_size=2), dtype=st.sampled_from(DTYPES))
    @precondition(lambda self: len(self.twins) < 8)
    def add_a_group(self, options: Options, shapes: list[Any], dtype: torch.dtype) -> None:
        self.saved = None
        self.groups.append(self.group(options, shapes, dtype))
        self.opt.add_param_group(self.groups[-1].for_torch(self.named))

    @rule(which=WHICH, shape=SHAPE, at=WHICH, frozen=st.booleans())
    @precondition(lambda self: len(self.twins) < 8)
    def add_a_parameter(self, which: int, shape: Any, at: int, frozen: bool) -> None:
        group, theirs = self.pick_group(which)
        self.before_moves()
        dtype = group.twins[0].p.dtype if group.twins else torch.float32
        twin = self.twin(shape, group.options, dtype)
        twin.start(group.options)
        twin.p.requires_grad_(not frozen)
        at %= len(group.twins) + 1
        group.twins.insert(at, twin)
        theirs["params"].insert(at, twin.p)
        if self.named:
            theirs["param_names"] = [t.name for t in group.twins]

    @rule(which=WHICH)
    @precondition(lambda self: len(self.twins) > 1)
    def remove_a_parameter(self, which: int) -> None:
        twin, group = self.pick(which)
        self.before_moves()
        self.look()
        theirs = self.opt.param_groups[self.groups.index(group)]
        i = group.twins.index(twin)
        del group.twins[i], theirs["params"][i]
        if self.named:
            del theirs["param_names"][i]
        if twin.foreign:
            del self.opt.state[twin.p]

    @rule(which=WHICH)
    def freeze_or_thaw(self, which: int) -> None:
        twin, _ = self.pick(which)
        self.saved = None
        twin.p.requires_grad_(not twin.p.requires_grad)

    # Copies.

    @rule(turns=st.booleans())
    def save_and_load_elsewhere(self, turns: bool) -> None:
        """With the parameters in another order, if they have names."""
        if self.named and not all(group.twins for group in self.groups):
            return  # torch asks for names
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        for group in self.groups:
            if turns and self.named:
                group.twins.reverse()
                self.saved = None
            for twin in group.twins:
                twin.p = nn.Parameter(twin.p.detach().clone(), requires_grad=twin.p.requires_grad)
        self.opt = Optimizer([group.for_torch(self.named) for group in self.groups])
        self.opt.load_state_dict(torch.load(file, weights_only=True))

    @rule()
    def save(self) -> None:
        saved = self.opt.state_dict()
        entries = {
            t.name: (t.entries if saved["state"].get(i, t.foreign).keys() > t.foreign.keys() else None, t.foreign)
            for i, (t, _) in enumerate(self.twins)
        }
        options = [{k: v for k, v in group.options.items() if not callable(v)} for group in self.groups]
        self.saved = copy.deepcopy((saved, entries, options, self.foreign))

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        assert self.saved is not None
        saved, entries, options, self.foreign = copy.deepcopy(self.saved)
        self.opt.load_state_dict(saved)
        for group, of_group in zip(self.groups, options, strict=True):
            group.options |= of_group
            for twin in group.twins:
                of_twin, twin.foreign = entries[twin.name]
                twin.have(group.options, twin.entries if of_twin is None else of_twin)

    @rule(pickles=st.booleans())
    def copy(self, pickles: bool) -> None:
        params = [twin.p for twin, _ in self.twins]
        both = self.opt, params
        self.opt, params = pickle.loads(pickle.dumps(both)) if pickles else copy.deepcopy(both)
        for (twin, _), p in zip(self.twins, params, strict=True):
            twin.p = p

    # Refusals.

    @contextmanager
    def nothing_moves(self) -> Iterator[None]:
        def now() -> list[Any]:
            found: list[Any] = []
            for twin, _ in self.twins:
                found += [twin.p, *self.opt.state.get(twin.p, {}).values()]
            return found

        before = now()
        values = copy.deepcopy([x.detach() if isinstance(x, Tensor) else x for x in before])
        yield
        assert all(same(x, y, True) for x, y in zip(now(), values, strict=True))

    @contextmanager
    def refused(self) -> Iterator[None]:
        """What is written in the block is refused, whoever takes it in."""
        yield
        self.give_gradients(set(), set())
        with self.nothing_moves():
            for act in (self.opt.step, self.opt.state_dict, lambda: copy.deepcopy(self.opt)):
                with pytest.raises(ValueError, match=r"\w"):
                    act()


SETTINGS = settings(
    max_examples=RUNS,
    stateful_step_count=12,
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestAnySequence = Training.TestCase
TestAnySequence.settings = SETTINGS
