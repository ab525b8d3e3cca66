"""Chapters 6, 7 and 8: state that can be saved, and training that goes on from it bit for bit."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import operator
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steepest.testing.clause import Broken, NotApplicable, clause
from steepest.testing.evidence import expect, expect_same, one_line, snapshot
from steepest.testing.subject import AFTER, BEFORE, Run, Subject

Transfer = Callable[[Subject, Run], Run]
"""Takes a run that was broken off to another process, in one way or another."""


@clause(6, "state holds tensors, numbers, strings and dicts only")
def plain_state(subject: Subject) -> None:
    """Lists break flattened distributed checkpoints, objects break ``torch.load(weights_only=True)``."""
    run = subject.start()
    run.steps(range(2))
    for key, named in run.optimizer.state_dict()["state"].items():
        _expect_plain(named, f"the state of parameter {key}")


@clause(6, "a saved state can be read with weights_only=True")
def weights_only(subject: Subject) -> None:
    """Hosts read ``optimizer.pt`` that way, because pickles can run anything; the options must be plain as well."""
    run = subject.start()
    run.steps(range(2))
    state = run.optimizer.state_dict()
    try:
        read = through_file(state)
    except pickle.UnpicklingError as error:
        raise Broken(f"expected to read it with weights_only=True; saw {one_line(error)}") from error
    expect_same(snapshot(read["state"]), snapshot(state["state"]), "the saved state to come back from a file")


@clause(7, "resume from a file, float32")
def resume_float32(subject: Subject) -> None:
    """``state_dict`` saved, read and loaded into a new optimizer goes on bit for bit as if nothing had happened."""
    _resumes(subject, by_file, torch.float32)


@clause(7, "resume from a file, bfloat16 parameters")
def resume_bfloat16(subject: Subject) -> None:
    """With bfloat16 parameters training goes on bit for bit, too; torch's own loading casts state to their dtype."""
    _resumes(subject, by_file, torch.bfloat16)


@clause(7, "resume from copy.deepcopy")
def resume_deepcopy(subject: Subject) -> None:
    """A deep copy trains on by itself: hosts copy optimizers for evaluation, averaging and dry runs."""
    _resumes(subject, by_deepcopy)
    run = subject.start()
    run.steps(range(2))
    before = run.everything()
    by_deepcopy(subject, run).steps(range(2, 4))
    expect_same(run.everything(), before, "no change in the original while its copy trains")


@clause(7, "resume from pickle")
def resume_pickle(subject: Subject) -> None:
    """An optimizer that was pickled whole, with its parameters, goes on: launchers send them to other processes."""
    _resumes(subject, by_pickle)


@clause(7, "resume from before the first step")
def resume_untrained(subject: Subject) -> None:
    """The state of an optimizer that has not stepped loads, also into one that has, which begins anew.

    Accelerate and the Trainer save and load at step 0.
    """
    expected = subject.start()
    saved = through_file(expected.optimizer.state_dict())
    fresh, used = subject.start(), subject.start()
    used.steps(range(2))
    with torch.no_grad():
        for name, x in expected.weights().items():
            used.params[name].copy_(x)
    for run in (expected, fresh, used):
        if run is not expected:
            run.optimizer.load_state_dict(copy.deepcopy(saved))
        run.steps(range(4))
    expect_same(fresh.everything(), expected.everything(), "a new optimizer with an unused state to train as usual")
    expect_same(used.weights(), expected.weights(), "a used optimizer with an unused state to begin anew")


@clause(7, "resume by parameter name, in another order")
def resume_by_name(subject: Subject) -> None:
    """Between optimizers that were given (name, tensor) pairs, state goes by name, not by order.

    A module that is defined elsewhere in a model changes the order; parameters of one shape then swap state unnoticed.
    """
    subject.needs_two()
    _resumes(subject, by_name_reversed)


@clause(7, "resume with parameters that were frozen")
def resume_frozen(subject: Subject) -> None:
    """State in which a parameter has none loads, and the parameter may thaw later."""
    subject.needs_two()
    (cold,) = subject.one

    def start() -> Run:
        run = subject.start()
        run.params[cold].requires_grad_(False)
        params = list(run.params.values())
        return subject.over(run.params, params)

    straight, first, second = start(), start(), start()
    straight.steps(range(3))
    first.steps(range(3))
    _carry(first, second, through_file(first.optimizer.state_dict()))
    for run in (straight, second):
        run.params[cold].requires_grad_(True)
        run.steps(range(3, 6))
    expect_same(second.everything(), straight.everything(), "the same training as without the break")


@clause(7, "resume from a distributed checkpoint")
def resume_distributed(subject: Subject) -> None:
    """Training goes on bit for bit after torch.distributed.checkpoint carried the state over, in one process.

    By ``get_optimizer_state_dict`` and ``set_optimizer_state_dict``, as hosts with sharded models do.
    """
    _resumes(subject, _by_distributed(flatten=False))


@clause(7, "resume from a flattened distributed checkpoint")
def resume_flattened(subject: Subject) -> None:
    """Training goes on bit for bit after a checkpoint in which every value stands under a name of its own.

    ``flatten_optimizer_state_dict`` is what pipelines with changing shares of a model need.
    """
    _resumes(subject, _by_distributed(flatten=True))


@clause(7, "a state of other parameters is refused, and nothing has changed")
def mismatched_state(subject: Subject) -> None:
    """Another number of groups or of parameters raises, and the optimizer is as before."""
    subject.needs_two()
    params = subject.params()
    fewer = subject.over(params, list(params.values())[1:])
    two = subject.over(params, [{"params": [p]} for p in list(params.values())[:2]])
    run = subject.start()
    run.steps(range(2))
    for what, other in (("another number of parameters", fewer), ("another number of groups", two)):
        _expect_refusal(run, other.optimizer.state_dict(), f"a state with {what}")


@clause(7, "a damaged state is refused, and nothing has changed")
def damaged_state(subject: Subject) -> None:
    """A tensor that is missing, misshapen or replaced raises at loading, not at a later step, or never.

    Whatever is loaded halfway trains on with a mixture of two states.
    """
    run = subject.start()
    run.steps(range(2))
    saved = through_file(run.optimizer.state_dict())
    key, *path, entry = _path_to_a_tensor(saved["state"])
    lost, misshapen, replaced, forgotten = (copy.deepcopy(saved) for _ in range(4))
    del functools.reduce(operator.getitem, path, lost["state"][key])[entry]
    functools.reduce(operator.getitem, path, misshapen["state"][key])[entry] = torch.zeros(7, 2)
    functools.reduce(operator.getitem, path, replaced["state"][key])[entry] = "gone"
    del forgotten["state"][key]
    damages = {
        f"no {entry}": lost,
        f"a misshapen {entry}": misshapen,
        f"a word for {entry}": replaced,
        "nothing for one parameter": forgotten,
        "no groups": {"state": saved["state"]},
    }
    for what, state in damages.items():
        _expect_refusal(run, state, f"a state with {what}")


@clause(8, "a parameter's saved state is no larger than its own tensors")
def saved_size(subject: Subject) -> None:
    """A tensor that is a view is saved with all that it is a view of: a batched optimizer, everything every time."""
    run = subject.start()
    run.steps(range(2))
    for key, named in run.optimizer.state_dict()["state"].items():
        for path, x in _tensors(named).items():
            stored, own = x.untyped_storage().nbytes(), x.numel() * x.element_size()
            expect(stored <= own, f"{own} bytes for {path} of parameter {key}", f"{stored} bytes, as a view is saved")


# Ways to take a run elsewhere.


def through_file(state: Any) -> Any:
    """``state`` saved to a file and read again, as hosts read it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_file(subject: Subject, run: Run) -> Run:
    """Through a file, into a new optimizer over new parameters."""
    new = subject.start(run.dtype)
    return _carry(run, new, through_file(run.optimizer.state_dict()))


def by_deepcopy(subject: Subject, run: Run) -> Run:
    """By a deep copy of the optimizer, which brings copies of its parameters."""
    return _regrouped(run, copy.deepcopy(run.optimizer))


def by_pickle(subject: Subject, run: Run) -> Run:
    """By pickling the optimizer, which brings its parameters."""
    return _regrouped(run, pickle.loads(pickle.dumps(run.optimizer)))


def by_name_reversed(subject: Subject, run: Run) -> Run:
    """From an optimizer given (name, tensor) pairs to one given the same pairs in reverse order."""
    named = subject.over(run.params, list(run.params.items()))
    named.optimizer.load_state_dict(run.optimizer.state_dict())
    params = dict(reversed(subject.params(run.dtype).items()))
    new = subject.over(params, list(params.items()))
    return _carry(named, new, through_file(named.optimizer.state_dict()))


def _by_distributed(flatten: bool) -> Transfer:
    if not torch.distributed.is_available():
        raise NotApplicable("this torch was built without torch.distributed")
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def transfer(subject: Subject, run: Run) -> Run:
        new = subject.start(run.dtype)
        saved = through_file(get_optimizer_state_dict(_Model(run.params), run.optimizer, options=options))
        with torch.no_grad():
            for name, p in new.params.items():
                p.copy_(run.params[name])
        set_optimizer_state_dict(_Model(new.params), new.optimizer, saved, options=options)
        return new

    return transfer


class _Model(nn.Module):
    """A model that has just these parameters; its names have no dots in them."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, p in params.items():
            self.register_parameter(name.replace(".", "_"), p)  # type: ignore[arg-type]


def _carry(old: Run, new: Run, saved: Any) -> Run:
    """The new run with the old one's weights and the saved state."""
    with torch.no_grad():
        for name, p in new.params.items():
            p.copy_(old.params[name])
    new.optimizer.load_state_dict(saved)
    return new


def _regrouped(run: Run, optimizer: torch.optim.Optimizer) -> Run:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Run(dict(zip(run.params, params, strict=True)), optimizer, run.by_closure)


# What is expected.


def _resumes(subject: Subject, transfer: Transfer, dtype: torch.dtype | None = None) -> None:
    """Expect a run that is broken off and taken up elsewhere to end as one that is not."""
    dtype = dtype or subject.dtype
    middle, end = subject.straight(dtype)
    first = subject.start(dtype)
    first.steps(range(BEFORE))
    second = transfer(subject, first)
    expect_same(second.everything(), middle, "weights and state to arrive bit for bit")
    second.steps(range(BEFORE, BEFORE + AFTER))
    expect_same(second.everything(), end, "the same training as without the break, bit for bit")


def _expect_refusal(run: Run, state: Any, what: str) -> None:
    """Expect an exception, and everything as before."""
    before, options = run.everything(), snapshot(_options(run))
    try:
        run.optimizer.load_state_dict(state)
    except Exception:
        expect_same(run.everything(), before, f"an optimizer that refused {what} to be as before")
        expect_same(snapshot(_options(run)), options, f"an optimizer that refused {what} to have its options as before")
    else:
        raise Broken(f"expected an error for {what}; saw it loaded")


def _options(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]


def _expect_plain(value: Any, path: str) -> None:
    """Expect nothing but tensors, numbers, strings and dicts with such keys."""
    if isinstance(value, dict):
        for key, child in value.items():
            expect(isinstance(key, str), f"names in {path}", f"a key of type {type(key).__name__}")
            _expect_plain(child, f"{path}, {key}")
        return
    plain = value is None or isinstance(value, Tensor | int | float | str)
    expect(plain, "tensors, numbers, strings and dicts", f"{type(value).__name__} in {path}")


def _tensors(tree: Any) -> dict[str, Tensor]:
    """The tensors themselves, not copies, by path."""
    if isinstance(tree, Tensor):
        return {"state": tree}
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {f"{key}/{path}": x for key, child in children for path, x in _tensors(child).items()}


def _path_to_a_tensor(tree: Any) -> list[Any]:
    """The keys, of dicts in dicts, that lead to a tensor that is no mere number."""
    for key, child in tree.items() if isinstance(tree, dict) else ():
        if isinstance(child, Tensor) and child.numel() > 1:
            return [key]
        with contextlib.suppress(NotApplicable):
            return [key, *_path_to_a_tensor(child)]
    raise NotApplicable("keeps no tensors in dicts")
