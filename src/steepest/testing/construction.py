"""Chapters 1 and 10: what an optimizer is constructed from, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steepest.testing.evidence import Broken, NotApplicable, expect, expect_close, expect_moved, expect_same, one_line
from steepest.testing.subject import Form, Subject, clause


@clause(1, "parameters come as tensors, an iterator, groups or (name, tensor) pairs")
def parameter_forms(subject: Subject) -> None:
    """An optimizer takes every form of parameters that ``torch.optim.Optimizer`` does, and trains the same with all."""
    expected = subject.start()
    expect(isinstance(expected.optimizer, torch.optim.Optimizer), "a torch.optim.Optimizer", type(expected.optimizer))
    expected.steps(range(2))
    forms: dict[str, Form] = {
        "an iterator": lambda params: iter(params.values()),
        "a group": lambda params: [{"params": list(params.values())}],
        "a group with an iterator": lambda params: [{"params": iter(params.values())}],
        "named pairs": lambda params: list(params.items()),
        "a group of named pairs": lambda params: [{"params": list(params.items())}],
    }
    for name, form in forms.items():
        run = subject.start(form=form)
        run.steps(range(2))
        expect_same(run.weights(), expected.weights(), f"the same training when given {name}")


@clause(1, "names of parameters survive, also in state_dict")
def names_survive(subject: Subject) -> None:
    """Groups and saved states have the ``param_names``: without names, a checkpoint is matched by order only."""
    run = subject.start(form=lambda params: list(params.items()))
    optimizer, names = run.optimizer, list(run.params)
    for where, groups in (("", optimizer.param_groups), (" of state_dict", optimizer.state_dict()["param_groups"])):
        seen = [name for group in groups for name in group.get("param_names", ["no param_names"])]
        expect(seen == names, f"param_names in the groups{where}: {names}", seen)


@clause(1, "groups may be empty")
def empty_group(subject: Subject) -> None:
    """A group without parameters is skipped: decay splits leave empty groups in models without biases."""
    run = subject.start(form=lambda params: [{"params": []}, {"params": list(params.values())}])
    run.expect_training(range(3), "training beside an empty group")
    run.optimizer.load_state_dict(run.optimizer.state_dict())


@clause(1, "parameters may have no elements")
def empty_parameters(subject: Subject) -> None:
    """A parameter of shape ``[0, 3]`` changes nothing for the others: shards of sharded models are often empty."""
    expected = subject.start()
    params = subject.params() | {"empty": nn.Parameter(torch.zeros(0, 3, dtype=subject.dtype, device=subject.device))}
    run = subject.over(params, list(params.values()))
    for each in (expected, run):
        each.steps(range(2))
    del run.params["empty"]
    expect_same(run.weights(), expected.weights(), "the same training beside an empty parameter")


@clause(1, "parameters may lie in memory in any order")
def strided_parameters(subject: Subject) -> None:
    """A transposed parameter trains as a contiguous one: tied, fused and channels-last weights are such views."""
    expected = subject.start(names=[subject.first])
    start = expected.weights()
    strided = nn.Parameter(expected.params[subject.first].detach().mT.contiguous().mT)
    run = subject.over({subject.first: strided}, [strided])
    for each in (expected, run):
        each.steps(range(3))
    expect_close(run.weights(), expected.weights(), start, "the same training for a weight that is stored transposed")


@clause(1, "parameters may be replaced or moved before the first step")
def replaced_parameters(subject: Subject) -> None:
    """Hosts prepare a model after its optimizer was constructed: they move or replace the parameters in its groups."""
    if subject.by_model:
        raise NotApplicable("takes a model, in which the parameters would have to be replaced")
    expected, run = subject.start(), Subject(subject.factory, subject.dtype).start()
    for p in run.params.values():
        p.data = p.data.to(subject.device)
    for group in run.optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    replaced = [p for group in run.optimizer.param_groups for p in group["params"]]
    run.params = dict(zip(run.params, replaced, strict=True))
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    for each in (expected, run):
        each.steps(range(4))
    expect_same(run.weights(), expected.weights(), "the same training with parameters that were replaced")
    run.optimizer.load_state_dict(run.optimizer.state_dict())


@clause(1, "add_param_group after construction fills in every default", several=True)
def added_group(subject: Subject) -> None:
    """A group of parameters that is added in training, as when layers are unfrozen, gets every option, and trains."""
    late = subject.others[-1]
    run = subject.start(form=lambda params: [p for name, p in params.items() if name != late])
    run.step(0, missing=[late])
    run.optimizer.add_param_group({"params": [run.params[late]]})
    absent = sorted(subject.defaults.keys() - run.optimizer.param_groups[1].keys())
    expect(not absent, "the added group to have every option", f"no {', '.join(absent)}")
    run.expect_training(range(2, 5), "old and added parameters to train")


@clause(1, "a group's own options hold for it alone", needs=("lr",), several=True, each=True)
def own_options(subject: Subject) -> None:
    """A group with ``lr=0`` stays while the others train: layer-wise rates and frozen phases depend on that."""
    still, moving = [subject.first], list(subject.others)
    if subject.takes_forms:
        names = zip((still, moving), ({"lr": 0.0}, {}), strict=True)
        run = subject.start(form=lambda params: [{"params": [params[n] for n in some]} | own for some, own in names])
    else:
        run = subject.start()
        first = run.optimizer.param_groups[0]
        first["lr"], held = 0.0, {id(p) for p in first["params"]}
        still = [name for name, p in run.params.items() if id(p) in held]
        moving = [name for name in run.params if name not in still]
        if not moving:
            raise NotApplicable("takes a model, and makes one group of it")
    before, others = run.weights(*still), run.weights(*moving)
    run.steps(range(3))
    expect_same(run.weights(*still), before, "no change in the group whose lr is 0")
    expect_moved(run.weights(*moving), others, "the other group to train")


@clause(1, "frozen parameters stay, and train once they thaw", several=True)
def frozen_parameters(subject: Subject) -> None:
    """A parameter with ``requires_grad=False`` may be in a group: it stays, and trains from its first gradient on."""
    cold = subject.first
    run = subject.start_frozen(cold)
    before = run.weights(cold)
    run.steps(range(2))
    expect_same(run.weights(cold), before, "no change in a frozen parameter")
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.params[cold].requires_grad_(True)
    run.expect_training(range(2, 5), "the thawed parameter and the others to train")


@clause(10, "a bad learning rate raises ValueError at construction", needs=("lr",))
def bad_lr(subject: Subject) -> None:
    """A negative or NaN learning rate is a mistake, which is cheapest to find before training starts."""
    for lr in (-1.0, math.nan):
        _expect_refusal(subject, lr=lr)


@clause(10, "decay coefficients out of range raise ValueError at construction", needs=("betas", "momentum"))
def bad_betas(subject: Subject) -> None:
    """``betas`` outside [0, 1) divide by zero in the bias correction, or grow without bound."""
    if "betas" in subject.defaults:
        betas = tuple(subject.defaults["betas"])
        for bad in ((-0.1, *betas[1:]), (1.0, *betas[1:]), (*betas[:-1], 1.5)):
            _expect_refusal(subject, betas=bad)
    if "momentum" in subject.defaults:
        _expect_refusal(subject, momentum=-0.1)


@clause(10, "negative weight_decay or eps raise ValueError at construction")
def bad_decay_or_eps(subject: Subject) -> None:
    """A negative weight decay makes weights grow, and a negative eps makes divisions worse; both are mistakes."""
    options = [option for option in ("weight_decay", "eps") if isinstance(subject.defaults.get(option), int | float)]
    if not options:
        raise NotApplicable("has neither weight_decay nor eps")
    for option in options:
        _expect_refusal(subject, **{option: -1.0})


@clause(10, "an option that doesn't exist raises at construction")
def unknown_option(subject: Subject) -> None:
    """With a misspelt option that raises no error, training silently uses the default."""
    try:
        subject.start(weight_dekay=0.1)
    except (TypeError, ValueError):
        return
    raise Broken("expected TypeError or ValueError for weight_dekay=0.1; saw an optimizer")


@clause(10, "complex parameters work, or are refused by name")
def complex_gradients(subject: Subject) -> None:
    """A complex parameter trains, or an error says that complex numbers are not supported."""
    _expect_training_or_error(subject, "complex", torch.complex64, lambda grad: grad * (1 + 1j))


@clause(10, "sparse gradients work, or are refused by name")
def sparse_gradients(subject: Subject) -> None:
    """A sparse gradient, as of an embedding, is used, or an error says that sparse gradients are not supported."""
    _expect_training_or_error(subject, "sparse", torch.float32, Tensor.to_sparse)


def _expect_refusal(subject: Subject, **bad: Any) -> None:
    """Expect a ValueError that contains the option or its value."""
    ((option, value),) = bad.items()
    seen = "an optimizer"
    try:
        subject.start(names=[subject.first], **bad)
    except Exception as error:
        seen = one_line(error)
        words = [option.removesuffix("s"), *map(str, value if isinstance(value, tuple) else (value,))]
        if isinstance(error, ValueError) and any(word in str(error) for word in words):
            return
    raise Broken(f"expected a ValueError that names {option}={value}; saw {seen}")


def _expect_training_or_error(
    subject: Subject, kind: str, dtype: torch.dtype, convert: Callable[[Tensor], Tensor]
) -> None:
    """Expect gradients of some kind to move the weight to finite values, or an error to name the kind."""
    try:
        run = subject.start(dtype, names=[subject.first])
        before = run.weights()
        for k in range(3):
            run.set_gradients(k, convert=convert)
            run.act()
    except NotApplicable:
        raise
    except Exception as error:
        named = kind in str(error).lower()
        expect(named, f"training, or an error that speaks of {kind} gradients", one_line(error))
        return
    expect_moved(run.weights(), before, f"{kind} gradients to train, since they were taken")
