"""Options of a rule: numbers and words that stand flat in a parameter group and check themselves."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, lru_cache
from typing import Any, ClassVar, Self, get_args

# Kinds of options: fields of a rule's dataclass that know which values they may have.


def beta(default: float) -> Any:
    """An option that is a decay coefficient in [0, 1); at 1 a bias correction would divide zero by zero."""
    return checked(default, lambda x: number(x) and 0 <= x < 1, "a number in [0, 1)")


def betas(default: tuple[float, float]) -> Any:
    """An option that is a pair of decay coefficients in [0, 1)."""

    def holds(x: Any) -> bool:
        return isinstance(x, (tuple, list)) and len(x) == 2 and all(number(b) and 0 <= b < 1 for b in x)

    return checked(default, holds, "two numbers in [0, 1)")


def flag(default: bool | None) -> Any:
    """An option that is True or False; or None, if that is its default."""
    allowed = "a bool" if default is not None else "a bool or None"
    return checked(default, lambda x: isinstance(x, bool) or (x is None and default is None), allowed)


def at_least(low: float, default: Any, meaning: str = "") -> Any:
    """An option that is a number from ``low`` up; an integer if its default is one."""
    whole = isinstance(default, int)
    allowed = f"{'an integer' if whole else 'a number'} >= {low}" + (f" ({meaning})" if meaning else "")
    return checked(default, lambda x: number(x) and x >= low and (isinstance(x, int) or not whole), allowed)


def frequency(default: int) -> Any:
    """An option that is a number of steps between refreshes, or a function from the step to that number."""

    def holds(x: Any) -> bool:
        return callable(x) or (number(x) and x >= 1 and float(x).is_integer())

    return checked(default, holds, "an integer >= 1, or a function of the step")


def one_of(words: Any, default: str) -> Any:
    """An option that is one of a few words, given as a Literal type (see `steepest.rule.words`)."""
    return checked(default, lambda x: x in get_args(words), "one of " + ", ".join(map(repr, get_args(words))))


def checked(default: Any, holds: Callable[[Any], bool], allowed: str) -> Any:
    """An option with a condition of its own; ``allowed`` completes the sentence "must be ..."."""
    return field(default=default, metadata={"allowed": (holds, allowed)})


def lays_out(option: Any) -> Any:
    """Mark an option that the names, shapes or dtypes of the state depend on: it can't change while there is state."""
    option.metadata = {**option.metadata, "lays_out": True}
    return option


def number(x: object) -> bool:
    """Whether ``x`` is an integer or a float; True and False are not."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that stand flat in a parameter group. They are checked whenever they are built."""

    name: ClassVar[str]
    """What the registry, parameter groups and the command line call the rule."""
    paper: ClassVar[str] = ""
    """Where the rule was published."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if "allowed" in f.metadata:
                holds, allowed = f.metadata["allowed"]
                check(holds(getattr(self, f.name)), f.name, getattr(self, f.name), allowed)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every option that has a default."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING}

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
        """The rule that a parameter group describes.

        Raises:
            ValueError: for an option that is out of range.
        """
        names: tuple[str, ...] = _names(cls)  # type: ignore[arg-type]
        values = [group[name] for name in names]
        try:
            return _built(cls, *values)  # type: ignore[arg-type, return-value]
        except TypeError:  # a list, say, which has no hash
            return cls(**dict(zip(names, values, strict=True)))


@cache
def _names(cls: type[Options]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cls))


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


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise the ValueError of `check` unless ``value`` is one of the ``choices``."""
    check(value in choices, name, value, "one of " + ", ".join(map(repr, choices)))


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` with the known name that is nearest, or nothing if none is near.

    >>> nearest("precondition_freqency", ["precondition_frequency", "lr"])
    " (did you mean 'precondition_frequency'?)"
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
