"""Other spellings of options: other libraries' names, and switches for several options at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steepest.rule import check
from steepest.rules.soap import Soap

SOAPS = ("soap", "kl_soap")
SHAMPOOS = ("shampoo", "kl_shampoo")
UNGUARDED = {"noise_floor": 0.0, "momentum_floor": False, "kl_floor": 0.0}
"""What ``guards=False`` means."""
ALIASES = ("guards", "preconditioner_decay", "use_eigh", "use_kl_shampoo")
"""Names that are no options of a rule, but that `resolve` knows."""


def resolve(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group in its rule's own words; ``rule`` is among them, and may change.

    ==========================  =======================================================================
    ``use_kl_shampoo=True``     rule "kl_soap" or "kl_shampoo"
    ``use_eigh=True``           ``solver="eigh"``
    ``preconditioner_decay=b``  ``shampoo_beta=b``
    ``guards=False``            ``noise_floor=0``, ``momentum_floor=False``, and for KL ``kl_floor=0``
    ``noise_floor="auto"``      its default
    ==========================  =======================================================================

    Raises:
        ValueError: for two options that contradict each other; it names both. And for ``refresh``, which was the name
            of ``solver``.

    >>> resolve({"rule": "soap", "use_kl_shampoo": True, "use_eigh": True})
    {'rule': 'kl_soap', 'solver': 'eigh'}
    >>> resolve({"rule": "soap", "use_eigh": True, "solver": "qr"})
    Traceback (most recent call last):
    ValueError: use_eigh=True contradicts solver='qr': give one of them
    """
    options = dict(options)
    rule = options.get("rule")
    if rule in (*SOAPS, "inverse_root") and (decay := options.pop("preconditioner_decay", None)) is not None:
        _set(options, "preconditioner_decay", decay, "shampoo_beta", decay, free=(0.95,))
    if rule not in SOAPS + SHAMPOOS:
        return options

    if "refresh" in options:
        raise ValueError(f"refresh={options['refresh']!r}: the option is called solver")
    if "use_kl_shampoo" in options:
        kl = _flag(options, "use_kl_shampoo")
        if kl:
            options["rule"] = rule = f"kl_{rule.removeprefix('kl_')}"
        elif rule.startswith("kl_"):
            raise ValueError(f"use_kl_shampoo=False contradicts rule={rule!r}: give one of them")
    if rule not in SOAPS:
        return options

    if "use_eigh" in options and _flag(options, "use_eigh"):
        _set(options, "use_eigh", True, "solver", "eigh", free=("auto",))
    if options.get("noise_floor") == "auto":
        options["noise_floor"] = Soap.defaults()["noise_floor"]
    if "guards" in options and not _flag(options, "guards"):
        for name, value in UNGUARDED.items():
            if name != "kl_floor" or rule == "kl_soap":
                _set(options, "guards", False, name, value)
    return options


def _flag(options: dict[str, Any], name: str) -> bool:
    value = options.pop(name)
    check(isinstance(value, bool), name, value, "a bool")
    return bool(value)


def _set(
    options: dict[str, Any], alias: str, given: Any, name: str, value: Any = None, free: tuple[Any, ...] = ()
) -> None:
    """Set an option to what its alias says, unless it was given otherwise; ``free`` values count as not given."""
    value = given if value is None else value
    there = options.get(name, value)
    if there != value and there not in free:
        raise ValueError(f"{alias}={given!r} contradicts {name}={there!r}: give one of them")
    options[name] = value
