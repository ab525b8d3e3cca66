"""The rules, one algorithm a file, and the registry by which groups name them."""

from steepest.rule import Elementwise, Rule
from steepest.rules.adamuon import AdaMuon
from steepest.rules.adamw import AdamW
from steepest.rules.dion import Dion
from steepest.rules.dion2 import Dion2
from steepest.rules.ekfac import Ekfac
from steepest.rules.inverse_root import InverseRoot
from steepest.rules.kfac import Kfac
from steepest.rules.kl_shampoo import KLShampoo
from steepest.rules.kl_soap import KLSoap
from steepest.rules.lion import Lion
from steepest.rules.moso import Moso
from steepest.rules.muon import Muon
from steepest.rules.normuon import NorMuon
from steepest.rules.shampoo import Shampoo
from steepest.rules.soap import Soap

RULES: dict[str, type[Rule] | type[Elementwise]] = {
    rule.name: rule
    for rule in (
        AdaMuon,
        AdamW,
        Dion,
        Dion2,
        Ekfac,
        InverseRoot,
        Kfac,
        KLShampoo,
        KLSoap,
        Lion,
        Moso,
        Muon,
        NorMuon,
        Shampoo,
        Soap,
    )
}
"""Every rule by the name that a parameter group gives it."""
