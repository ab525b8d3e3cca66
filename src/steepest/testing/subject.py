"""The optimizer under test, what it is given and how it steps, and the clauses that it meets.

Gradients come from a random generator that is seeded by step and parameter. The gradient of one parameter never depends
on another, so that two runs can be compared parameter by parameter, bit for bit. An optimizer that takes a model gets
the same gradients by a backward pass, and one that requires a closure gets a loss; see `steepest.testing.sources`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steepest.testing.draws import drawn
from steepest.testing.evidence import NotApplicable, one_line
from steepest.testing.run import Run
from steepest.testing.sources import ANSWERS, Drawn, Evaluated, Propagated, Source

Check = Callable[["Subject"], None]
Factory = Callable[..., torch.optim.Optimizer]
"""``factory(params, **overrides)`` returns an optimizer for ``params``, with some of its options overridden.

If the first parameter of its signature is called ``model``, it gets a module, and ``params`` by name if it takes them.
"""
Form = Callable[[dict[str, Tensor]], Any]
"""A function that gives parameters the form in which an optimizer gets them, as an iterator or as groups."""

SHAPES: dict[str, tuple[int, ...]] = {
    "first.weight": (4, 3),
    "second.weight": (4, 3),  # the same shape again, for optimizers that batch
    "kernel": (2, 3, 1, 2),
    "bias": (4,),
    "gain": (),
}


class Subject:
    """An optimizer under test, and what it takes: the parameters that it accepts, and its options."""

    def __init__(
        self, factory: Factory, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.factory, self.dtype, self.device = factory, dtype, torch.device(device)
        self.refused: dict[str, str] = {}
        self.shapes = SHAPES
        for name, shape in SHAPES.items():
            try:
                self.start(names=[name]).step(0)
            except Exception as error:
                self.refused[f"shape {list(shape)}"] = one_line(error)
                self.shapes = {other: shape for other, shape in self.shapes.items() if other != name}
        if not self.shapes:
            raise ValueError(f"no parameter could be optimized: {next(iter(self.refused.values()))}")
        self.first, *self.others = self.shapes
        """Names of the parameters; clauses that need no more than one take the first."""

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The options of a group that sets none."""
        group = self.start().optimizer.param_groups[0]
        return {option: value for option, value in group.items() if option not in ("params", "param_names")}

    @cached_property
    def by_model(self) -> bool:
        """Whether the optimizer takes a model, going by the name of its first argument."""
        return next(iter(self.arguments), "") == "model"

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of the factory's arguments."""
        try:
            return tuple(inspect.signature(self.factory).parameters)
        except ValueError:  # no signature
            return ()

    @cached_property
    def by_closure(self) -> bool:
        """Whether ``step`` requires a closure: it raises a TypeError that says so if there is none."""
        for params in (self.params(names=[name]) for name in SHAPES):
            try:
                run = self._run(params, Propagated(params) if self.by_model else Drawn())
                closure = inspect.signature(run.optimizer.step).parameters.get("closure")
                if closure is None or closure.default is not inspect.Parameter.empty:
                    run.step(0)
            except TypeError as error:
                if "closure" in str(error):
                    return True
            except Exception:
                continue
            else:
                return closure is not None and closure.default is inspect.Parameter.empty
        return False

    @cached_property
    def answer(self) -> str:
        """What its closure returns, one of `ANSWERS`: the first with which a step lowers the loss."""
        seen = {}
        for answer, name in itertools.product(ANSWERS, SHAPES):
            params = self.params(names=[name])
            try:
                run = self._run(params, Evaluated(answer, params, self.by_model))
                before = run.loss()
                run.step(0)
                if run.loss() < before:
                    return answer
                seen[answer] = f"the loss is {before:.6g} before the step and {run.loss():.6g} after it"
            except Exception as error:
                seen[answer] = one_line(error)
        raise ValueError("no closure suits: " + "; ".join(f"with {answer}, {what}" for answer, what in seen.items()))

    @cached_property
    def joint(self) -> bool:
        """Whether it has a closure evaluated, and keeps what it knows of all parameters under one of them."""
        if not (self.by_closure and self.others):
            return False
        run = self.start()
        run.steps(range(2))
        entries = [len(run.optimizer.state.get(p, {})) for p in run.params.values()]
        return entries.count(max(entries)) == 1

    @cached_property
    def coupled(self) -> bool:
        """Whether the gradient of one parameter has an effect on another, where the optimizer sees more than gradients.

        It is a fault in one that is given gradients only.
        """
        if not ((self.by_model or self.by_closure) and self.others):
            return False
        run, other = self.start(), self.start()
        for k in range(3):
            run.step(k)
            other.step(k, missing=self.others)
        return not torch.equal(run.params[self.first], other.params[self.first])

    @property
    def lr(self) -> float:
        """The default learning rate."""
        return float(self.defaults["lr"])

    def params(self, dtype: torch.dtype | None = None, names: Collection[str] = ()) -> dict[str, Tensor]:
        """Return fresh parameters, the same each time: those of these names, by default all."""
        values = {name: drawn(0, name, SHAPES[name]) for name in names or self.shapes}
        return {name: nn.Parameter(x.to(self.device, dtype or self.dtype)) for name, x in values.items()}

    def start(
        self, dtype: torch.dtype | None = None, names: Collection[str] = (), form: Form | None = None, **overrides: Any
    ) -> Run:
        """Return a run before its first step, whose optimizer was given a list of tensors, or another form of them."""
        params = self.params(dtype, names)
        try:
            return self.over(params, form(params) if form else list(params.values()), **overrides)
        except (TypeError, ValueError) as refusal:
            if dtype is not None and dtype.is_floating_point and str(dtype)[6:] in str(refusal):
                raise NotApplicable(f"refuses parameters in {str(dtype)[6:]}: {one_line(refusal)}") from refusal
            raise

    @property
    def takes_forms(self) -> bool:
        """Whether parameters can be given in the forms of torch.optim, as groups for example."""
        return not self.by_model or "params" in self.arguments

    def start_frozen(self, *names: str) -> Run:
        """Return a run with frozen parameters: before the optimizer is there, or after it where it takes a model."""
        params = self.params()
        if self.takes_forms:
            for name in names:
                params[name].requires_grad_(False)
        run = self.over(params, list(params.values()))
        for name in names:
            params[name].requires_grad_(False)
        return run

    def over(self, params: Mapping[str, Tensor], given: Any, **overrides: Any) -> Run:
        """Return a run before its first step, whose optimizer was given the parameters as ``given``."""
        in_order = isinstance(given, list) and [id(p) for p in given] == [id(p) for p in params.values()]
        if not in_order and not self.takes_forms:
            raise NotApplicable("takes a model, which has its parameters in one form")
        source: Source = Propagated(params) if self.by_model else Drawn()
        if self.by_closure:
            source = Evaluated(self.answer, params, self.by_model)
        return self._run(params, source, given, **overrides)

    def _run(self, params: Mapping[str, Tensor], source: Source, given: Any = None, **overrides: Any) -> Run:
        if self.by_model and given is not None and "params" in self.arguments:
            overrides["params"] = given
        if self.by_model or given is None:
            given = source.given(params)
        return Run(params, self.factory(given, **overrides), source)

    def require(self, clause: Clause) -> None:
        """Raise `NotApplicable` unless the optimizer has what the clause needs."""
        if clause.needs and not any(option in self.defaults for option in clause.needs):
            raise NotApplicable(f"has {'neither' if len(clause.needs) > 1 else 'no'} {' nor '.join(clause.needs)}")
        if clause.several and not self.others:
            raise NotApplicable("takes a single parameter only")
        if clause.closure and not self.by_closure:
            raise NotApplicable("requires no closure")
        if clause.each and self.joint:
            raise NotApplicable("moves all parameters as one vector, with one state")
        if clause.alone and self.coupled:
            raise NotApplicable("the gradient of one parameter has a say in the steps of others")


@dataclass(frozen=True)
class Clause:
    """A promise, and the function that tests it, which returns or raises `Broken` or `NotApplicable`."""

    number: int
    """The chapter of the contract."""
    title: str
    """The promise in a few words."""
    check: Check
    needs: tuple[str, ...] = ()
    """Options of which an optimizer must have one for the clause to apply."""
    several: bool = False
    """Whether the clause applies only to optimizers that take several parameters."""
    closure: bool = False
    """Whether the clause applies only to optimizers that require a closure."""
    each: bool = False
    """Whether the clause applies only to optimizers in which each parameter has state and options of its own."""
    alone: bool = False
    """Whether the clause applies only to optimizers in which a parameter trains by its own gradients alone."""
    slow: bool = False
    """Whether the clause is checked only on request."""

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.check.__name__

    @property
    def promise(self) -> str:
        """The docstring of the function: the promise, and its reason."""
        return inspect.cleandoc(self.check.__doc__ or "")


REGISTERED: dict[str, Clause] = {}
"""Clauses by name; `steepest.testing.CLAUSES` has them in the contract's order."""


def clause(number: int, title: str, **conditions: Any) -> Callable[[Check], Check]:
    """Register the function below as a clause of chapter ``number``; the conditions are fields of `Clause`."""

    def register(check: Check) -> Check:
        REGISTERED[check.__name__] = Clause(number, title, check, **conditions)
        return check

    return register
