"""Contenders: an optimizer with all its settings, read from a command line, and how it becomes an optimizer.

    adamw, soap(precondition_frequency=5, lr=1e-2), moso

A name stands for its preset, or for a recipe (``soap/paper``, see `steepest.recipe`); options in brackets replace
those. ``warmup`` is the share of steps in which the learning rate rises, ``elementwise={...}`` are AdamW's options for
what is no hidden matrix; all others are the rule's. Nothing else in the lab knows how an optimizer is made.
"""

from __future__ import annotations

import ast
import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

import steepest
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.presets import ELEMENTWISE, PRESETS, WARMUP
from steepest.optimizers import ALIASES
from steepest.optimizers.spelling import spelled
from steepest.recipes import RECIPES, is_recipe


@dataclass(frozen=True)
class Contender:
    """An optimizer with all its settings."""

    label: str
    rule: str
    options: Mapping[str, Any]
    elementwise: Mapping[str, Any] | None
    """None: its own options serve all parameters."""
    warmup: float
    rates: tuple[float, ...] = ()
    """What a sweep tries for ``lr``."""
    provenance: str = ""
    variant: str = ""
    """Which point of a grid it is, for people."""

    def __str__(self) -> str:
        return f"{self.label} {self.variant or f'lr {self.lr:g}'}"

    @property
    def lr(self) -> float:
        """Learning rate of the hidden matrices, at its highest."""
        return float(self.options["lr"])

    def settings(self) -> dict[str, Any]:
        """All that decides how it trains; its label doesn't."""
        rest = self.options if self.elementwise is None else self.elementwise
        return {"rule": self.rule, "options": dict(self.options), "elementwise": dict(rest), "warmup": self.warmup}

    def value(self, name: str) -> Any:
        """What a setting is: a rule's option, ``warmup`` or ``elementwise``."""
        return getattr(self, name) if name in ("warmup", "elementwise") else self.options.get(name)

    def varied(self, **changes: Any) -> Contender:
        """Itself with other settings, by the names that `value` knows."""
        warmup = changes.pop("warmup", self.warmup)
        elementwise = self.elementwise
        if "elementwise" in changes:
            elementwise = {**(elementwise or ELEMENTWISE), **changes.pop("elementwise")}
        return replace(self, warmup=warmup, elementwise=elementwise, options={**self.options, **changes})

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer that trains ``model``."""
        return steepest.for_model(model, self.rule, elementwise=self.elementwise, **self.options)

    def check(self, model: nn.Module) -> None:
        """Raise BadInput unless its optimizer can be made."""
        try:
            if not (isinstance(self.warmup, int | float) and 0 <= self.warmup <= 1):
                raise ValueError(f"warmup={self.warmup!r}: must be in [0, 1]")
            self.optimizer(model)
        except (TypeError, ValueError) as error:
            raise BadInput(f"optimizer {self.label}: {one_line(error)}") from error


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a matrix rule gets, by name."""
    parameters = dict(model.named_parameters())
    routing = steepest.route(model)
    return {row.name: parameters[row.name] for row in routing if row.rule == routing.rule}


def routing_table(model: nn.Module) -> str:
    """Which parameter goes where, and why."""
    return str(steepest.route(model))


def parse_contenders(text: str) -> list[Contender]:
    """Contenders from a list such as ``adamw, soap(lr=1e-2, betas=(.95, .95)), moso``.

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
    """One axis of a grid: an option and the values to try.

    >>> parse_sweep("lr=5e-3, 1e-2")
    {'lr': [0.005, 0.01]}
    >>> parse_sweep("betas=(.8, .95), (.9, .95)")
    {'betas': [(0.8, 0.95), (0.9, 0.95)]}
    """
    name, equals, values = text.partition("=")
    try:
        if not equals or not name.strip().isidentifier():
            raise ValueError
        found = [ast.literal_eval(value.strip()) for value in split(values) if value.strip()]
    except (ValueError, SyntaxError):
        raise BadInput(f'sweep "{text}": write it as "lr=5e-3, 1e-2", an option and its values') from None
    if not found:
        raise BadInput(f'sweep "{text}": names no value')
    return {name.strip(): found}


def grid(contender: Contender, axes: Mapping[str, Sequence[Any]]) -> list[Contender]:
    """Every combination of the values along the axes, with the contender's own label on each.

    >>> [c.lr for c in grid(preset("adamw"), {"lr": [0.1, 0.2]})]
    [0.1, 0.2]
    """
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    provenance = f"the best of {len(points)} settings in this race; the rest: {contender.provenance}"
    return [
        replace(
            contender.varied(**point),
            variant=", ".join(f"{name} {value}" for name, value in point.items()),
            provenance=provenance,
        )
        for point in points
    ]


def preset(name: str) -> Contender:
    """The contender of this name, in any spelling, as it is set out of the box, or as a recipe sets it.

    >>> preset("KL_SOAP").label
    'kl-soap'
    """
    if is_recipe(name):
        return _from_recipe(name)
    name = spelled(name, [*PRESETS, *ALIASES]) or name
    name = ALIASES.get(name, name)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PRESETS)}"
        raise BadInput(f"unknown optimizer {name!r}; {hint}")
    p = PRESETS[name]
    return Contender(name, p.rule, p.options, p.elementwise, p.warmup, p.rates, p.provenance)


def _from_recipe(name: str) -> Contender:
    """A recipe's settings; where it has no learning rate, the preset's.

    >>> contender = _from_recipe("soap/paper")
    >>> contender.rule, contender.lr, contender.rates
    ('soap', 0.003, (0.0015, 0.003, 0.006, 0.012))
    """
    try:
        r = steepest.recipe(name)
    except ValueError as error:
        raise BadInput(f"{one_line(error)}; there are {', '.join(RECIPES)}") from error
    provenance = f"{r.source} ({r.date})"
    if "lr" in r.options:
        options, lr = dict(r.options), r.options["lr"]
        rates: tuple[float, ...] = (lr / 2, lr, 2 * lr, 4 * lr)
    else:
        own = PRESETS[r.optimizer]
        options, rates = {"lr": own.options["lr"], **r.options}, own.rates
        provenance += f"; it names no learning rate, so lr is the preset's of {r.optimizer}"
    return Contender(r.name, r.optimizer, options, r.elementwise, WARMUP, rates, provenance)


def split(text: str) -> Iterator[str]:
    """``text`` at its commas, but not at those inside brackets.

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
    """One contender: a name, and options in brackets if any."""
    name, bracket, _ = spec.partition("(")
    contender = preset(name.strip())
    if not bracket:
        return contender
    try:
        call = ast.parse("options" + spec[len(name) :], mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError
        changes = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
        if not isinstance(changes.get("elementwise", {}), dict):
            raise ValueError
    except (ValueError, SyntaxError):
        example = f"{name}(lr=1e-2, betas=(0.9, 0.95))"
        raise BadInput(f"optimizer {spec!r}: options are names and plain values, like {example}") from None
    if not changes:
        return contender
    label = f"{name.strip()}({', '.join(f'{key}={value!r}' for key, value in changes.items())})"
    provenance = f"options from the command line; otherwise: {contender.provenance}"
    rates = (changes["lr"],) if "lr" in changes else contender.rates  # whoever names a rate doesn't want others tried
    return replace(contender.varied(**changes), label=label, rates=rates, provenance=provenance)
