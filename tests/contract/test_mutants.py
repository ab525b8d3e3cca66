"""The suite is strict enough: for every clause there is an optimizer that breaks it, and the clause notices.

Most mutants are our engine, which keeps every clause, with one habit added that was seen in a published optimizer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import optimizer as engine
from steepest import stacks
from steepest.optimizer import Optimizer
from steepest.testing import CLAUSES, Verdict, check_clause
from steepest.testing.subject import Factory, Subject

MUTANTS: dict[str, list[Factory]] = {}
"""By clause, what it must notice."""


def breaks(*clauses: str, rule: str = "soap") -> Callable[[Any], Any]:
    """The class (or factory) below breaks these clauses."""

    def register(mutant: Any) -> Any:
        for clause in clauses:
            factory = functools.partial(mutant, rule=rule, lr=1e-2) if issubclass(mutant, Optimizer) else mutant
            MUTANTS.setdefault(clause, []).append(factory)
        return mutant

    return register


@pytest.fixture(autouse=True)
def settings_put_back() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("clause", [name for name, clause in CLAUSES.items() if not clause.slow])
def test_the_clause_notices(clause: str) -> None:
    for mutant in MUTANTS[clause]:
        finding = check_clause(CLAUSES[clause], Subject(mutant))
        assert finding.verdict is Verdict.BROKEN, mutant
        assert "expected" in finding.why
        assert "saw" in finding.why


@pytest.mark.slow
def test_the_slow_clause_notices() -> None:
    for mutant in MUTANTS["compiled_step"]:
        assert check_clause(CLAUSES["compiled_step"], Subject(mutant)).verdict is Verdict.BROKEN


def test_every_clause_has_a_mutant() -> None:
    assert set(MUTANTS) == set(CLAUSES)


# Chapter 1: parameters.


@breaks("parameter_forms")
class ReadsTwice(Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        count = sum(1 for _ in params)
        super().__init__(params if count else [], **options)


@breaks("names_survive")
class DropsNames(Optimizer):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1].pop("param_names", None)


@breaks("empty_group")
class LooksAtTheFirst(Optimizer):
    def step(self, closure: Any = None) -> Any:
        assert all(group["params"][0].is_floating_point() for group in self.param_groups)
        return super().step(closure)


@breaks("empty_parameters")
class ClipsByTheLargest(Optimizer):
    def step(self, closure: Any = None) -> Any:
        for p in parameters(self):
            if p.grad is not None:
                p.grad.abs().max()
        return super().step(closure)


@breaks("strided_parameters", rule="adamw")
class PairsByAddress(Optimizer):
    def step(self, closure: Any = None) -> Any:
        for p in parameters(self):
            if p.grad is not None and p.dim() > 1 and not p.is_contiguous():
                p.grad = p.grad.as_strided(p.shape, p.stride())
        return super().step(closure)


@breaks("replaced_parameters")
class RemembersParameters(Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.known = list(parameters(self))

    def step(self, closure: Any = None) -> Any:
        for p, known in zip(parameters(self), self.known, strict=False):
            p.grad = None if p is not known else p.grad
        return super().step(closure)


@breaks("added_group")
class FillsInNothing(Optimizer):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if len(self.param_groups) > 1:
            del self.param_groups[-1]["eps"]


@breaks("own_options", "lr_reread")
class KeepsItsRate(Optimizer):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        return super().step(closure)


@breaks("frozen_parameters", "missing_gradient", "missing_leaves_state")
class DecaysAll(Optimizer):
    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in parameters(self):
                p.mul_(0.999)
        return super().step(closure)


# Chapter 10: what is refused.


@breaks("bad_lr", "bad_betas", "bad_decay_or_eps", "unknown_option")
class TakesAnything(Optimizer):
    def __init__(self, params: Any, rule: str, **options: Any) -> None:
        known = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.01, "eps": 1e-8}
        super().__init__(params, rule=rule, **known)


@breaks("bad_lr", "bad_betas", "bad_decay_or_eps")
class RefusesWithoutAWord(Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        try:
            super().__init__(params, **options)
        except ValueError:
            raise ValueError("invalid argument") from None


@breaks("complex_gradients", "sparse_gradients")
class TripsOver(Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        params = list(params)
        if any(isinstance(p, Tensor) and p.is_complex() for p in params):
            raise RuntimeError("expected scalar type Float")
        super().__init__(params, **options)

    def step(self, closure: Any = None) -> Any:
        if any(p.grad is not None and p.grad.is_sparse for p in parameters(self)):
            raise RuntimeError("tensors must be contiguous")
        return super().step(closure)


# Chapter 2: options.


@breaks("betas_reread", "decay_reread")
class KeepsItsOptions(Optimizer):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group |= {name: self.defaults[name] for name in ("betas", "weight_decay")}
        return super().step(closure)


@breaks("tensor_lr")
class ReadsTensorsOnce(Optimizer):
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
class KnowsItsOptions(Optimizer):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            unknown = group.keys() - self.defaults.keys() - {"params", "param_names"}
            if unknown:
                raise ValueError(f"unknown options {unknown}")
        return super().step(closure)


# Chapters 3, 4 and 5: steps.


@breaks("closure")
class ForgetsTheLoss(Optimizer):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)


@breaks("closure")
class LeavesGradientsOff(Optimizer):
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


@breaks("no_gradients")
class CountsOnGradients(Optimizer):
    def step(self, closure: Any = None) -> Any:
        next(p.grad for p in parameters(self) if p.grad is not None)
        return super().step(closure)


@breaks("missing_leaves_state", "missing_leaves_clock", "no_gradients")
class FillsInZeros(Optimizer):
    def step(self, closure: Any = None) -> Any:
        for p in parameters(self):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return super().step(closure)


@breaks("missing_leaves_clock", "missing_leaves_state")
class HasOneClock(Optimizer):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        latest = max(state["step"].max() for state in self.state.values())
        for state in self.state.values():
            state["step"].fill_(latest)


@breaks("gradients_unchanged")
class ClearsGradients(Optimizer):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.zero_grad()


@breaks("gradients_unchanged")
class ClipsGradients(Optimizer):
    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_(parameters(self), 1e-3)
        return super().step(closure)


@breaks("random_state")
class Rolls(Optimizer):
    def step(self, closure: Any = None) -> Any:
        torch.rand(())
        return super().step(closure)


@breaks("global_settings")
class Hurries(Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        torch.set_float32_matmul_precision("medium")
        super().__init__(params, **options)


# Chapters 6, 7 and 8: saving.


class KeepsObject(Optimizer):
    """Puts something into every parameter's state that is no tensor, and knows how to save and load around it."""

    extra: Any = None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for named in state["state"].values():
            named["extra"] = self.extra
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for named in state_dict["state"].values():
            named.pop("extra", None)
        super().load_state_dict(state_dict)


@breaks("plain_state", "resume_flattened")
class KeepsList(KeepsObject):
    extra = (1.0, 2.0)


@breaks("plain_state", "weights_only")
class KeepsClass(KeepsObject):
    extra = slice(0, 1)


@breaks("resume_float32", "resume_untrained", "damaged_state")
class ForgetsTheClock(Optimizer):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key, named in self.state_dict()["state"].items():
            if key in state_dict["state"]:
                state_dict["state"][key] = named | state_dict["state"][key]
                state_dict["state"][key]["step"] = named["step"]
        super().load_state_dict(state_dict)


@breaks("resume_bfloat16")
class LoadsAsTorchDoes(Optimizer):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        dtype = next(parameters(self)).dtype
        for named in state_dict["state"].values():
            named |= {name: x.to(dtype) for name, x in named.items() if x.is_floating_point()}
        super().load_state_dict(state_dict)


@breaks("resume_deepcopy")
class CopiesByReference(Optimizer):
    def __deepcopy__(self, memo: Any) -> Optimizer:
        return self


@breaks("resume_deepcopy", "resume_pickle")
class PicklesOptionsOnly(Optimizer):
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"state": {}}


@breaks("resume_untrained")
class SkipsUntrained(Optimizer):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if any(named["step"].max() > 0 for named in state_dict["state"].values()):
            super().load_state_dict(state_dict)


@breaks("resume_by_name")
class LoadsByOrder(Optimizer):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            group.pop("param_names", None)
        super().load_state_dict(state_dict)


@breaks("resume_frozen")
class WantsAllState(Optimizer):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict["state"]) < len(list(parameters(self))):
            raise KeyError("state")
        super().load_state_dict(state_dict)


@breaks("resume_distributed", "resume_flattened")
class KeysByAddress(Optimizer):
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"state": {id(named): named for named in state["state"].values()}}


@breaks("mismatched_state", "damaged_state")
class LoadsWhatFits(Optimizer):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with contextlib.suppress(ValueError):
            super().load_state_dict(state_dict)


@breaks("mismatched_state", "damaged_state")
class ClearsFirst(Optimizer):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for state in self.state.values():
            state["exp_avg"].zero_()
        super().load_state_dict(state_dict)


@breaks("saved_size")
class SavesViews(Optimizer):
    def state_dict(self) -> dict[str, Any]:
        return torch.optim.Optimizer.state_dict(self)


# Chapters 9 and 11 to 15.


@breaks("idle_step")
class DecaysAtNoRate(Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options, weight_decay_method="independent")


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
    _step_supports_amp_scaling = True  # promised to GradScaler, and forgotten


class Cautious(Optimizer):
    """Looks at all gradients before it steps."""

    def finite(self) -> bool:
        return all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters(self))


@breaks("bad_gradient_isolated")
class SkipsTheWholeStep(Cautious):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.finite() else None


@breaks("bad_gradient_waits", "bad_gradient_resumes")
class TakesNaNForZero(Optimizer):
    def step(self, closure: Any = None) -> Any:
        for p in parameters(self):
            p.grad = None if p.grad is None else p.grad.nan_to_num(0.0, 0.0, 0.0)
        return super().step(closure)


@breaks("bad_gradient_resumes")
class BearsAGrudge(Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        self.banned: set[Tensor] = set()
        super().__init__(params, **options)

    def step(self, closure: Any = None) -> Any:
        self.banned |= {p for p in parameters(self) if p.grad is not None and not torch.isfinite(p.grad).all()}
        for p in self.banned:
            p.grad = None
        return super().step(closure)


@breaks("nan_gradient", "infinite_gradient", "bad_gradient_isolated", "bad_gradient_waits")
class GivesUp(Cautious):
    def step(self, closure: Any = None) -> Any:
        if not self.finite():
            raise RuntimeError("NaN")
        return super().step(closure)


@breaks("step_hooks")
class StepsInPrivate(Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.step = functools.partial(inspect.unwrap(Optimizer.step), self)  # type: ignore[method-assign]


@breaks("state_hooks")
class SavesInPrivate(Optimizer):
    def state_dict(self) -> dict[str, Any]:
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, {}  # type: ignore
        state = super().state_dict()
        self._optimizer_state_dict_post_hooks = hooks
        return state


@breaks("compiled_step", rule="adamw")
class TracesTheRate(Optimizer):
    def step(self, closure: Any = None) -> Any:
        scale = torch.ones(1 + int(1e6 * float(self.param_groups[0]["lr"])) % 97)
        for p in parameters(self):
            p.grad = p.grad * scale.mean()
        return super().step(closure)


for clause in ("nan_gradient", "infinite_gradient", "overflow", "bad_gradient_waits", "float32_state"):
    MUTANTS.setdefault(clause, []).append(torch.optim.AdamW)


# The engine itself, with one thing wrong.


def broken(*clauses: str) -> set[str]:
    """Which of the clauses our SOAP breaks now."""
    subject = Subject(functools.partial(Optimizer, rule="soap", lr=1e-2))
    return {name for name in clauses if check_clause(CLAUSES[name], subject).verdict is Verdict.BROKEN}


def test_a_wrong_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    views = stacks.Stack.views

    def neighbours(self: stacks.Stack, seat: stacks.Seat) -> dict[str, Tensor]:
        return views(self, self.seats[self.seats.index(seat) - 1])

    monkeypatch.setattr(stacks.Stack, "views", neighbours)
    clauses = {"missing_leaves_state", "bad_gradient_waits"}
    assert broken(*clauses) == clauses


def test_a_dropped_cast_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "state_dtype", lambda p: p.dtype)
    assert broken("float32_state")


def test_a_clock_that_is_not_restored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    load = engine.checkpoint.load

    def forgetful(optimizer: Optimizer, state_dict: dict[str, Any], check: Any) -> None:
        clocks = [stack.clock.clone() for stack in optimizer._stacks]
        load(optimizer, state_dict, check)
        for stack, clock in zip(optimizer._stacks, clocks, strict=True):
            stack.clock.copy_(clock)

    monkeypatch.setattr(engine.checkpoint, "load", forgetful)
    clauses = {"resume_float32", "resume_bfloat16", "resume_flattened"}
    assert broken(*clauses) == clauses


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])
