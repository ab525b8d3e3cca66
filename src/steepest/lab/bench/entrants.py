"""Who takes part in ``steepest bench``: optimizers of ours, each with the work that it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from steepest.engine.optimizer import Optimizer
from steepest.lab.plan.models import rule_of
from steepest.lab.shared.contenders import Contender, parse_contenders, split
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.presets import PRESETS
from steepest.linalg.polar import TABLES
from steepest.optimizers import group_options
from steepest.rule import Elementwise, Refreshing, Rule
from steepest.rules.parts.newton_schulz import NewtonSchulz

DEFAULT = "soap-f10, soap-f10(stagger=True), soap-f1, kl-soap-f10, moso, muon, adamw"
"""Who runs when nobody is named."""

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Family:
    """Optimizers that do the same work: only these are compared."""

    kind: str
    """soap, kl-soap, muon, ..."""
    frequency: int = 0
    """Steps from refresh to refresh; 0 where there is none."""
    max_precond_dim: int = 0
    """Longer sides have no factor; 0 where a rule has no such limit, or the limit cuts nothing at hand."""

    def __str__(self) -> str:
        """For people.

        >>> str(Family("soap", 10, 256)), str(Family("muon"))
        ('soap, f = 10, sides to 256', 'muon')
        """
        every = f", f = {self.frequency}" if self.frequency else ""
        return self.kind + every + (f", sides to {self.max_precond_dim}" if self.max_precond_dim else "")


@dataclass(frozen=True)
class Entrant:
    """One that steps."""

    label: str
    family: Family
    rule: Rule | Elementwise
    """Whose work its floor counts: of a peer, that of ours in its family."""
    make: Make
    settings: Mapping[str, Any]
    """By which it was made."""
    ours: bool = True
    scope: Callable[[], AbstractContextManager[object]] = nullcontext
    """Around its construction and each of its steps: what a library would otherwise set for everybody."""


def entrants(text: str, longest: int) -> list[Entrant]:
    """Ours, from a list as `steepest.lab.shared.contenders` reads it; ``-f10`` behind a name sets its frequency.

    Args:
        text: the list.
        longest: the longest side of any matrix at hand.

    Raises:
        BadInput: for an unknown name or option, or one out of range.

    >>> [(e.label, str(e.family)) for e in entrants("kl-soap-f5, soap(max_precond_dim=64), muon", longest=256)]
    [('kl-soap-f5', 'kl-soap, f = 5'), ('soap(max_precond_dim=64)', 'soap, f = 1, sides to 64'), ('muon', 'muon')]
    """
    found = parse_contenders(", ".join(map(_with_frequency, split(text))))
    labels = iter([part.strip() for part in split(text) if part.strip()])
    return [_entrant(replace(contender, label=label), longest) for contender, label in zip(found, labels, strict=True)]


def family_of(rule: Rule | Elementwise, longest: int) -> Family:
    """Whom a rule is compared with."""
    if isinstance(rule, Elementwise):
        return Family(rule.name)
    kind = rule.name.replace("_", "-") + (" by eigh" if getattr(rule, "solver", "") == "eigh" else "")
    if isinstance(rule, NewtonSchulz) and not _usual(rule.ns):
        kind += f" by {rule.ns}"
    if not isinstance(rule, Refreshing):
        return Family(kind)
    return Family(kind, rule.last_period, rule.max_precond_dim if rule.max_precond_dim < longest else 0)


def _usual(ns: str) -> bool:
    """Whether it is five quintic steps, as in every Muon.

    >>> _usual("keller"), _usual("polar_express_5"), _usual("cubic5"), _usual("exact")
    (True, True, False, False)
    """
    return ns in TABLES and len(TABLES[ns].steps) == 5 and all(c for _, _, c in TABLES[ns].steps)


def _entrant(contender: Contender, longest: int) -> Entrant:
    rule = rule_of(contender.rule, contender.options)
    settings = group_options(contender.rule, dict(contender.options))

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return Optimizer(params, **settings)

    try:
        make([torch.nn.Parameter(torch.zeros(2, 2))])
    except (TypeError, ValueError) as error:
        raise BadInput(f"optimizer {contender.label}: {one_line(error)}") from error
    return Entrant(contender.label, family_of(rule, longest), rule, make, settings)


def _with_frequency(spec: str) -> str:
    """``kl-soap-f5(lr=1)`` as ``kl-soap(precondition_frequency=5,lr=1)``; presets keep their names.

    >>> _with_frequency(" kl-soap-f5(lr=1)"), _with_frequency("soap-f10"), _with_frequency("soap-f1")
    ('kl-soap(precondition_frequency=5, lr=1)', 'soap-f10', 'soap(precondition_frequency=1)')
    """
    spec = spec.strip()
    found = re.fullmatch(r"([^(]+)-f(\d+)\s*(?:\((.*)\))?", spec, re.DOTALL)
    if found is None or f"{found[1]}-f{found[2]}".lower() in PRESETS:
        return spec
    name, frequency, options = found.groups()
    if "precondition_frequency" in (options or ""):
        raise BadInput(f"optimizer {spec}: names its frequency twice")
    return f"{name}(precondition_frequency={frequency}{', ' + options if options else ''})"
