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


class Habit(Optimizer):
    """Ours, with something done around each step, or to each state that is loaded."""

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


# Chapters 6, 7 and 8: saving.


class KeepsObject(Habit):
    """Puts something into every parameter's state that is no tensor, and knows how to save and load around it."""

    extra: Any = None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for named in state["state"].values():
            named["extra"] = self.extra
        return state

    def loading(self, saved: dict[str, Any]) -> None:
        for named in saved["state"].values():
            named.pop("extra", None)


@breaks("plain_state", "resume_flattened")
class KeepsList(KeepsObject):
    extra = (1.0, 2.0)


@breaks("plain_state", "weights_only")
class KeepsClass(KeepsObject):
    extra = slice(0, 1)


@breaks("resume_float32", "resume_untrained", "damaged_state")
class ForgetsTheClock(Habit):
    def loading(self, saved: dict[str, Any]) -> None:
        for key, named in self.state_dict()["state"].items():
            if key in saved["state"]:
                saved["state"][key] = named | saved["state"][key]
                saved["state"][key]["step"] = named["step"]


@breaks("resume_bfloat16")
class LoadsAsTorchDoes(Habit):
    def loading(self, saved: dict[str, Any]) -> None:
        dtype = next(parameters(self)).dtype
        for named in saved["state"].values():
            named |= {name: x.to(dtype) for name, x in named.items() if x.is_floating_point()}


@breaks("resume_untrained")
class SkipsUntrained(Habit):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if any(named["step"].max() > 0 for named in state_dict["state"].values()):
            super().load_state_dict(state_dict)


@breaks("resume_frozen")
class WantsAllState(Habit):
    def loading(self, saved: dict[str, Any]) -> None:
        if len(saved["state"]) < len(list(parameters(self))):
            raise KeyError("state")


@breaks("resume_distributed", "resume_flattened")
class KeysByAddress(Habit):
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"state": {id(named): named for named in state["state"].values()}}


@breaks("mismatched_state", "damaged_state")
class LoadsWhatFits(Habit):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with contextlib.suppress(ValueError):
            super().load_state_dict(state_dict)


@breaks("mismatched_state", "damaged_state")
class ClearsFirst(Habit):
    def loading(self, saved: dict[str, Any]) -> None:
        for state in self.state.values():
            state["exp_avg"].zero_()


# Chapters 9 and 11 to 15.


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


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def keep(optimizer: torch.optim.Optimizer, *options: str) -> None:
    """The options that it was built with come back."""
    for group in optimizer.param_groups:
        group |= {option: optimizer.defaults[option] for option in options}
