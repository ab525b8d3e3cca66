"""Chapters 2, 3, 5, 9 and 15: what a step reads and leaves unchanged, schedulers and hooks."""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import ExponentialLR, LinearLR

from steepest.testing.draws import gradient
from steepest.testing.evidence import (
    NotApplicable,
    Snapshot,
    expect,
    expect_close,
    expect_finite,
    expect_moved,
    expect_same,
    snapshot,
)
from steepest.testing.subject import Subject, clause

PRODUCTS: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
"""The modules that hold the precision of matrix products."""

Build = Callable[..., Any]
"""``build(optimizer, lr)`` returns a scheduler; with ``cycle=True`` it cycles the momentum, if it can."""

SCHEDULERS: dict[str, Build] = {
    "LambdaLR": lambda o, lr: lr_scheduler.LambdaLR(o, lambda k: 0.5**k),
    "MultiplicativeLR": lambda o, lr: lr_scheduler.MultiplicativeLR(o, lambda k: 0.5),
    "StepLR": lambda o, lr: lr_scheduler.StepLR(o, 1),
    "MultiStepLR": lambda o, lr: lr_scheduler.MultiStepLR(o, [2]),
    "ConstantLR": lambda o, lr: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o, lr: LinearLR(o),
    "ExponentialLR": lambda o, lr: ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o, lr: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o, lr: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o, lr: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ChainedScheduler": lambda o, lr: lr_scheduler.ChainedScheduler([ExponentialLR(o, 0.5)], o),
    "SequentialLR": lambda o, lr: lr_scheduler.SequentialLR(o, [LinearLR(o), ExponentialLR(o, 0.5)], [1]),
    "ReduceLROnPlateau": lambda o, lr: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "OneCycleLR": lambda o, lr, cycle=False: lr_scheduler.OneCycleLR(o, lr, total_steps=5, cycle_momentum=cycle),
    "CyclicLR": lambda o, lr, cycle=False: lr_scheduler.CyclicLR(o, lr / 2, lr, 2, cycle_momentum=cycle),
}
"""All schedulers of torch.optim.lr_scheduler, with settings for a few steps."""


@clause(2, "the learning rate is re-read at every step", needs=("lr",))
def lr_reread(subject: Subject) -> None:
    """A learning rate that a scheduler writes into ``group["lr"]`` holds from the next step on."""
    _changes(subject, "lr", subject.lr / 2)


@clause(2, "betas and momentum are re-read at every step", needs=("betas", "momentum"))
def betas_reread(subject: Subject) -> None:
    """Decays that OneCycleLR writes into ``group["betas"]`` or ``group["momentum"]`` hold from the next step on."""
    if "betas" in subject.defaults:
        _changes(subject, "betas", (0.5, *tuple(subject.defaults["betas"])[1:]))
    if "momentum" in subject.defaults:
        _changes(subject, "momentum", 0.5)


@clause(2, "weight decay is re-read at every step", needs=("weight_decay",))
def decay_reread(subject: Subject) -> None:
    """A weight decay that a schedule writes into ``group["weight_decay"]`` holds from the next step on."""
    _changes(subject, "weight_decay", 0.5 + (subject.defaults["weight_decay"] or 0.0))


@clause(2, "the learning rate may be a tensor", needs=("lr",))
def tensor_lr(subject: Subject) -> None:
    """A tensor trains like the number in it, and is read again at every step: changing it costs no recompilation."""
    expected, run = subject.start(), subject.start(lr=torch.tensor(subject.lr))
    start = run.weights()
    for each in (expected, run):
        each.steps(range(2))
        each.set("lr", subject.lr / 2)
        each.steps(range(2, 4))
    expect_close(run.weights(), expected.weights(), start, "a tensor lr to train like the number in it")


@clause(2, "every scheduler of torch.optim runs", needs=("lr",))
def schedulers(subject: Subject) -> None:
    """Each of torch's learning rate schedulers takes the optimizer, and sets the rate of its next step."""
    for name, build in SCHEDULERS.items():
        metrics = [1.0] if name == "ReduceLROnPlateau" else []
        _follows(subject, name, build, lambda group: float(group["lr"]), *metrics)


@clause(2, "OneCycleLR and CyclicLR cycle the momentum", needs=("betas", "momentum"))
def cycled_momentum(subject: Subject) -> None:
    """Both schedulers move ``betas`` or ``momentum`` against the learning rate, and refuse optimizers with neither."""
    for name in ("OneCycleLR", "CyclicLR"):
        build = functools.partial(SCHEDULERS[name], cycle=True)
        _follows(subject, name, build, lambda g: g["betas"][0] if "betas" in g else g["momentum"])


@clause(3, "a closure runs with gradients enabled, and its loss is returned")
def closure(subject: Subject) -> None:
    """``step(closure)`` enables gradients for the closure, whatever the caller's mode, and returns its loss.

    If the closure is evaluated several times, the loss at the weights before the step is returned.
    """
    run = subject.start()
    modes: list[bool] = []
    loss = torch.tensor(3.0)

    def reevaluate() -> Any:
        modes.append(torch.is_grad_enabled())
        if required is not None:
            return required()
        run.set_gradients(0)
        return loss

    run.step(0)  # some algorithms do not move the weights in their first step
    if subject.by_closure:
        run.set_gradients(1)
    before, required = run.weights(), run.closure
    expected = 3.0 if required is None else run.loss()
    with torch.no_grad():
        returned = run.act(reevaluate)
    expect(bool(modes), "the closure to be called", "no call")
    expect(all(modes), "gradients enabled in the closure", "torch.is_grad_enabled() is False")
    close = returned is loss or (returned is not None and math.isclose(float(returned), expected, rel_tol=1e-5))
    expect(close, f"the closure's loss, {expected}", returned)
    expect_moved(run.weights(), before, "a step with the closure's gradients")


@clause(5, "gradients stay as they were")
def gradients_unchanged(subject: Subject) -> None:
    """``step()`` neither changes nor clears ``p.grad``: loggers, accumulation and a second ``step()`` rely on it."""
    run = subject.start()
    run.set_gradients(0)
    if subject.by_closure:
        if any(p.grad is not None for p in run.params.values()):
            raise NotApplicable("its closure sets gradients")
        for name, p in run.params.items():
            p.grad = gradient(0, name, p)
    before = {name: p.grad for name, p in run.params.items()}
    expected = snapshot(before)
    run.act()
    for name, p in run.params.items():
        expect(p.grad is before[name], f"{name}.grad to be the same tensor", "None" if p.grad is None else "another")
    expect_same(snapshot(before), expected, "p.grad unchanged by the step")


@clause(5, "global random states are not consumed")
def random_state(subject: Subject) -> None:
    """Construction and steps draw nothing from torch's, NumPy's and Python's generators, as data and dropout do."""
    before = _random_states()
    run = subject.start()
    for k in range(3):
        run.set_gradients(k)
        run.act()
    after = _random_states()
    drawn = [library for library, state in before.items() if not torch.equal(state, after[library])]
    expect(not drawn, "untouched random states", f"draws from {', '.join(drawn)}")


@clause(5, "global settings are left as they were")
def global_settings(subject: Subject) -> None:
    """Precision of matrix products, default dtype, gradient mode and threads are the same after a few steps."""
    saved = [backend.fp32_precision for backend in PRODUCTS]
    torch.set_float32_matmul_precision("highest")  # an earlier construction of the optimizer may have changed it
    before = _settings()
    subject.start().steps(range(3))
    after = _settings()
    for backend, precision in zip(PRODUCTS, saved, strict=True):
        backend.fp32_precision = precision
    changed = [f"{name} from {before[name]} to {now}" for name, now in after.items() if now != before[name]]
    expect(not changed, "untouched settings", ", ".join(changed))


@clause(5, "parameters stay the leaves that they were, in their memory")
def same_parameters(subject: Subject) -> None:
    """A step writes into parameters: others hold them, or views of their memory, and differentiate for them."""
    cold = subject.others[-1] if subject.others else None
    run = subject.start_frozen(*[cold] if cold is not None else [])
    params = run.params
    run.step(0)
    before = {name: _identity(p) for name, p in params.items()}
    frozen = run.weights(cold) if cold is not None else {}
    run.steps(range(1, 4))
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for name, p in params.items():
        expect(id(p) in held, f"{name} in the optimizer's groups", "another tensor")
        expect(_identity(p) == before[name], f"{name} with {before[name]}", _identity(p))
    if cold is not None:
        expect_same(run.weights(cold), frozen, "no change in a frozen parameter")


@clause(9, "a step with zero gradients and lr 0 changes no parameter", needs=("lr",))
def idle_step(subject: Subject) -> None:
    """``torch.distributed.checkpoint`` takes such a step to create state, and expects no other effect."""
    run = subject.start()
    before = run.weights()
    run.set("lr", 0.0)
    run.step(0, scale=0.0)
    expect_same(run.weights(), before, "no change in a step with zero gradients and lr 0")


@clause(9, "zero gradients make no NaN, and training goes on after them")
def zero_gradients(subject: Subject) -> None:
    """Normalizations must not compute 0/0: numbers stay finite after zero gradients, and training goes on."""
    run = subject.start()
    for k in range(3):
        run.step(k, scale=0.0)
    expect_finite(run.everything(), "finite numbers after zero gradients")
    run.expect_training(range(3, 6), "training after zero gradients")


@clause(15, "step hooks fire once a step, before and after it")
def step_hooks(subject: Subject) -> None:
    """Profilers, FSDP and loggers use ``register_step_pre_hook`` and ``register_step_post_hook``."""
    run = subject.start()
    run.steps(range(3))
    seen: list[tuple[str, Snapshot]] = []
    hooks = [
        run.optimizer.register_step_pre_hook(lambda *_: seen.append(("before", run.weights()))),
        run.optimizer.register_step_post_hook(lambda *_: seen.append(("after", run.weights()))),
    ]
    start = run.weights()
    run.step(3)
    calls = [when for when, _ in seen]
    expect(calls == ["before", "after"], "one call before and one after the step", calls)
    expect_same(seen[0][1], start, "the first hook to be called before anything moves")
    expect_moved(seen[1][1], start, "the second hook to be called when everything has moved")
    for hook in hooks:
        hook.remove()
    run.step(4)
    expect(len(seen) == 2, "no call of a hook that was removed", len(seen))


@clause(15, "hooks of state_dict and load_state_dict fire")
def state_hooks(subject: Subject) -> None:
    """These hooks adapt checkpoints across versions; the hook before loading may replace the state that is loaded."""
    run = subject.start()
    run.step(0)
    calls: list[str] = []
    for event in ("state_dict_pre", "state_dict_post", "load_state_dict_post"):
        getattr(run.optimizer, f"register_{event}_hook")(lambda *_, event=event: calls.append(event))
    run.optimizer.register_load_state_dict_pre_hook(
        lambda _, state: calls.append("load_state_dict_pre") or state["wrapped"]  # type: ignore[func-returns-value]
    )
    run.optimizer.load_state_dict({"wrapped": run.optimizer.state_dict()})
    expected = ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]
    expect(calls == expected, f"calls in the order {expected}", calls)


def _identity(p: Tensor) -> dict[str, object]:
    return {"requires_grad": p.requires_grad, "is_leaf": p.is_leaf, "data_ptr": p.data_ptr()}


def _random_states() -> dict[str, Tensor]:
    """Return the state of each library's global generator."""
    states = {"torch": torch.get_rng_state(), "Python's random": torch.tensor(random.getstate()[1])}
    if torch.cuda.is_available():
        states |= {f"torch on {k}": state for k, state in enumerate(torch.cuda.get_rng_state_all())}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        _, keys, position, *_ = numpy.random.get_state()
        states["NumPy"] = torch.tensor([*keys.tolist(), position])
    return states


def _settings() -> dict[str, object]:
    """Return settings of torch that a step might change."""
    return {
        "precision of products": [backend.fp32_precision for backend in PRODUCTS],
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cuDNN benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
    }


def _follows(subject: Subject, name: str, build: Build, read: Callable[[Any], float], *metrics: float) -> None:
    """Expect a scheduler to change the option that is read from a group, and the weights to move."""
    run = subject.start(names=[subject.first])
    start, scheduler, seen = run.weights(), build(run.optimizer, subject.lr), set()
    for k in range(4):
        run.step(k)
        scheduler.step(*metrics)
        seen.add(read(run.optimizer.param_groups[0]))
    expect(len(seen) > 1, f"{name} to change its option", f"{seen} all the time")
    expect_moved(run.weights(), start, f"training under {name}")


def _changes(subject: Subject, option: str, value: Any) -> None:
    """Expect a changed option to change the next two steps."""
    unchanged, changed = (subject.start(names=[subject.first]) for _ in range(2))
    for run in (unchanged, changed):
        run.steps([0, 2])
    changed.set(option, value)
    for run in (unchanged, changed):
        run.steps([3, 4])
    promise = f"{option}={value} to change the steps after it was written into the group"
    ((one,), (other,)) = (run.weights().values() for run in (unchanged, changed))
    expect(not torch.equal(one, other), promise, "the same steps as without")
