"""Contenders: optimizers with all their settings, read from text such as the command line's.

    adamw, soap(precondition_frequency=5, lr=1e-2), moso

A name stands for a preset, for a recipe (``soap/paper``, see `steepest.recipe`), or for an optimizer of another library
(``pytorch_optimizer.soap``, see `steepest.lab.shared.peers`); options in brackets replace its settings. ``warmup`` is
the share of steps in which the learning rate rises, ``elementwise={...}`` are AdamW's options for parameters that are
not hidden matrices; all other options are the rule's, or those of the other library's constructor.
"""

from __future__ import annotations

import ast
import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import steepest
from steepest.engine.group import option_defaults
from steepest.lab.shared.calls import parse_call, spell_call
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.peers import RACING, is_installed, peer_optimizer, version_of
from steepest.lab.shared.presets import ELEMENTWISE, PLAIN, PRESETS, SECOND_ORDER, WARMUP, Preset
from steepest.newton.gauss_newton import GaussNewton
from steepest.newton.lbfgs import LBFGS
from steepest.newton.natural_gradient import NaturalGradient
from steepest.newton.newton_cg import NewtonCG
from steepest.optimizers import ALIASES, spelled
from steepest.recipes import RECIPES, is_recipe


@dataclass(frozen=True)
class Contender:
    """An optimizer with all its settings."""

    label: str
    rule: str
    options: Mapping[str, Any]
    elementwise: Mapping[str, Any] | None
    """AdamW's options for parameters that are not hidden matrices; None if ``options`` serve all parameters."""
    warmup: float
    rates: tuple[float, ...] = ()
    """Learning rates that a sweep tries."""
    provenance: str = ""
    """Where the settings come from."""
    variant: str = ""
    """The point of a grid that this is, in words."""

    def __str__(self) -> str:
        return f"{self.label} {self.variant or (f'lr {self.lr:g}' if self.lr else '')}".rstrip()

    @property
    def lr(self) -> float:
        """Highest learning rate of the hidden matrices; 0 where the optimizer has none."""
        return float(self.options.get("lr", 0.0))

    @property
    def rate(self) -> str:
        """The learning rate in words."""
        return f"{self.lr:g}" if self.lr else "–"

    def settings(self) -> dict[str, Any]:
        """Return all that decides how it trains, without its label."""
        rest = self.options if self.elementwise is None else self.elementwise
        found = {"rule": self.rule, "options": dict(self.options), "elementwise": dict(rest), "warmup": self.warmup}
        return found | ({"version": version_of(self.rule)} if self.rule in RACING else {})

    def value(self, name: str) -> Any:
        """Return the value of a setting: an option of the rule, ``warmup`` or ``elementwise``."""
        return getattr(self, name) if name in ("warmup", "elementwise") else self.options.get(name)

    def varied(self, **changes: Any) -> Contender:
        """Return the contender with other settings, by the names that `value` knows."""
        warmup = changes.pop("warmup", self.warmup)
        elementwise = self.elementwise
        if "elementwise" in changes:
            elementwise = {**(elementwise or ELEMENTWISE), **changes.pop("elementwise")}
        return replace(self, warmup=warmup, elementwise=elementwise, options={**self.options, **changes})

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return the optimizer for a model."""
        if self.rule in FLAT:
            return FLAT[self.rule](model, **self.options)
        if self.rule in RACING:
            return peer_optimizer(self.rule, model, self.options, self.elementwise or {})
        return steepest.for_model(model, self.rule, elementwise=self.elementwise, **self.options)

    def check(self, model: nn.Module) -> None:
        """Raise `BadInput` if the optimizer for the model can't be constructed."""
        try:
            if not (isinstance(self.warmup, int | float) and 0 <= self.warmup <= 1):
                raise ValueError(f"warmup={self.warmup!r}: must be in [0, 1]")
            self.optimizer(model)
        except (TypeError, ValueError) as error:
            raise BadInput(f"optimizer {self.label}: {one_line(error)}") from error


FLAT: Mapping[str, Callable[..., Optimizer]] = {
    "gauss-newton": GaussNewton,
    "lbfgs": lambda model, **options: LBFGS(model.parameters(), **options),
    "natural-gradient": lambda model, **options: NaturalGradient(model.parameters(), **options),
    "newton-cg": lambda model, **options: NewtonCG(model.parameters(), **options),
    "sgd": lambda model, **options: torch.optim.SGD(model.parameters(), **options),
    "torch.lbfgs": lambda model, **options: torch.optim.LBFGS(model.parameters(), **options),
}
"""Optimizers of all parameters, which `steepest.for_model` does not route."""


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that routing gives to a matrix rule, by name."""
    parameters = dict(model.named_parameters())
    routing = steepest.route(model)
    return {row.name: parameters[row.name] for row in routing if row.rule == routing.rule}


def parse_contenders(text: str) -> list[Contender]:
    """Parse a list of contenders, such as ``adamw, soap(lr=1e-2, betas=(.95, .95)), moso``.

    >>> [c.label for c in parse_contenders("adamw, soap( lr=1e-2 )")]
    ['adamw', 'soap(lr=0.01)']
    """
    found = [_parse(part.strip()) for part in split(text) if part.strip()]
    if not found:
        raise BadInput("no optimizer is named")
    labels = [contender.label for contender in found]
    for label in labels:
        if labels.count(label) > 1:
            raise BadInput(f"optimizer {label} is named twice")
    return found


def parse_sweep(text: str) -> dict[str, list[Any]]:
    """Parse one axis of a grid: an option and the values to try.

    >>> parse_sweep("lr=5e-3, 1e-2")
    {'lr': [0.005, 0.01]}
    >>> parse_sweep("betas=(.8, .95), (.9, .95)")
    {'betas': [(0.8, 0.95), (0.9, 0.95)]}
    """
    name, equals, values = text.partition("=")
    try:
        found = list(ast.literal_eval(f"[{values}]"))
        if not equals or not name.strip().isidentifier() or not found:
            raise ValueError
    except (ValueError, SyntaxError):
        raise BadInput(f'sweep "{text}": write it as "lr=5e-3, 1e-2", an option and its values') from None
    return {name.strip(): found}


def grid(contender: Contender, axes: Mapping[str, Sequence[Any]]) -> list[Contender]:
    """Return the contender with every combination of the values along the axes.

    >>> [c.lr for c in grid(preset("adamw"), {"lr": [0.1, 0.2]})]
    [0.1, 0.2]
    """
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    provenance = f"the best of {len(points)} settings in this race; the rest: {contender.provenance}"
    variants = [", ".join(f"{name} {value}" for name, value in point.items()) for point in points]
    contender = replace(contender, provenance=provenance)
    return [replace(contender.varied(**p), variant=v) for p, v in zip(points, variants, strict=True)]


def preset(name: str) -> Contender:
    """Return the contender of this name, in any spelling, with the settings of its preset or recipe.

    >>> preset("KL_SOAP").label
    'kl-soap'
    """
    if is_recipe(name):
        return _from_recipe(name)
    known = {**PRESETS, **PLAIN, **SECOND_ORDER, **{peer: PRESETS[ours] for peer, (_, ours) in RACING.items()}}
    name = spelled(name, [*known, *ALIASES]) or name
    name = ALIASES.get(name, name)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise BadInput(f"unknown optimizer {name!r}; {hint}")
    p = known[name]
    if name in RACING:
        return _from_peer(name, p)
    return Contender(name, p.rule, p.options, p.elementwise, p.warmup, p.rates, p.provenance)


def _from_peer(name: str, ours: Preset) -> Contender:
    """Return the contender of another library, with the settings of our preset in that library's terms.

    Raises:
        BadInput: if the library is not installed.
    """
    peer, of = RACING[name]
    if not is_installed(name):
        raise BadInput(f'optimizer {name}: {peer.package} is not installed; pip install "steepest[peers]"')
    options = peer.settings(option_defaults(ours.rule) | dict(ours.options))
    provenance = f"the settings of {of}: {ours.provenance}"
    return Contender(name, name, options, ours.elementwise, ours.warmup, ours.rates, provenance)


def _from_recipe(name: str) -> Contender:
    """Return the contender of a recipe, with the preset's learning rate if the recipe has none.

    >>> contender = _from_recipe("soap/paper")
    >>> contender.rule, contender.lr, contender.rates
    ('soap', 0.003, (0.0015, 0.003, 0.006, 0.012))
    """
    try:
        r = steepest.recipe(name)
    except ValueError as error:
        raise BadInput(f"{one_line(error)}; there are {', '.join(RECIPES)}") from error
    provenance, options = f"{r.source} ({r.date})", dict(r.options)
    if "lr" in options:
        rates = tuple(options["lr"] * factor for factor in (0.5, 1, 2, 4))
    else:
        options, rates = {"lr": PRESETS[r.optimizer].options["lr"], **options}, PRESETS[r.optimizer].rates
        provenance += f"; it names no learning rate, so lr is the preset's of {r.optimizer}"
    return Contender(r.name, r.optimizer, options, r.elementwise, WARMUP, rates, provenance)


def split(text: str) -> Iterator[str]:
    """Split ``text`` at its commas, except those inside brackets.

    >>> list(split("a, b(c, d), e"))
    ['a', ' b(c, d)', ' e']
    """
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def _parse(spec: str) -> Contender:
    """Parse one contender: a name, and options in brackets if any."""
    name = spec.partition("(")[0].strip()
    contender = preset(name)
    try:
        _, changes = parse_call(spec)
        if not isinstance(changes.get("elementwise", {}), dict):
            raise ValueError
    except ValueError:
        example = f"{name}(lr=1e-2, betas=(0.9, 0.95))"
        raise BadInput(f"optimizer {spec!r}: options are names and plain values, like {example}") from None
    if not changes:
        return contender
    provenance = f"options from the command line; otherwise: {contender.provenance}"
    rates = (changes["lr"],) if "lr" in changes else contender.rates  # a rate that was named is the only one to try
    return replace(contender.varied(**changes), label=spell_call(name, changes), rates=rates, provenance=provenance)
