"""The entrants of ``steepest bench``: optimizers of this library, each with its rule and the family of its peers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from steepest.engine.optimizer import Optimizer
from steepest.lab.plan.models import rule_of
from steepest.lab.shared.contenders import parse_contenders, split
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.presets import PRESETS
from steepest.linalg.polar import TABLES
from steepest.optimizers import group_options
from steepest.rule import Elementwise, Refreshing, Rule
from steepest.rules.parts.newton_schulz import NewtonSchulz

DEFAULT = "soap-f10, soap-f10(stagger=True), soap-f1, kl-soap-f10, moso, muon, adamw"
"""The entrants if none are named."""

Make = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Family:
    """Optimizers that do the same work. Only these are compared."""

    kind: str
    """The algorithm: soap, kl-soap, muon, ..."""
    frequency: int = 0
    """The number of steps from one refresh to the next; 0 if there is none."""
    max_precond_dim: int = 0
    """The longest side that has a factor; 0 if that limits no matrix at hand."""

    def __str__(self) -> str:
        """Return the family in words.

        >>> str(Family("soap", 10, 256)), str(Family("muon"))
        ('soap, f = 10, sides to 256', 'muon')
        """
        every = f", f = {self.frequency}" if self.frequency else ""
        return self.kind + every + (f", sides to {self.max_precond_dim}" if self.max_precond_dim else "")


@dataclass(frozen=True)
class Entrant:
    """An optimizer that takes part: how it is made, and what it is compared with."""

    label: str
    family: Family
    rule: Rule | Elementwise
    """The rule whose work its floor counts. A peer has the rule of ours in its family."""
    make: Make
    settings: Mapping[str, Any]
    """The options that it is made with."""
    ours: bool = True
    scope: Callable[[], AbstractContextManager[object]] = nullcontext
    """A context around its construction and each of its steps, for settings that its library makes globally."""


def parse_entrants(text: str, longest: int) -> list[Entrant]:
    """Parse a list as `steepest.lab.shared.contenders` does; ``-f10`` behind a name sets its frequency.

    Args:
        text: the list.
        longest: the longest side of any matrix at hand.

    Raises:
        BadInput: for an unknown name or option, or one out of range.

    >>> [(e.label, str(e.family)) for e in parse_entrants("kl-soap-f5, soap(max_precond_dim=64), muon", longest=256)]
    [('kl-soap-f5', 'kl-soap, f = 5'), ('soap(max_precond_dim=64)', 'soap, f = 1, sides to 64'), ('muon', 'muon')]
    """
    labels = [part.strip() for part in split(text) if part.strip()]
    contenders = parse_contenders(", ".join(map(_with_frequency, labels)))
    return [_entrant(label, c.rule, c.options, longest) for label, c in zip(labels, contenders, strict=True)]


def family_of(rule: Rule | Elementwise, longest: int) -> Family:
    """Return the family of a rule, where no matrix at hand has a longer side than ``longest``."""
    if isinstance(rule, Elementwise):
        return Family(rule.name)
    kind = rule.name.replace("_", "-") + (" by eigh" if getattr(rule, "solver", "") == "eigh" else "")
    if isinstance(rule, NewtonSchulz):
        steps = TABLES[rule.ns].steps if rule.ns in TABLES else ()
        usual = len(steps) == 5 and all(c for _, _, c in steps)  # five quintic steps, as in every library's Muon
        kind += "" if usual else f" by {rule.ns}"
    if not isinstance(rule, Refreshing):
        return Family(kind)
    return Family(kind, rule.last_period, rule.max_precond_dim if rule.max_precond_dim < longest else 0)


def _entrant(label: str, name: str, options: Mapping[str, Any], longest: int) -> Entrant:
    rule = rule_of(name, options)
    settings = group_options(name, dict(options))

    def make(params: Any) -> torch.optim.Optimizer:
        return Optimizer(params, **settings)

    try:
        make([torch.nn.Parameter(torch.zeros(2, 2))])
    except (TypeError, ValueError) as error:
        raise BadInput(f"optimizer {label}: {one_line(error)}") from error
    return Entrant(label, family_of(rule, longest), rule, make, settings)


def _with_frequency(spec: str) -> str:
    """Rewrite ``kl-soap-f5(lr=1)`` as ``kl-soap(precondition_frequency=5, lr=1)``. Names of presets stay.

    >>> _with_frequency("kl-soap-f5(lr=1)"), _with_frequency("soap-f10"), _with_frequency("soap-f1")
    ('kl-soap(precondition_frequency=5, lr=1)', 'soap-f10', 'soap(precondition_frequency=1)')
    """
    found = re.fullmatch(r"([^(]+)-f(\d+)\s*(?:\((.*)\))?", spec, re.DOTALL)
    if found is None or f"{found[1]}-f{found[2]}".lower() in PRESETS:
        return spec
    name, frequency, options = found.groups()
    if "precondition_frequency" in (options or ""):
        raise BadInput(f"optimizer {spec}: names its frequency twice")
    return f"{name}(precondition_frequency={frequency}{', ' + options if options else ''})"
