"""Optimizers that break clauses on gradients that are zero, scaled or not finite, and on hooks and compilers."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from mutants import Habit, Mutants, parameters
from torch import Tensor

from steepest.engine.optimizer import Optimizer

MUTANTS = Mutants()
breaks = MUTANTS.breaks


@breaks("zero_gradients")
class Normalizes(torch.optim.SGD):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"lr": 1e-2} | options)

    def step(self, closure: Any = None) -> Any:
        for p in parameters(self):
            if p.grad is not None:
                p.grad = p.grad / p.grad.norm()
        return super().step(closure)


@breaks("scaler", "skipped_by_scaler")
class ScalesByItself(torch.optim.ASGD):
    _step_supports_amp_scaling = True  # promises GradScaler that step() unscales, which it doesn't


class Cautious(Habit):
    """Looks at all gradients before it steps."""

    def finite(self) -> bool:
        return all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters(self))


@breaks("bad_gradient_isolated")
class SkipsTheWholeStep(Cautious):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.finite() else None


@breaks("bad_gradient_isolated")
class TellsTheOthers(Cautious):
    def before(self) -> None:
        for p in parameters(self) if not self.finite() else ():
            if p.grad is not None and torch.isfinite(p.grad).all():
                self.state[p]["bad_ones"] = self.state[p].get("bad_ones", 0) + 1


@breaks("bad_gradient_waits", "bad_gradient_resumes")
class TakesNaNForZero(Habit):
    def before(self) -> None:
        for p in parameters(self):
            p.grad = None if p.grad is None else p.grad.nan_to_num(0.0, 0.0, 0.0)


@breaks("bad_gradient_resumes")
class BearsAGrudge(Habit):
    def __init__(self, params: Any, **options: Any) -> None:
        self.banned: set[Tensor] = set()
        super().__init__(params, **options)

    def before(self) -> None:
        self.banned |= {p for p in parameters(self) if p.grad is not None and not torch.isfinite(p.grad).all()}
        for p in self.banned:
            p.grad = None


@breaks("nan_gradient", "infinite_gradient", "bad_gradient_isolated", "bad_gradient_waits")
class GivesUp(Cautious):
    def before(self) -> None:
        if not self.finite():
            raise RuntimeError("NaN")


@breaks("step_hooks")
class StepsInPrivate(Habit):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.step = functools.partial(inspect.unwrap(Optimizer.step), self)  # type: ignore[method-assign]


@breaks("state_hooks")
class SavesInPrivate(Habit):
    def state_dict(self) -> dict[str, Any]:
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, {}  # type: ignore
        state = super().state_dict()
        self._optimizer_state_dict_post_hooks = hooks
        return state


@breaks("compiled_step", rule="adamw")
class TracesTheRate(Habit):
    def before(self) -> None:
        scale = torch.ones(1 + int(1e6 * float(self.param_groups[0]["lr"])) % 97)
        for p in parameters(self):
            p.grad = p.grad * scale.mean()


for clause in ("nan_gradient", "infinite_gradient", "overflow", "bad_gradient_waits", "float32_state"):
    MUTANTS.setdefault(clause, []).append(torch.optim.AdamW)
