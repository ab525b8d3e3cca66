"""Options of a rule: numbers and words that stand flat in a parameter group and check themselves."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, lru_cache
from numbers import Integral, Real
from typing import Any, ClassVar, Self, get_args

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """A kind of option: how values are read, and which ones are allowed."""

    plain: Callable[[Any], Any]
    """Turns other libraries' and files' ways to write a value into Python's; leaves what it doesn't know as it is."""
    holds: Callable[[Any], bool]
    """Whether a plain value is allowed."""
    allowed: str
    """What is allowed; it completes the sentence "must be ..."."""

    def read(self, name: str, value: Any) -> Any:
        """Return a value of the option ``name`` as a plain one; raise a ValueError if it is not allowed."""
        plain = self.plain(value)
        check(self.holds(plain), name, value, self.allowed)
        return plain


# Options of each kind: fields of a dataclass that know which values they may have.


def beta(default: float) -> Any:
    """An option that is a decay coefficient in [0, 1); at 1 a bias correction would divide zero by zero."""
    return checked(default, lambda x: number(x) and 0 <= x < 1, "a number in [0, 1)")


def betas(default: tuple[float, float]) -> Any:
    """An option that is a pair of decay coefficients in [0, 1)."""

    def holds(x: Any) -> bool:
        return isinstance(x, tuple) and len(x) == 2 and all(number(b) and 0 <= b < 1 for b in x)

    return option(default, Kind(lambda x: as_tuple(x, as_number), holds, "two numbers in [0, 1)"))


def counts(default: tuple[int, ...]) -> Any:
    """An option that is a sequence of positive integers."""

    def holds(x: Any) -> bool:
        return isinstance(x, tuple) and all(integer(count) and count >= 1 for count in x)

    return option(default, Kind(lambda x: as_tuple(x, as_integer), holds, "a sequence of integers >= 1"))


def count_or_counts(default: int) -> Any:
    """An option that is a positive integer, or a sequence of them."""

    def plain(x: Any) -> Any:
        x = as_integer(x)
        return x if integer(x) else as_tuple(x, as_integer)

    def holds(x: Any) -> bool:
        return x != () and all(integer(count) and count >= 1 for count in (x if isinstance(x, tuple) else (x,)))

    return option(default, Kind(plain, holds, "an integer >= 1, or a sequence of them"))


def flag(default: bool | None) -> Any:
    """An option that is True or False; or None, if that is its default."""
    allowed = "a bool" if default is not None else "a bool or None"
    return option(default, Kind(python, lambda x: isinstance(x, bool) or (x is None and default is None), allowed))


def at_least(low: float, default: Any, meaning: str = "") -> Any:
    """An option that is a number from ``low`` up; an integer if its default is one."""
    because = f" ({meaning})" if meaning else ""
    if isinstance(default, int):
        return option(default, Kind(as_integer, lambda x: integer(x) and x >= low, f"an integer >= {low}{because}"))
    return checked(default, lambda x: number(x) and x >= low, f"a finite number >= {low}{because}")


def rate(default: None) -> Any:
    """An option that is a learning rate: a number, or a tensor of one element. A value of a tensor is waited for."""

    def plain(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return as_number(x)
        return x.detach() if x.requires_grad else x  # else the same tensor, because schedulers fill it in place

    def holds(x: Any) -> bool:
        if isinstance(x, Tensor):
            x = None if x.numel() != 1 or x.is_complex() or x.dtype == torch.bool or x.is_meta else float(x)
        return number(x) and x >= 0

    allowed = "a finite number >= 0 or a tensor of one, from the group or from the optimizer"
    return option(default, Kind(plain, holds, allowed))


def any_integer(default: int) -> Any:
    """An option that is an integer."""
    return option(default, Kind(as_integer, integer, "an integer"))


def frequency(default: int) -> Any:
    """An option that is a number of steps between refreshes, or a function from the step to that number."""

    def holds(x: Any) -> bool:
        return callable(x) or (integer(x) and x >= 1)

    return option(default, Kind(as_integer, holds, "an integer >= 1, or a function of the step"))


def one_of(words: Any, default: str) -> Any:
    """An option that is one of a few words, given as a Literal type (see `steepest.rule.words`)."""
    known: tuple[str, ...] = get_args(words)

    def holds(x: Any) -> bool:
        return isinstance(x, str) and x in known

    def plain(x: Any) -> Any:
        return known[known.index(x)] if holds(x) else x  # of numpy's strings and of enumerations too

    return option(default, Kind(plain, holds, "one of " + ", ".join(map(repr, known))))


def checked(default: Any, holds: Callable[[Any], bool], allowed: str) -> Any:
    """An option that is a number, or None, with a condition of its own; ``allowed`` completes "must be ..."."""
    return option(default, Kind(as_number, holds, allowed))


def option(default: Any, kind: Kind) -> Any:
    """An option of any kind."""
    return field(default=default, metadata={"kind": kind})


def lays_out(option: Any) -> Any:
    """Mark an option that the names, shapes or dtypes of the state depend on: it can't change while there is state."""
    option.metadata = {**option.metadata, "lays_out": True}
    return option


def number(x: object) -> bool:
    """Whether ``x`` is an integer or a float, and finite; True and False are not."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def integer(x: object) -> bool:
    """Whether ``x`` is an integer; True and False are not."""
    return isinstance(x, int) and number(x)


# What people, files and numpy write, as plain Python values. What is none of these comes back as it is.


def python(x: Any) -> Any:
    """Return a scalar or an array of numpy as Python's numbers and lists."""
    return x.tolist() if hasattr(x, "tolist") and not isinstance(x, Tensor) else x


def as_number(x: Any) -> Any:
    """Return a number as an int or a float; YAML and command lines have some as strings.

    >>> as_number("1e-3"), as_number("10"), as_number("ten"), as_number(True)
    (0.001, 10, 'ten', True)
    """
    x = python(x)
    if isinstance(x, str):
        for read in (int, float):
            with suppress(ValueError):
                return read(x)
    if isinstance(x, bool) or not isinstance(x, Real):
        return x
    with suppress(OverflowError):
        return int(x) if isinstance(x, Integral) else float(x)
    return x


def as_integer(x: Any) -> Any:
    """Return an integer as an int, also if it is written as a float.

    >>> as_integer(10.0), as_integer("1e3"), as_integer(0.5)
    (10, 1000, 0.5)
    """
    x = as_number(x)
    return int(x) if isinstance(x, float) and x.is_integer() else x


def as_tuple(x: Any, plain: Callable[[Any], Any]) -> Any:
    """Return a sequence as a tuple, which nobody changes in place, of entries that ``plain`` has read."""
    x = python(x)
    return tuple(map(plain, x)) if isinstance(x, Sequence) and not isinstance(x, str) else x


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that stand flat in a parameter group. Whenever they are built, they are checked and made plain."""

    name: ClassVar[str]
    """What the registry, parameter groups and the command line call the rule."""
    paper: ClassVar[str] = ""
    """Where the rule was published."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if "kind" in f.metadata:
                object.__setattr__(self, f.name, f.metadata["kind"].read(f.name, getattr(self, f.name)))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every option that has a default."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING}

    @classmethod
    def kind(cls, name: str) -> Kind:
        """The kind of an option."""
        kind: Kind = cls.__dataclass_fields__[name].metadata["kind"]
        return kind

    @classmethod
    def layout_options(cls) -> tuple[str, ...]:
        """The names of the options that the layout of the state depends on."""
        return _layout_options(cls)  # type: ignore[arg-type]

    @property
    def layout(self) -> tuple[Any, ...]:
        """What the layout of the state depends on: the rule, and those options."""
        return type(self), *(getattr(self, name) for name in self.layout_options())

    @classmethod
    def settled(cls, group: Mapping[str, Any], agreed: Callable[[bool], bool]) -> dict[str, Any]:
        """Options of a new parameter group that depend on its devices, as plain words; they are saved with it.

        ``agreed`` tells whether something that this rank has found holds on all ranks that share the parameters.
        """
        return {}

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        """The options that stand in a parameter group; those that it lacks have their defaults.

        Raises:
            ValueError: for an option that is not allowed.
        """
        names: dict[str, Any] = _names(cls)  # type: ignore[arg-type]
        values = [group.get(name, default) for name, default in names.items()]
        try:
            return _built(cls, *values)  # type: ignore[arg-type, return-value]
        except TypeError:  # a list, say, which has no hash
            return cls(**dict(zip(names, values, strict=True)))

    def as_dict(self) -> dict[str, Any]:
        """The options by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@cache
def _names(cls: type[Options]) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls)}


@cache
def _layout_options(cls: type[Options]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cls) if f.metadata.get("lays_out"))


@lru_cache(maxsize=256, typed=True)  # typed: True is not 1, and has to be checked anew
def _built(cls: type[Options], *values: Any) -> Options:
    return cls(**dict(zip(_names(cls), values, strict=True)))  # type: ignore[arg-type]


def check(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise the ValueError that names an option, its value and what is allowed, unless the condition holds.

    >>> check(False, "eps", -1.0, "a number >= 0")
    Traceback (most recent call last):
    ValueError: eps=-1.0: must be a number >= 0
    """
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` with the known name that is nearest, or nothing if none is near.

    >>> nearest("precondition_freqency", ["precondition_frequency", "lr"])
    " (did you mean 'precondition_frequency'?)"
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
