"""Optimizers that break clauses on closures, on parameters in place, and on models.

Most are our L-BFGS, which keeps every clause, with one habit added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from mutants import Mutants, habit, parameters
from standins import Whitens
from torch import nn

import steepest

MUTANTS = Mutants()
breaks = MUTANTS.breaks

habit("same_parameters", after=lambda self: [setattr(p, "data", p.data.clone()) for p in parameters(self)])
habit("same_parameters", after=lambda self: [p.requires_grad_(True) for p in parameters(self)])


class Searches(steepest.LBFGS):  # type: ignore[misc]
    """Ours, with something else done around each step."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"max_iter": 3, "max_eval": 12} | options)

    def before(self) -> None: ...

    def after(self) -> None: ...

    def step(self, closure: Any = None) -> Any:
        self.before()
        loss = super().step(closure)
        self.after()
        return loss


for clause in ("closure_required", "closure_error", "closure_nonfinite", "closure_groups"):
    MUTANTS.setdefault(clause, []).append(torch.optim.LBFGS)
MUTANTS["closure_evaluations"] = [
    functools.partial(torch.optim.LBFGS, max_iter=30, max_eval=40, line_search_fn="strong_wolfe")
]


@breaks("closure_required")
class TakesAnyForAClosure(Searches):
    def step(self, closure: Any) -> Any:
        return super().step(closure or (lambda: torch.zeros(())))


@breaks("closure_error")
class Swallows(Searches):
    def step(self, closure: Any = None) -> Any:
        try:
            return super().step(closure)
        except Exception as error:
            if isinstance(error, TypeError):
                raise
            return torch.zeros(())


@breaks("closure_error")
class ForgetsOnErrors(torch.optim.SGD):
    """It needs no closure, and has begun its step when it calls one."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"lr": 1e-2, "momentum": 0.9} | options)

    def step(self, closure: Any = None) -> Any:
        super().step()
        with torch.enable_grad():
            return None if closure is None else closure()


@breaks("closure_descends")
class Drifts(Searches):
    @torch.no_grad()
    def after(self) -> None:
        for p in parameters(self):
            p.mul_(1.05)


@breaks("closure_evaluations")
class LooksOnceMore(Searches):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.enable_grad():
            closure()
        return loss


@breaks("closure_resumes")
class RemembersFailures(Searches):
    failures = 0

    def before(self) -> None:
        self.weights = [p.detach().clone() for p in parameters(self)]

    @torch.no_grad()
    def after(self) -> None:
        moved = any(not torch.equal(p, x) for p, x in zip(parameters(self), self.weights, strict=True))
        self.failures += not moved
        for p, x in zip(parameters(self), self.weights, strict=True):
            p.sub_(self.failures * 1e-3 * (p - x))


@breaks("closure_groups")
class MovesTheFirstGroup(Searches):
    @property
    def trainable(self) -> Any:
        return [p for p in self.param_groups[0]["params"] if p.requires_grad]


@breaks("closure_options")
class ReadsTheFirstGroup(Searches):
    def _check(self) -> None: ...


# Those that take a model.


def whitens(**habits: Any) -> Callable[..., torch.optim.Optimizer]:
    kind: Any = type("Whitens", (Whitens,), habits)

    def build(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(model, **options)
        return optimizer

    return build


MUTANTS |= {
    "nan_gradient": [whitens(guarded=False)],
    "infinite_gradient": [whitens(guarded=False)],
    "scaler": [whitens()],  # what it measures is scaled
    "resume_float32": [whitens(rehooks=True)],
    "resume_deepcopy": [whitens(unhooks=True)],
}
