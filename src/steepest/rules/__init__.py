"""The rules, one algorithm a file, and the registry by which groups name them."""

from typing import Any

from steepest.rule import Elementwise, Rule
from steepest.rules.adamuon import AdaMuon
from steepest.rules.adamw import AdamW
from steepest.rules.dion import Dion
from steepest.rules.dion2 import Dion2
from steepest.rules.inverse_root import InverseRoot
from steepest.rules.lion import Lion
from steepest.rules.moso import Moso
from steepest.rules.muon import Muon
from steepest.rules.normuon import NorMuon
from steepest.rules.shampoo import KlShampoo, Shampoo
from steepest.rules.soap import KlSoap, Soap

RULES: dict[str, type[Rule] | type[Elementwise]] = {
    rule.name: rule
    for rule in (
        AdaMuon,
        AdamW,
        Dion,
        Dion2,
        InverseRoot,
        KlShampoo,
        KlSoap,
        Lion,
        Moso,
        Muon,
        NorMuon,
        Shampoo,
        Soap,
    )
}
"""Every rule by the name that a parameter group gives it."""


def respelled(options: dict[str, Any]) -> dict[str, Any]:
    """Stub: resolve the spellings of a group's options."""
    options = dict(options)

    def settle(spelling: str, value: Any, target: str, yields: tuple[Any, ...] = ()) -> None:
        if target in options and options[target] not in (value, *yields):
            raise ValueError(f"{spelling} contradicts {target}={options[target]!r}")
        options[target] = value

    if "refresh" in options:
        solver = options.pop("refresh")
        settle(f"refresh={solver!r}", solver, "solver", ("auto",))
    if options.pop("use_eigh", False):
        settle("use_eigh=True", "eigh", "solver", ("auto",))
    decay = options.pop("preconditioner_decay", None)
    if decay is not None:
        settle(f"preconditioner_decay={decay!r}", decay, "shampoo_beta")
    kl = options.pop("use_kl_shampoo", None)
    if kl and options.get("rule") in ("soap", "shampoo"):
        options["rule"] = f"kl_{options['rule']}"
    elif kl is False and str(options.get("rule")).startswith("kl_"):
        raise ValueError(f"use_kl_shampoo=False contradicts rule={options['rule']!r}")
    if options.pop("guards", True) is False:
        settle("guards=False", 0.0, "noise_floor")
        settle("guards=False", False, "momentum_floor")
        if options.get("rule") == "kl_soap":
            settle("guards=False", 0.0, "kl_floor")
    if options.get("noise_floor") == "auto":
        options["noise_floor"] = 1e-2
    return options
