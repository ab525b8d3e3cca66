"""Where in the state of a rule those things belong that another optimizer knew of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steepest.adopting.dialects import Average, Feedback, Found, InBasis, Moments
from steepest.adopting.saved import NoCounterpart
from steepest.rule import State
from steepest.rules import RULES
from steepest.rules.soap import AdamInBasis
from steepest.view import View

Values = dict[str, Tensor | int]
"""New values of entries of a parameter's state."""

MOMENTUM = {
    "adamuon": "momentum_buffer",
    "lion": "exp_avg",
    "moso": "momentum_buffer",
    "muon": "momentum_buffer",
    "normuon": "momentum_buffer",
}
"""The entry of each rule that is a plain average of gradients."""
NOUNS = {
    Average: "a momentum",
    Moments: "Adam's moments, which stand in no basis",
    InBasis: "moments that stand in SOAP's bases",
    Feedback: "Dion's momentum, which is no average",
}


def place(found: Found, p: Tensor, group: Mapping[str, Any], here: State) -> Values:
    """Return new values for entries of a parameter's state; the entries that are not among them start fresh.

    Args:
        found: what the other optimizer knew of the parameter.
        p: the parameter.
        group: its group here.
        here: its state here.

    Raises:
        NoCounterpart: if the rule here can't use it.
    """
    name, rule = group["rule"], RULES[group["rule"]].from_group(group)
    view = View.of(p, group) if "merge_dims" in group else None
    if getattr(rule, "moment_dtype", "float32") != "float32":
        raise NoCounterpart("moments in 8 bits can't be taken over: adopt with moment_dtype='float32'")
    if name == "adamw" and isinstance(found, Moments):
        values: Values = {"step": found.updates, "exp_avg": found.momentum, "exp_avg_sq": found.squares}
        return values | ({"max_exp_avg_sq": found.largest} if group["amsgrad"] and found.largest is not None else {})
    if isinstance(rule, AdamInBasis) and isinstance(found, Moments) and not any(key.startswith("Q_") for key in here):
        moments = _seen("exp_avg", found.momentum, view) | _seen("exp_avg_sq", found.squares, view)
        return _clocks(found.updates, rule, here) | moments
    if isinstance(rule, AdamInBasis) and isinstance(found, InBasis) and view is not None:
        return _clocks(found.updates, rule, here) | _in_basis(found, view, here)
    if name in MOMENTUM and isinstance(found, Average):
        return _seen(MOMENTUM[name], found.momentum, view)
    if name == "dion" and isinstance(found, Feedback):
        fits = "Q" in here and here["Q"].shape == found.basis.shape  # elsewhere it may be on the longer side
        return _seen("momentum_buffer", found.momentum, view) | ({"Q": found.basis} if fits else {})
    raise NoCounterpart(f"{name} has no use for {NOUNS[type(found)]}")


def _seen(name: str, x: Tensor, view: View | None) -> Values:
    """Return a tensor of the parameter's shape as the entries that hold the matrices which the parameter is seen as."""
    if view is None:
        return {name: x}
    pieces = [view.matrices(x, piece) for piece in range(len(view.pieces))]
    suffixes = [f".{piece}" if len(pieces) > 1 else "" for piece in range(len(pieces))]
    return {name + suffix: x if view.batched else x[0] for suffix, x in zip(suffixes, pieces, strict=True)}


def _clocks(updates: int, rule: AdamInBasis[Any], here: State) -> Values:
    """Return the two clocks of all matrices after so many updates of their moments."""
    clock = updates + rule.seeds  # the call that only seeds the basis counts here
    if rule.stage(clock) != "steady":
        raise NoCounterpart(f"its first basis comes at update {rule.first_refresh + 1}, and {updates} are saved")
    return {name: clock for name in here if name.split(".")[0] in ("step", "clock")}


def _in_basis(found: InBasis, view: View, here: State) -> Values:
    """Return moments, covariances and bases of the one matrix that a parameter is seen as."""
    if found.kl != ("in_basis" in here):
        raise NoCounterpart(f"its covariances are {'KL-Shampoo' if found.kl else 'Shampoo'}'s there, and not here")
    if view.batched or len(view.pieces) != 1:
        raise NoCounterpart("it is seen as several matrices here")
    moments, factors = {"exp_avg": found.momentum, "exp_avg_sq": found.squares}, found.factors
    if view.transpose:
        moments, factors = {name: x.mT for name, x in moments.items()}, factors[::-1]
    there, mine = list(moments["exp_avg_sq"].shape), list(here["exp_avg_sq"].shape)
    if there != mine:
        raise NoCounterpart(f"it is seen as a matrix {there} there, and as {mine} here")
    values: Values = {**moments}
    for side, factor in zip("LR", factors, strict=True):
        if (factor is not None) != (f"Q_{side}" in here):
            which, where = ("rows", "columns")[side == "R"], ("here", "there")[factor is not None]
            raise NoCounterpart(f"its {which} have a basis only {where}: max_precond_dim decides")
        if factor is not None:
            K, Q = factor
            values |= {side: Q.mT @ K @ Q if found.kl else K, f"Q_{side}": Q}
    return values
