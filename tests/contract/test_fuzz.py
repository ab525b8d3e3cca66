"""Any sequence of events leaves each parameter where it would be alone, in an optimizer of its own.

Steps, gradients that are missing or not finite, and whatever torch.optim's users write to ``param_groups`` and
``state``: the engine's stacks, slots, clocks and copies must not show. `fuzz_training` has the reference.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections import defaultdict
from typing import Any

import fed
import pytest
import torch
from fuzz_options import BAD, DTYPES, LAYOUTS, SHAPES, Options, Shape, changes, exact, group_options, valid
from fuzz_training import SOME, WHICH, Training, Twin, is_count
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

from steepest.rule import Elementwise
from steepest.rules import RULES

ALL = st.just(set(range(8)))
FEW = precondition(lambda self: len(self.twins) < 8)


class AnySequence(Training):
    """What happens to an optimizer, and to the reference."""

    @rule()
    def look_at_the_state(self) -> None:
        self.look()

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
        if not self.entries(twin).keys() - twin.foreign.keys():
            self.saved = None  # a frozen parameter gets state, of which the file has none
        name = sorted(twin.entries)[entry % len(twin.entries)]
        x = twin.entries[name]
        y: Any = x.clone()
        if how == "half":
            y = x + 2 if is_count(name) else x / 2 if x.is_floating_point() else x // 2
        elif how in ("double", "bfloat16") and x.is_floating_point():
            y = x.double() if how == "double" else x.bfloat16()
        elif how == "number" and x.numel() == 1 and (x.is_floating_point() or is_count(name)):
            y = x.item()
        elif how == "transposed" and x.dim() > 1:
            y = y.mT.contiguous().mT
        elif how == "grad" and x.is_floating_point():
            y = y.requires_grad_()
        elif how == "borrowed" and (others := self.alike(twin, group)):
            z = self.entries(others[0]).get(name)
            y = z if isinstance(z, Tensor) else y
        self.entries(twin)[name] = y
        value = y.detach().to(x.dtype) if isinstance(y, Tensor) else torch.full_like(x, y)
        twin.have(group.options, twin.entries | {name: value})

    @rule(which=WHICH, entry=WHICH)
    def write_to_an_entry(self, which: int, entry: int) -> None:
        self.look()
        twin, _ = self.pick(which)
        mine = self.entries(twin)
        names = [name for name, x in sorted(twin.entries.items()) if x.is_floating_point() and name in mine]
        for x in (mine, twin.entries) if names else ():
            x[names[entry % len(names)]].mul_(2)

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
        self.foreign = {}
        for twin, group in self.twins:
            twin.foreign = {}
            twin.have(group.options, {})

    @rule(which=WHICH, reverses=st.booleans())
    def rebind_a_state(self, which: int, reverses: bool) -> None:
        twin, _ = self.pick(which)
        entries = list(self.entries(twin).items())
        self.opt.state[twin.p] = dict(entries[::-1] if reverses else entries)

    @rule(which=WHICH, other=WHICH)
    def swap_states(self, which: int, other: int) -> None:
        a, group = self.pick(which)
        others = [t for t in self.alike(a, group) if t.p.requires_grad and a.p.requires_grad]
        if others:
            b = others[other % len(others)]
            self.opt.state[a.p], self.opt.state[b.p] = self.entries(b), self.entries(a)
            a.foreign, b.foreign = b.foreign, a.foreign
            of_a, of_b = a.entries, b.entries
            a.have(group.options, of_b)
            b.have(next(g for t, g in self.twins if t is b).options, of_a)

    @rule(which=WHICH, what=st.sampled_from(["text", "counter", "tensor", "key", "nothing"]))
    def put_something_else(self, which: int, what: str) -> None:
        twin, _ = self.pick(which)
        if what == "key":
            self.opt.state["rounds"] = self.foreign["rounds"] = {"done": self.count}
        elif what == "nothing":
            for name in twin.foreign:
                del self.entries(twin)[name]
            twin.foreign = {}
        else:
            value = {"text": "slow", "counter": self.count, "tensor": torch.full((3,), float(self.count))}[what]
            self.entries(twin)[what] = twin.foreign[what] = value

    @rule(which=WHICH, entry=WHICH, how=st.sampled_from(["shape", "text", "count", "integers"]))
    def put_what_does_not_fit(self, which: int, entry: int, how: str) -> None:
        twin, _ = self.pick(which)
        mine = self.entries(twin)
        fitting = {name: x for name, x in twin.entries.items() if is_count(name) == (how == "count") and name in mine}
        names = [name for name, x in fitting.items() if how == "count" or (x.numel() > 1 and x.is_floating_point())]
        if names:
            name = names[entry % len(names)]
            x, old = twin.entries[name], mine[name]
            with self.refused():
                mine[name] = {
                    "shape": torch.zeros(*x.shape, 2),
                    "text": "zero",
                    "count": torch.full_like(x, -1),
                    "integers": torch.zeros(x.shape, dtype=torch.int32),
                }[how]
            mine[name] = old

    # Options.

    @rule(which=WHICH, option=st.integers(0, 40), value=WHICH)
    def change_an_option(self, which: int, option: int, value: int) -> None:
        group, theirs = self.pick_group(which)
        known = sorted(changes(group.options["rule"], self.named).items())
        name, values = known[option % len(known)]
        new = values[value % len(values)]
        if name == "lr" and isinstance(theirs["lr"], Tensor):
            new = theirs["lr"].fill_(float(new))
        if valid(group.options | {name: new}):
            theirs[name] = group.options[name] = new
            for twin in group.twins:
                twin.have(group.options, twin.entries)

    @rule(which=WHICH, option=WHICH, value=WHICH)
    def change_the_layout(self, which: int, option: int, value: int) -> None:
        """It is refused where it would lay the state of some parameter out in another way."""
        group, theirs = self.pick_group(which)
        rule, options = RULES[group.options["rule"]], group.options
        choices = {name: [*LAYOUTS[name], rule.defaults()[name]] for name in rule.layout_options()}
        choices["rule"] = ["soap", "muon"]
        choices.pop("basis_dtype", None)  # which may change
        name = sorted(choices)[option % len(choices)]
        values = [value for value in choices[name] if value != options[name]]
        if not values:  # K-FAC's bias has one, where parameters are bare
            return
        new = {name: values[value % len(values)]}
        self.look()
        if not all(name != "rule" and self.lays_out_alike(twin, options, new) for twin in group.twins):
            with self.refused():
                theirs |= new
            theirs[name] = options[name]

    def lays_out_alike(self, twin: Twin, options: Options, new: Options) -> bool:
        """Whether a parameter has no state, or the same with other options."""
        forms = []
        for each in (options, options | new):
            (entries,) = fed.Fed([nn.Parameter(twin.p.detach().clone())], **each).state.values()
            forms.append({name: (x.shape, x.dtype) for name, x in entries.items()})
        return not self.opt.state.get(twin.p, {}).keys() - twin.foreign.keys() or forms[0] == forms[1]

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
        """Look, if names stay behind: one knows then to which parameters they belong."""
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
        target, theirs = self.pick_group(there)
        if target is group:
            return
        self.before_moves()
        i, j = group.twins.index(twin), at % (len(target.twins) + 1)
        pairs = list(zip(self.lists(self.theirs(group)), self.lists(theirs), strict=True))
        if target.form() == group.form():
            for xs, ys in [(group.twins, target.twins), *pairs]:
                ys.insert(j, xs.pop(i))
            twin.have(target.options, twin.entries)
        elif target.options["rule"] != group.options["rule"] and self.entries(twin).keys() > twin.foreign.keys():
            self.look()
            with self.refused():
                for xs, ys in pairs:
                    ys.insert(j, xs.pop(i))
            for xs, ys in pairs:
                xs.insert(i, ys.pop(j))

    @rule(a=WHICH, b=WHICH)
    def swap_groups(self, a: int, b: int) -> None:
        self.saved = None
        a, b = a % len(self.groups), b % len(self.groups)
        for groups in (self.groups, self.opt.param_groups):
            groups[a], groups[b] = groups[b], groups[a]

    @rule(which=WHICH)
    def rebind_a_group(self, which: int) -> None:
        self.before_moves()
        group, theirs = self.pick_group(which)
        self.opt.param_groups[self.groups.index(group)] = {**theirs, "params": list(theirs["params"])}

    @rule(which=WHICH, shape=st.none() | SHAPES, state=st.sampled_from(["stays", "is deleted", "moves"]))
    def replace_a_parameter(self, which: int, shape: Shape | None, state: str) -> None:
        twin, group = self.pick(which)
        self.before_moves()
        self.look()
        old = twin.p
        had = twin.entries if self.entries(twin).keys() > twin.foreign.keys() else {}
        shape = tuple(old.shape) if shape is None or flattens(old, shape, group.options) else shape
        twin.p = nn.Parameter(self.weights(shape, group.options, old.dtype))
        self.theirs(group)["params"][group.twins.index(twin)] = twin.p
        if state == "moves":
            self.opt.state[twin.p] = self.opt.state.pop(old, {})
        elif state == "is deleted" or twin.foreign:  # which can't stay without its parameter
            self.opt.state.pop(old, None)
        twin.foreign = twin.foreign if state == "moves" else {}
        twin.start(group.options, had if state == "moves" and shape == tuple(old.shape) else {})
        self.look()

    @rule(which=WHICH, shape=SHAPES)
    def change_a_shape(self, which: int, shape: Shape) -> None:
        twin, group = self.pick(which)
        if shape != tuple(twin.p.shape) and not flattens(twin.p, shape, group.options):
            self.saved = None
            self.look()
            twin.change_in_place(self.weights(shape, group.options, twin.p.dtype))
            twin.start(group.options)
            self.look()

    @rule(dtype=st.sampled_from(DTYPES), which=ALL | SOME)
    def change_dtypes(self, dtype: torch.dtype, which: set[int]) -> None:
        self.look()  # state that is converted twice is rounded twice
        for i, (twin, group) in enumerate(self.twins):
            if i in which and exact(twin.p.shape, group.options):
                twin.change_in_place(twin.p.detach().to(dtype))
                twin.start(group.options, twin.entries)

    @FEW
    @rule(options=group_options(), shapes=st.lists(SHAPES, min_size=1, max_size=2), dtype=st.sampled_from(DTYPES))
    def add_a_group(self, options: Options, shapes: list[Shape], dtype: torch.dtype) -> None:
        self.saved = None
        self.groups.append(self.group(options, shapes, dtype))
        self.opt.add_param_group(self.groups[-1].for_torch(self.named))

    @FEW
    @rule(which=WHICH, shape=SHAPES, at=WHICH, dtype=st.sampled_from(DTYPES), freezes=st.booleans())
    def add_a_parameter(self, which: int, shape: Shape, at: int, dtype: torch.dtype, freezes: bool) -> None:
        group, theirs = self.pick_group(which)
        self.before_moves()
        twin = self.twin(shape, group.options, dtype)
        twin.p.requires_grad_(not freezes)
        at %= len(group.twins) + 1
        group.twins.insert(at, twin)
        theirs["params"].insert(at, twin.p)
        if self.named:
            theirs["param_names"].insert(at, twin.name)

    @precondition(lambda self: len(self.twins) > 1)
    @rule(which=WHICH)
    def remove_a_parameter(self, which: int) -> None:
        twin, group = self.pick(which)
        self.before_moves()
        self.look()
        theirs, i = self.theirs(group), group.twins.index(twin)
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

    @precondition(lambda self: not self.named or all(group.twins for group in self.groups))  # torch asks for names
    @rule(turns=st.booleans())
    def save_and_load_elsewhere(self, turns: bool) -> None:
        """With the parameters in another order, if they have names."""
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        for group in self.groups if turns and self.named else ():
            group.twins.reverse()
            self.saved = None
        for twin, _ in self.twins:
            twin.p = nn.Parameter(twin.p.detach().clone(), requires_grad=twin.p.requires_grad)
        self.opt = fed.Fed([group.for_torch(self.named) for group in self.groups])
        self.opt.load_state_dict(torch.load(file, weights_only=True))

    @rule()
    def save_again(self) -> None:
        self.save()

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        assert self.saved is not None
        saved, states, options, self.foreign = copy.deepcopy(self.saved)
        self.opt.load_state_dict(saved)
        for group, of_group in zip(self.groups, options, strict=True):
            group.options |= of_group
        for (twin, group), (entries, twin.foreign) in zip(self.twins, states, strict=True):
            twin.have(group.options, twin.entries if entries is None else entries)

    @rule(pickles=st.booleans())
    def copy(self, pickles: bool) -> None:
        both = self.opt, [twin.p for twin, _ in self.twins]
        self.opt, params = pickle.loads(pickle.dumps(both)) if pickles else copy.deepcopy(both)
        for (twin, _), p in zip(self.twins, params, strict=True):
            twin.p = p


def flattens(old: Tensor, shape: Shape, options: Options) -> bool:
    """Whether a matrix becomes a vector, which is taken for a part of flattened parameters and refused."""
    return len(shape) < 2 <= old.dim() and not issubclass(RULES[options["rule"]], Elementwise)


COMMON = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def test_any_sequence() -> None:
    run_state_machine_as_test(
        AnySequence, settings=settings(COMMON, max_examples=60, stateful_step_count=12, derandomize=True)
    )


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_any_long_sequence() -> None:
    runs = int(os.environ.get("FUZZ", "1000"))
    run_state_machine_as_test(AnySequence, settings=settings(COMMON, max_examples=runs, stateful_step_count=20))
