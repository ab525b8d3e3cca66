"""Other spellings of options: other libraries' names, and switches for several options at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steepest.rule import as_number, check, python
from steepest.rules.kfac import Kfac
from steepest.rules.kl_soap import KLSoap
from steepest.rules.soap import Soap

SOAPS = ("soap", "kl_soap")
SHAMPOOS = ("shampoo", "kl_shampoo")
KFACS = ("kfac", "ekfac")
OF_KFAC = {
    "factor_update_steps": "statistics_frequency",
    "T1": "statistics_frequency",
    "inv_update_steps": "precondition_frequency",
    "T2": "precondition_frequency",
    "factor_decay": "factor_beta",
}
"""Names that K-FAC's options have in other libraries."""
UNGUARDED = {"noise_floor": 0.0, "momentum_floor": False, "kl_floor": 0.0}
"""What ``guards=False`` means."""
ALIASES = {
    **{name: f"set {target}" for name, target in OF_KFAC.items()},
    "guards": "set noise_floor, momentum_floor and, for KL, kl_floor",
    "preconditioner_decay": "set shampoo_beta",
    "refresh": "set solver",
    "use_eigh": "set solver",
    "use_kl_shampoo": "name the rule of a new group",
}
"""Names that are no options of a rule, but that `resolve` knows; and what to do instead once a group is there."""
TARGETS = {"guards": tuple(UNGUARDED), "preconditioner_decay": ("shampoo_beta",), "use_eigh": ("solver",)}
"""The options that an alias sets."""


def resolve(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group in its rule's own words; ``rule`` is among them, and may change.

    ==========================  =======================================================================
    ``use_kl_shampoo=True``     rule "kl_soap" or "kl_shampoo"
    ``use_eigh=True``           ``solver="eigh"``; False: the default, if no solver is named
    ``preconditioner_decay=b``  ``shampoo_beta=b``
    ``guards=False``            ``noise_floor=0``, ``momentum_floor=False``, and for KL ``kl_floor=0``; True: their
                                defaults, if they are not named
    ``noise_floor="auto"``      its default
    ``factor_update_steps=k``   for K-FAC: ``statistics_frequency=k``; so does ``T1=k``
    ``inv_update_steps=k``      for K-FAC: ``precondition_frequency=k``; so does ``T2=k``
    ``factor_decay=b``          for K-FAC: ``factor_beta=b``
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
    options, rule = dict(options), options.get("rule")
    if not isinstance(rule, str):
        return options
    if rule in (*SOAPS, "inverse_root") and (decay := options.pop("preconditioner_decay", None)) is not None:
        beta = Soap.kind("shampoo_beta").read("preconditioner_decay", decay)
        _set(options, "preconditioner_decay", decay, {"shampoo_beta": beta})
    if rule in KFACS:
        for alias, target in OF_KFAC.items():
            if alias in options:
                given = options.pop(alias)
                _set(options, alias, given, {target: Kfac.kind(target).read(alias, given)})
    if rule not in SOAPS + SHAMPOOS:
        return options

    if "refresh" in options:
        raise ValueError(f"refresh={options['refresh']!r}: the option is called solver")
    if "use_kl_shampoo" in options:
        if _flag(options, "use_kl_shampoo"):
            options["rule"] = rule = f"kl_{rule.removeprefix('kl_')}"
        elif rule.startswith("kl_"):
            raise ValueError(f"use_kl_shampoo=False contradicts rule={rule!r}: give one of them")
    if rule not in SOAPS:
        return options

    defaults = (KLSoap if rule == "kl_soap" else Soap).defaults()
    if "use_eigh" in options:
        if _flag(options, "use_eigh"):
            _set(options, "use_eigh", True, {"solver": "eigh"})
        elif options.setdefault("solver", defaults["solver"]) == "eigh":
            raise ValueError("use_eigh=False contradicts solver='eigh': give one of them")
    if isinstance(floor := options.get("noise_floor"), str) and floor == "auto":
        options["noise_floor"] = defaults["noise_floor"]
    if "guards" in options:
        floors = {name: value for name, value in UNGUARDED.items() if name in defaults}
        if _flag(options, "guards"):
            options = {name: defaults[name] for name in floors} | options
        else:
            _set(options, "guards", False, floors)
    return options


def _flag(options: dict[str, Any], name: str) -> bool:
    value = options.pop(name)
    plain = python(value)
    check(isinstance(plain, bool), name, value, "a bool")
    return bool(plain)


def _set(options: dict[str, Any], alias: str, given: Any, meant: Mapping[str, Any]) -> None:
    """Set the options that an alias means, unless they are given otherwise."""
    for name, value in meant.items():
        if as_number(options.get(name, value)) != value:
            raise ValueError(f"{alias}={given!r} contradicts {name}={options[name]!r}: give one of them")
        options[name] = value
