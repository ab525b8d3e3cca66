"""The optimizers by name: thin, final classes, and one door to them and to torch.optim's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.dion import Dion, Dion2
from steepest.optimizers.lion import Lion
from steepest.optimizers.moso import MOSO
from steepest.optimizers.muon import AdaMuon, Muon, NorMuon
from steepest.optimizers.shampoo import KL_SHAMPOO_OPTIONS, KLShampoo, Shampoo
from steepest.optimizers.soap import REKLS, REKLS_OPTIONS, SOAP, soap_options
from steepest.optimizers.spelling import Params, spelled
from steepest.optimizers.torch_optim import TORCH
from steepest.recipes import unfold
from steepest.rule import nearest
from steepest.rules import RULES


@dataclass(frozen=True)
class Entry:
    """What a name stands for."""

    optimizer: Callable[..., Optimizer]
    """The class, or the class with options that the name stands for."""
    spell: Callable[[dict[str, Any]], dict[str, Any]]
    """From the class's keyword options to a parameter group's, with its ``rule``."""
    paper: str


def _entry(optimizer: Callable[..., Optimizer], rule: str, paper: str = "", **fixed: Any) -> Entry:
    return Entry(optimizer, lambda options: {"rule": rule} | options | fixed, paper or RULES[rule].paper)


KL_SOAP_OPTIONS: dict[str, Any] = {"use_kl_shampoo": True}

NAMES: dict[str, Entry] = {
    "soap": Entry(SOAP, soap_options, RULES["soap"].paper),
    "kl-soap": Entry(
        partial(SOAP, **KL_SOAP_OPTIONS),
        lambda options: soap_options(KL_SOAP_OPTIONS | options),
        "Lin et al., arXiv:2509.03378",
    ),
    "rekls": _entry(REKLS, "soap", paper="Emerging-Optimizers, 2025", **REKLS_OPTIONS),
    "moso": _entry(MOSO, "moso"),
    "shampoo": _entry(Shampoo, "shampoo"),
    "kl-shampoo": _entry(KLShampoo, "shampoo", paper="Lin et al., arXiv:2509.03378", **KL_SHAMPOO_OPTIONS),
    "muon": _entry(Muon, "muon"),
    "normuon": _entry(NorMuon, "normuon"),
    "adamuon": _entry(AdaMuon, "adamuon"),
    "dion": _entry(Dion, "dion"),
    "dion2": _entry(Dion2, "dion2"),
    "lion": _entry(Lion, "lion"),
}
"""Our optimizers by name. A rule without a class of its own goes by the name that it is registered under."""

ALIASES = {"soap-kl": "kl-soap", "shampoo-kl": "kl-shampoo"}
"""Other names for some. Case doesn't matter, nor do hyphens, underscores and blanks: see `canonical`."""


def create(name: str, params: Params, **options: Any) -> torch.optim.Optimizer:
    """An optimizer by name: ours, or any of torch.optim's, or one with a recipe's settings.

    Args:
        name: as in `NAMES`, or that of a class of torch.optim ("adamw", "nadam", "lbfgs", ..., and "torch.muon" where
            there is one of ours), in any spelling: "KL_SOAP" and "Adam-W" are known too. Or a recipe's ("soap/paper",
            see `steepest.recipe`), whose settings for matrices all parameters get.
        params: what to optimize.
        options: the optimizer's own; they go before a recipe's.

    Raises:
        ValueError: for an unknown name; it suggests the nearest.

    Example:
        >>> W = torch.nn.Parameter(torch.zeros(2, 3))
        >>> type(create("soap", [W], lr=1e-3)).__name__, type(create("nadam", [W], lr=1e-3)).__name__
        ('SOAP', 'NAdam')
        >>> create("saop", [W])
        Traceback (most recent call last):
        ValueError: name='saop': no such optimizer (did you mean 'soap'?)
        >>> create("muon/keller", [W], weight_decay=0.1).defaults["scale"]
        'original'
    """
    name, options = unfold(name, options)
    key = canonical(name)
    if key in NAMES:
        return NAMES[key].optimizer(params, **options)
    if key.removeprefix("torch.") in TORCH:
        return TORCH[key.removeprefix("torch.")](params, **options)
    if key in RULES:
        return Optimizer(params, key, **options)
    raise ValueError(f"name={name!r}: no such optimizer{nearest(key, [*NAMES, *TORCH, *RULES])}")


def group_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an optimizer or recipe, given by name, as a parameter group spells them; ``rule`` is among them.

    Raises:
        ValueError: for a name that is no rule; torch.optim's can't share an optimizer with ours, AdamW excepted.

    >>> group_options("kl-soap", {"lr": 0.1})
    {'rule': 'soap', 'use_kl_shampoo': True, 'lr': 0.1}
    >>> group_options("lion/paper", {"weight_decay": 0.3})
    {'rule': 'lion', 'lr': 0.0001, 'betas': (0.9, 0.99), 'weight_decay': 0.3}
    """
    name, options = unfold(name, options)
    key = canonical(name)
    if key in NAMES:
        return NAMES[key].spell(options)
    if key in RULES:
        return {"rule": key} | options
    raise ValueError(f"name={name!r}: no such rule{nearest(key, [*NAMES, *RULES])}")


def canonical(name: str) -> str:
    """A name as `NAMES`, torch.optim's classes (in lower case) and rules have it, if one of them is meant.

    >>> [canonical(name) for name in ("KL_SOAP", "soap-kl", "Adam-W", "inverse root", "torch.Muon", "xyz")]
    ['kl-soap', 'kl-soap', 'adamw', 'inverse_root', 'torch.muon', 'xyz']
    """
    names = [*NAMES, *TORCH, *RULES, *ALIASES, *(f"torch.{name}" for name in TORCH)]
    found = spelled(name, names) or name.lower()
    return ALIASES.get(found, found)
