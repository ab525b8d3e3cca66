"""The optimizer under test, its training runs, in which nothing is left to chance, and the clauses that it meets.

Gradients come from a random generator that is seeded by step and parameter, not from a model. The gradient of one
parameter never depends on another, so that two runs can be compared parameter by parameter, bit for bit.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steepest.testing.evidence import NotApplicable, Snapshot, expect_moved, one_line, snapshot

Check = Callable[["Subject"], None]
Factory = Callable[..., torch.optim.Optimizer]
"""``factory(params, **overrides)`` returns an optimizer for ``params``, with some of its options overridden."""
Form = Callable[[dict[str, Tensor]], Any]
"""A function that gives parameters the form in which an optimizer gets them, as an iterator or as groups."""

SHAPES: dict[str, tuple[int, ...]] = {
    "first.weight": (4, 3),
    "second.weight": (4, 3),  # the same shape again, for optimizers that batch
    "kernel": (2, 3, 1, 2),
    "bias": (4,),
    "gain": (),
}


class Run:
    """Some parameters, their optimizer, and steps with gradients that depend on step and name only."""

    def __init__(self, params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, by_closure: bool) -> None:
        self.params, self.optimizer, self.by_closure = dict(params), optimizer, by_closure
        self.dtype = next(iter(self.params.values())).dtype

    def set_gradients(self, k: int, missing: Collection[str] = (), scale: float = 1.0) -> None:
        """Give every parameter the gradient of step ``k``, and None to those whose gradient is missing."""
        for name, p in self.params.items():
            p.grad = None if name in missing or not p.requires_grad else scale * gradient(k, name, p)

    def act(self) -> None:
        """Call ``optimizer.step()`` with the gradients as they are, with a closure if it requires one."""
        self.optimizer.step(lambda: torch.zeros((), device="cpu")) if self.by_closure else self.optimizer.step()  # type: ignore

    def step(
        self, k: int, missing: Collection[str] = (), poison: Mapping[str, float] | None = None, scale: float = 1.0
    ) -> None:
        """Take step ``k``. ``poison`` maps parameters to a bad number that one entry of their gradient gets."""
        self.set_gradients(k, missing, scale)
        for name, value in (poison or {}).items():
            grad = self.params[name].grad
            assert grad is not None
            grad.view(-1)[0] = value
        seed(k)  # so that runs compare even if steps draw random numbers, which another clause is about
        self.act()

    def steps(self, ks: Iterable[int]) -> None:
        """Take some steps. In step 1 the second matrix has no gradient, so that step counts differ from then on."""
        for k in ks:
            self.step(k, missing=["second.weight"] if k == 1 else [])

    def expect_training(self, ks: Iterable[int], promise: str) -> None:
        """Take some steps, and raise `Broken` unless every parameter moves, to finite values."""
        before = self.weights()
        self.steps(ks)
        expect_moved(self.weights(), before, promise)

    def set(self, option: str, value: Any) -> None:
        """Write an option into every group, as a scheduler would."""
        for group in self.optimizer.param_groups:
            if isinstance(group[option], Tensor):
                group[option].fill_(value)
            else:
                group[option] = value

    def weights(self, *names: str) -> Snapshot:
        """Return a copy of the parameters of these names, by default of all."""
        return snapshot({name: self.params[name] for name in names or self.params})

    def everything(self, *names: str) -> Snapshot:
        """Return a copy of the weights and state of these parameters, by default of all."""
        state = {name: self.optimizer.state.get(self.params[name], {}) for name in names or self.params}
        return snapshot({"weight of": self.weights(*names), "state of": state})


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
    def by_closure(self) -> bool:
        """Whether ``step`` requires a closure."""
        step = self.factory(list(self.params(names=["first.weight"]).values())).step
        closure = inspect.signature(step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    @property
    def lr(self) -> float:
        """The default learning rate."""
        return float(self.defaults["lr"])

    def params(self, dtype: torch.dtype | None = None, names: Collection[str] = ()) -> dict[str, Tensor]:
        """Return fresh parameters, the same each time: those of these names, by default all."""
        drawn = {name: _random(0, name, SHAPES[name]) for name in names or self.shapes}
        return {name: nn.Parameter(p.to(self.device, dtype or self.dtype)) for name, p in drawn.items()}

    def start(
        self, dtype: torch.dtype | None = None, names: Collection[str] = (), form: Form | None = None, **overrides: Any
    ) -> Run:
        """Return a run before its first step, whose optimizer was given a list of tensors, or another form of them."""
        params = self.params(dtype, names)
        return self.over(params, form(params) if form else list(params.values()), **overrides)

    def over(self, params: Mapping[str, Tensor], given: Any, **overrides: Any) -> Run:
        """Return a run before its first step, whose optimizer was given the parameters as ``given``."""
        return Run(params, self.factory(given, **overrides), self.by_closure)

    def require(self, clause: Clause) -> None:
        """Raise `NotApplicable` unless the optimizer has what the clause needs."""
        if clause.needs and not any(option in self.defaults for option in clause.needs):
            raise NotApplicable(f"has {'neither' if len(clause.needs) > 1 else 'no'} {' nor '.join(clause.needs)}")
        if clause.several and not self.others:
            raise NotApplicable("takes a single parameter only")


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


def gradient(k: int, name: str, p: Tensor) -> Tensor:
    """Return the gradient of step ``k`` for the parameter of this name."""
    return _random(1 + k, name, p.shape).to(p.device, p.dtype)


def seed(k: int) -> None:
    """Seed the global generators; `torch.manual_seed` would take longer than a step."""
    torch.default_generator.manual_seed(k)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(k)


def _random(k: int, name: str, shape: Iterable[int]) -> Tensor:
    number = zlib.crc32(f"{name}, {k}".encode())
    generator = torch.Generator().manual_seed(number)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
