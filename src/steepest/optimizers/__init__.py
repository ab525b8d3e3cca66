"""The optimizers: a final class for each with a typed signature, and their names beside those of torch.optim.

Each class passes its arguments on to `steepest.engine.optimizer.Optimizer`, which checks them and does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from steepest.engine.optimizer import Optimizer
from steepest.newton.lbfgs import LBFGS
from steepest.newton.natural_gradient import NaturalGradient
from steepest.newton.newton_cg import NewtonCG
from steepest.optimizers.lion import Lion
from steepest.optimizers.muon import AdaMuon, Dion, Dion2, Muon, NorMuon
from steepest.optimizers.shampoo import KLShampoo, Shampoo
from steepest.optimizers.shared import Params
from steepest.optimizers.soap import MOSO, REKLS, SOAP, InverseRootSOAP
from steepest.optimizers.torch_optim import TORCH
from steepest.recipes import unfold
from steepest.rule import nearest
from steepest.rules import RULES
from steepest.rules.aliases import resolve


@dataclass(frozen=True)
class Entry:
    """An optimizer of this package, as a class and as a rule with options."""

    optimizer: Callable[..., Optimizer]
    rule: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options in which a group of this name differs from the defaults of its rule."""
    source: str = ""

    @property
    def paper(self) -> str:
        """Where the optimizer was published."""
        return self.source or RULES[self.rule].paper


def _kl_soap(params: Params, **options: Any) -> SOAP:
    return SOAP(params, use_kl_shampoo=True, **options)


def _without_model(rule: str) -> Callable[..., Optimizer]:
    def refuse(params: Params, **options: Any) -> Optimizer:
        raise TypeError(
            f"{rule} is fed by what is captured in a model's layers, which parameters alone don't have: use "
            f"steepest.{rule.upper()}(model) or steepest.for_model(model, {rule!r})"
        )

    return refuse


NAMES: dict[str, Entry] = {
    "soap": Entry(SOAP, "soap"),
    "kl-soap": Entry(_kl_soap, "kl_soap"),
    "rekls": Entry(REKLS, "kl_soap", {"solver": "eigh", "precondition_frequency": 1}, "Emerging-Optimizers, 2025"),
    "inverse-root-soap": Entry(
        InverseRootSOAP,
        "inverse_root",
        {"betas": (0.9, 0.999), "weight_decay": 0.0, "precondition_frequency": 10, "max_precond_dim": 1024},
    ),
    "moso": Entry(MOSO, "moso"),
    "shampoo": Entry(Shampoo, "shampoo"),
    "kl-shampoo": Entry(KLShampoo, "kl_shampoo", {"exponent": -0.5}),
    "kfac": Entry(_without_model("kfac"), "kfac", {"weight_decay": 0.0}),
    "ekfac": Entry(_without_model("ekfac"), "ekfac", {"weight_decay": 0.0}),
    "muon": Entry(Muon, "muon"),
    "normuon": Entry(NorMuon, "normuon"),
    "adamuon": Entry(AdaMuon, "adamuon"),
    "dion": Entry(Dion, "dion"),
    "dion2": Entry(Dion2, "dion2"),
    "lion": Entry(Lion, "lion"),
}
"""The optimizers of this package by name. A rule without a class of its own goes by the name of the rule."""


@dataclass(frozen=True)
class ByClosure:
    """An optimizer of this package that evaluates the loss itself, and moves all parameters as one vector."""

    optimizer: Callable[..., torch.optim.Optimizer]
    paper: str


BY_CLOSURE: dict[str, ByClosure] = {
    "lbfgs": ByClosure(LBFGS, "Liu and Nocedal, Math. Program. 45 (1989) 503"),
    "newton-cg": ByClosure(NewtonCG, "Steihaug, SIAM J. Numer. Anal. 20 (1983) 626"),
    "natural-gradient": ByClosure(NaturalGradient, "Amari, Neural Comput. 10 (1998) 251"),
}
"""Those by name. They have no rules, so they can't be in one optimizer with others, or in `steepest.for_model`."""

ALIASES = {"soap-kl": "kl-soap", "shampoo-kl": "kl-shampoo"}
"""Other names of some optimizers. Case, hyphens, underscores and blanks never matter: see `canonical`."""


def create(name: str, params: Params, **options: Any) -> torch.optim.Optimizer:
    """Build an optimizer by name: one of this package, one of torch.optim's, or one with a recipe's settings.

    Args:
        name: A name of `NAMES` or `BY_CLOSURE`; that of a class of torch.optim ("adamw", "nadam", ..., and "torch.muon"
            or "torch.lbfgs" where this package has one of the same name); or that of a recipe (`steepest.recipe`),
            whose settings for matrices hold for all parameters. Spelling doesn't matter: "KL_SOAP" and "Adam-W" are
            known too.
        params: Tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        options: The arguments of the optimizer's class; they take precedence over a recipe's.

    Raises:
        ValueError: If the name or an option is unknown; the message suggests the nearest.

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
    if key in BY_CLOSURE:
        return BY_CLOSURE[key].optimizer(params, **options)
    if key.removeprefix("torch.") in TORCH:
        return TORCH[key.removeprefix("torch.")](params, **options)
    if key in RULES:
        return Optimizer(params, key, **options)
    if spelled(name, ["gauss-newton"]):
        raise ValueError(
            f"name={name!r}: evaluates residuals with the model, so parameters are not enough: use "
            "steepest.GaussNewton(model)"
        )
    raise ValueError(f"name={name!r}: no such optimizer{nearest(key, [*NAMES, *BY_CLOSURE, *TORCH, *RULES])}")


def group_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group, ``rule`` among them, for an optimizer or a recipe and its options.

    Raises:
        ValueError: If the name is not that of a rule: torch.optim's optimizers, AdamW excepted, and those of
            `BY_CLOSURE` can't share an optimizer with others.

    >>> group_options("kl-soap", {"lr": 0.1})
    {'rule': 'kl_soap', 'lr': 0.1}
    >>> group_options("lion/paper", {"weight_decay": 0.3})
    {'rule': 'lion', 'lr': 0.0001, 'betas': (0.9, 0.99), 'weight_decay': 0.3}
    """
    name, options = unfold(name, options)
    key = canonical(name)
    if key in NAMES:
        return resolve({"rule": NAMES[key].rule, **NAMES[key].settings, **options})
    if key in RULES:
        return resolve({"rule": key, **options})
    if key in BY_CLOSURE:
        raise ValueError(
            f"name={name!r}: moves all parameters as one vector, so it has no rule for some of them, and nothing to "
            f"route: use steepest.create({key!r}, model.parameters())"
        )
    raise ValueError(f"name={name!r}: no such rule{nearest(key, [*NAMES, *RULES])}")


def canonical(name: str) -> str:
    """Return a name as `NAMES`, torch.optim (in lower case) or `RULES` spells it, or in lower case if none has it.

    >>> [canonical(name) for name in ("KL_SOAP", "soap-kl", "Adam-W", "inverse root", "torch.Muon", "xyz")]
    ['kl-soap', 'kl-soap', 'adamw', 'inverse_root', 'torch.muon', 'xyz']
    """
    names = [*NAMES, *BY_CLOSURE, *TORCH, *RULES, *ALIASES, *(f"torch.{name}" for name in TORCH)]
    found = spelled(name, names) or name.lower()
    return ALIASES.get(found, found)


def spelled(name: str, known: Iterable[str]) -> str | None:
    """Return the first of the ``known`` names that differs from ``name`` in case, hyphens, underscores or blanks only.

    >>> spelled("KL_Soap", ["soap", "kl-soap"]), spelled("soup", ["soap"])
    ('kl-soap', None)
    """

    def bare(name: str) -> str:
        return name.lower().translate(str.maketrans("", "", "-_ "))

    return next((other for other in known if bare(other) == bare(name)), None)
