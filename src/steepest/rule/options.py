"""Options of a rule: numbers and words that stand flat in a parameter group and check themselves."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Self


def beta(default: float) -> Any:
    """An option that is a decay coefficient in [0, 1); at 1 a bias correction would divide zero by zero."""
    return _option(default, lambda x: _number(x) and 0 <= x < 1, "a number in [0, 1)")


def betas(default: tuple[float, float]) -> Any:
    """An option that is a pair of decay coefficients."""
    return _option(
        default, lambda x: len(x) == 2 and all(_number(b) and 0 <= b < 1 for b in x), "two numbers in [0, 1)"
    )


def at_least(low: float, default: Any, meaning: str = "") -> Any:
    """An option that is a number from ``low`` up; an integer if its default is one."""
    kind = "an integer" if isinstance(default, int) else "a number"
    whole = isinstance(default, int)
    return _option(
        default,
        lambda x: _number(x) and x >= low and (isinstance(x, int) or not whole),
        f"{kind} >= {low}" + (f" ({meaning})" if meaning else ""),
    )


def frequency(default: int) -> Any:
    """An option that is a number of steps between refreshes, or a function from the step to that number."""
    return _option(
        default,
        lambda f: callable(f) or (_number(f) and f == int(f) >= 1),
        "an integer >= 1, or a function of the step",
    )


def one_of(choices: Sequence[str], default: str) -> Any:
    """An option that is one of a few words."""
    return _option(default, lambda x: x in choices, "one of " + ", ".join(map(repr, choices)))


def checked(default: Any, holds: Callable[[Any], bool], allowed: str) -> Any:
    """An option with a condition of its own; ``allowed`` completes the sentence "must be ..."."""
    return _option(default, holds, allowed)


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _option(default: Any, holds: Callable[[Any], bool], allowed: str) -> Any:
    return field(default=default, metadata={"allowed": (holds, allowed)})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that stand flat in a parameter group; checked whenever they are built."""

    name: ClassVar[str]
    """How the registry, parameter groups and the command line call it."""
    paper: ClassVar[str] = ""
    """Where it was published."""

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
    def settled(cls, group: Mapping[str, Any], agreed: Callable[[bool], bool]) -> dict[str, Any]:
        """Options of a new parameter group that depend on its devices, as plain words; they are saved with it.

        ``agreed`` says of what this rank has found whether all ranks have that share the group's parameters.
        """
        return {}

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        """The rule that a parameter group describes."""
        return cls(**{f.name: group[f.name] for f in fields(cls)})


def check(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise the ValueError that names an option, its value and what is allowed.

    >>> check(False, "eps", -1.0, "a number >= 0")
    Traceback (most recent call last):
    ValueError: eps=-1.0: must be a number >= 0
    """
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the ``choices``."""
    check(value in choices, name, value, "one of " + ", ".join(map(repr, choices)))


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)``, or nothing if nothing is near.

    >>> nearest("precondition_freqency", ["precondition_frequency", "lr"])
    " (did you mean 'precondition_frequency'?)"
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
