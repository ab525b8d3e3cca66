"""Optimizers that break clauses on parameters, options and steps, and functions that make such optimizers.

Most are our engine, which keeps every clause, with one habit added that was seen in a published optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steepest.engine.optimizer import Optimizer
from steepest.testing.subject import Factory


class Mutants(dict[str, list[Factory]]):
    """By clause, what it must notice."""

    def breaks(self, *clauses: str, rule: str = "soap") -> Callable[[Any], Any]:
        """The class (or factory) below breaks these clauses."""

        def register(mutant: Any) -> Any:
            for clause in clauses:
                factory = functools.partial(mutant, rule=rule, lr=1e-2) if issubclass(mutant, Optimizer) else mutant
                self.setdefault(clause, []).append(factory)
            return mutant

        return register


MUTANTS = Mutants()
breaks = MUTANTS.breaks


class Habit(Optimizer):
    """An optimizer of ours that does something else around each step, or to each state that it loads."""

    def before(self) -> None: ...

    def after(self) -> None: ...

    def loading(self, saved: dict[str, Any]) -> None: ...

    def step(self, closure: Any = None) -> Any:
        self.before()
        loss = super().step(closure)
        self.after()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loading(state_dict)
        super().load_state_dict(state_dict)


def habit(*clauses: str, **methods: Callable[..., Any]) -> None:
    """Ours with some methods of its own breaks these clauses."""
    breaks(*clauses)(type("Habit", (Habit,), methods))


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def keep(optimizer: torch.optim.Optimizer, *options: str) -> None:
    """The options that it was built with come back."""
    for group in optimizer.param_groups:
        group |= {option: optimizer.defaults[option] for option in options}


# Habits of a line.

habit("empty_group", before=lambda self: [group["params"][0] for group in self.param_groups])
habit("empty_parameters", before=lambda self: [p.grad.abs().max() for p in parameters(self) if p.grad is not None])
habit("no_gradients", before=lambda self: next(p.grad for p in parameters(self) if p.grad is not None))
habit("gradients_unchanged", after=lambda self: self.zero_grad())
habit("gradients_unchanged", before=lambda self: nn.utils.clip_grad_norm_(parameters(self), 1e-3))
habit("random_state", before=lambda self: torch.rand(()))
habit("closure", step=lambda self, closure=None: [Optimizer.step(self, closure), None][1])
habit("resume_by_name", loading=lambda self, saved: [group.pop("param_names", 0) for group in saved["param_groups"]])
habit("resume_deepcopy", __deepcopy__=lambda self, memo: self)
habit("own_options", "lr_reread", before=lambda self: keep(self, "lr"))
habit("betas_reread", "decay_reread", before=lambda self: keep(self, "betas", "weight_decay"))
habit("frozen_parameters", "missing_gradient", before=lambda self: [p.data.mul_(0.999) for p in parameters(self)])
habit("saved_size", state_dict=torch.optim.Optimizer.state_dict)


@breaks("resume_deepcopy", "resume_pickle")
class PicklesOptionsOnly(Habit):
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"state": {}}


@breaks("names_survive")
class DropsNames(Habit):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1].pop("param_names", None)


@breaks("idle_step")
class DecaysAtNoRate(Habit):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options, weight_decay_method="independent")


@breaks("missing_leaves_state", "missing_leaves_clock", "no_gradients")
class FillsInZeros(Habit):
    def before(self) -> None:
        for p in parameters(self):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad


# Chapter 1: parameters.


@breaks("parameter_forms")
class ReadsTwice(Habit):
    def __init__(self, params: Any, **options: Any) -> None:
        count = sum(1 for _ in params)
        super().__init__(params if count else [], **options)


@breaks("strided_parameters", rule="adamw")
class PairsByAddress(Habit):
    def before(self) -> None:
        for p in parameters(self):
            if p.grad is not None and p.dim() > 1 and not p.is_contiguous():
                p.grad = p.grad.as_strided(p.shape, p.stride())


@breaks("replaced_parameters")
class RemembersParameters(Habit):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.known = list(parameters(self))

    def before(self) -> None:
        for p, known in zip(parameters(self), self.known, strict=False):
            p.grad = None if p is not known else p.grad


@breaks("added_group")
class FillsInNothing(Habit):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if len(self.param_groups) > 1:
            del self.param_groups[-1]["eps"]


# Chapter 10: what is refused.


@breaks("bad_lr", "bad_betas", "bad_decay_or_eps", "unknown_option")
class TakesAnything(Habit):
    def __init__(self, params: Any, rule: str, **options: Any) -> None:
        known = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.01, "eps": 1e-8}
        super().__init__(params, rule=rule, **known)


@breaks("bad_lr", "bad_betas", "bad_decay_or_eps")
class RefusesWithoutAWord(Habit):
    def __init__(self, params: Any, **options: Any) -> None:
        try:
            super().__init__(params, **options)
        except ValueError:
            raise ValueError("invalid argument") from None


@breaks("complex_gradients", "sparse_gradients")
class TripsOver(Habit):
    def __init__(self, params: Any, **options: Any) -> None:
        params = list(params)
        if any(isinstance(p, Tensor) and p.is_complex() for p in params):
            raise RuntimeError("expected scalar type Float")
        super().__init__(params, **options)

    def before(self) -> None:
        if any(p.grad is not None and p.grad.is_sparse for p in parameters(self)):
            raise RuntimeError("tensors must be contiguous")


# Chapter 2: options.


@breaks("tensor_lr")
class ReadsTensorsOnce(Habit):
    def __init__(self, params: Any, lr: Any, **options: Any) -> None:
        self.rate = float(lr)
        super().__init__(params, lr=lr, **options)

    def step(self, closure: Any = None) -> Any:
        kept = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"] = self.rate
        super().step(closure)
        for group, lr in zip(self.param_groups, kept, strict=True):
            group["lr"] = lr


@breaks("schedulers", "cycled_momentum")
class KnowsItsOptions(Habit):
    def before(self) -> None:
        for group in self.param_groups:
            unknown = group.keys() - self.defaults.keys() - {"params", "param_names", "format"}
            if unknown:
                raise ValueError(f"unknown options {unknown}")


# Chapters 3, 4 and 5: steps.


@breaks("closure")
class LeavesGradientsOff(Habit):
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


@breaks("missing_leaves_clock", "missing_leaves_state")
class HasOneClock(Habit):
    def after(self) -> None:
        latest = max(state["step"].max() for state in self.state.values())
        for state in self.state.values():
            state["step"].fill_(latest)


@breaks("global_settings")
class Hurries(Habit):
    def __init__(self, params: Any, **options: Any) -> None:
        torch.set_float32_matmul_precision("medium")
        super().__init__(params, **options)
