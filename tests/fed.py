"""An optimizer of bare parameters for rules that are fed by a model's layers: here their gradients feed them.

The tests of the engine make gradients by hand, and so have no layers. What is captured in layers otherwise is computed
from each gradient G: A is GᵀG and B is GGᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.exchange.shards import local
from steepest.rule import Rule, Statistics
from steepest.rules import RULES
from steepest.stack.stack import state_dtype
from steepest.view import View

CAPTURING = [name for name, rule in RULES.items() if issubclass(rule, Rule) and rule.captures]


class Fed(Optimizer):
    """An `Optimizer` that takes rules that capture, and feeds them."""

    _captures = True

    def _admit(self, name: str, p: Tensor, group: Mapping[str, Any]) -> None:
        pass

    def _captured(self, grads: list[Tensor | None]) -> Mapping[int, Statistics]:
        roster = self._roster
        found = {}
        for index, (p, grad, number) in enumerate(zip(roster.params, grads, roster.numbers, strict=True)):
            group = self.param_groups[number]
            if grad is not None and group["rule"] in CAPTURING and p.numel() and self._due(p, group):
                view = View(tuple(grad.shape), group["merge_dims"], group["transpose"] and grad.dim() > 1)
                G = view.matrices(local(grad), 0).to(state_dtype(p))  # [b, m, n]
                found[index] = Statistics(G.mT @ G, G @ G.mT)
        return found

    def _due(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether a parameter gets statistics, by its own clock, and not by the count of the optimizer's steps."""
        clocks = [int(local(x).max()) for name, x in self.state[p].items() if name.startswith("clock")]
        return not clocks or max(clocks) < group["settle"] or max(clocks) % group["statistics_frequency"] == 0


def optimizer(params: Any, rule: str = "adamw", **options: Any) -> Optimizer:
    """Build an `Optimizer`, which is `Fed` if one of its rules captures.

    Then it doesn't clip unless the options say so: clipping makes the step of each matrix depend on all others.
    """
    groups = [x for x in params if isinstance(x, dict)] if isinstance(params, list) else []
    for group in groups:
        if group.get("rule") in CAPTURING:
            group.setdefault("kl_clip", 0.0)
    if isinstance(rule, str) and rule in CAPTURING:
        options = {"kl_clip": 0.0} | options
    fed = any(isinstance(name, str) and name in CAPTURING for name in (rule, *(group.get("rule") for group in groups)))
    return (Fed if fed else Optimizer)(params, rule, **options)
