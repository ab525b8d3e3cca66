"""Chapters 6, 7, 8 and 13: state that can be saved, and training that resumes from it bit for bit."""

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

from steepest.testing.evidence import (
    Broken,
    NotApplicable,
    Snapshot,
    expect,
    expect_close,
    expect_same,
    leaves,
    snapshot,
)
from steepest.testing.run import Run
from steepest.testing.subject import Subject, clause

Transfer = Callable[[Subject, Run], Run]
"""A function that returns an interrupted run as another process would have it."""


@clause(6, "state holds tensors, numbers, strings and dicts only")
def plain_state(subject: Subject) -> None:
    """Lists break flattened distributed checkpoints, and objects break ``torch.load(weights_only=True)``."""
    for key, named in _saved(subject)["state"].items():
        _expect_plain(named, f"the state of parameter {key}")


@clause(6, "a saved state can be read with weights_only=True")
def weights_only(subject: Subject) -> None:
    """Hosts read ``optimizer.pt`` that way, because pickles can run any code; so options must be plain as well."""
    state = _saved(subject)
    read = through_file(state)
    expect_same(snapshot(read["state"]), snapshot(state["state"]), "the saved state to come back from a file")


@clause(7, "resume from a file, float32")
def resume_float32(subject: Subject) -> None:
    """With a ``state_dict`` saved, read and loaded into a new optimizer, training goes on bit for bit as before."""
    _resumes(subject, by_file, torch.float32)


@clause(7, "resume from a file, bfloat16 parameters")
def resume_bfloat16(subject: Subject) -> None:
    """With bfloat16 parameters training goes on bit for bit, too; torch's own loading casts state to their dtype."""
    _resumes(subject, by_file, torch.bfloat16)


@clause(7, "resume from copy.deepcopy")
def resume_deepcopy(subject: Subject) -> None:
    """A deep copy trains independently: hosts copy optimizers for evaluation, averaging and dry runs."""
    _resumes(subject, functools.partial(by_copy, duplicate=copy.deepcopy))


@clause(7, "resume from pickle")
def resume_pickle(subject: Subject) -> None:
    """A pickled optimizer, with its parameters, trains on: launchers send optimizers to other processes."""
    _resumes(subject, functools.partial(by_copy, duplicate=lambda optimizer: pickle.loads(pickle.dumps(optimizer))))


@clause(7, "resume from before the first step")
def resume_untrained(subject: Subject) -> None:
    """The state of an optimizer before its first step, as hosts save it, loads into a new and into a used optimizer."""
    expected = subject.start()
    saved = through_file(expected.optimizer.state_dict())
    fresh, used = subject.start(), subject.start()
    used.steps(range(2))
    for run in (fresh, used):
        carry(expected.params, run, copy.deepcopy(saved))
    for run in (expected, fresh, used):
        run.steps(range(4))
    expect_same(fresh.everything(), expected.everything(), "a new optimizer with an unused state to train as usual")
    expect_same(used.weights(), expected.weights(), "a used optimizer with an unused state to begin anew")


@clause(7, "resume by parameter name, in another order", several=True)
def resume_by_name(subject: Subject) -> None:
    """State of (name, tensor) pairs is matched by name: in another order, equal shapes would swap state unnoticed.

    Where all parameters move as one vector, in another order, rounding may differ.
    """
    if not subject.joint:
        return _resumes(subject, by_name_reversed)
    straight, first = subject.start(), subject.start()
    start = straight.weights()
    for run in (straight, first):
        run.steps(range(4))
    second = by_name_reversed(subject, first)
    for run in (straight, second):
        run.steps(range(4, 8))
    expect_alike(subject, second, straight, start, "the same training as without the break")


@clause(7, "resume with parameters that were frozen", several=True)
def resume_frozen(subject: Subject) -> None:
    """A saved state without entries for a frozen parameter loads, and the parameter may thaw later."""
    straight, first, second = (subject.start_frozen(subject.first) for _ in range(3))
    for run in (straight, first):
        run.steps(range(3))
    carry(first.params, second, through_file(first.optimizer.state_dict()))
    for run in (straight, second):
        run.params[subject.first].requires_grad_(True)
        run.steps(range(3, 6))
    expect_same(second.everything(), straight.everything(), "the same training as without the break")


@clause(7, "resume from a distributed checkpoint")
def resume_distributed(subject: Subject) -> None:
    """Training goes on bit for bit after ``get_`` and ``set_optimizer_state_dict``, as hosts of sharded models do."""
    _resumes(subject, functools.partial(by_distributed, flatten=False))


@clause(7, "resume from a flattened distributed checkpoint")
def resume_flattened(subject: Subject) -> None:
    """Training goes on bit for bit with ``flatten_optimizer_state_dict``, a name for each value: pipelines need it."""
    _resumes(subject, functools.partial(by_distributed, flatten=True))


@clause(7, "a state of other parameters is refused, and nothing has changed", several=True)
def mismatched_state(subject: Subject) -> None:
    """A state with another number of groups or parameters raises an error, and the optimizer is as before."""
    others = {"another number of parameters": subject.start(names=subject.others)}
    if subject.takes_forms:
        params = subject.params()
        in_two = [{"params": [p]} for p in list(params.values())[:2]]
        others["another number of groups"] = subject.over(params, in_two)
    run = subject.start()
    run.steps(range(2))
    for name, other in others.items():
        _expect_refusal(run, other.optimizer.state_dict(), f"a state with {name}")


@clause(7, "a damaged state is refused, and nothing has changed")
def damaged_state(subject: Subject) -> None:
    """A missing, misshapen or replaced tensor raises when it is loaded: half of a state would mix with another's."""
    run = subject.start()
    run.steps(range(2))
    saved = through_file(run.optimizer.state_dict())
    key, *path, entry = _path_to_a_tensor(saved["state"])
    damages: dict[str, Callable[[dict[str, Any]], object]] = {
        f"no {entry}": lambda values: values.pop(entry),
        f"a misshapen {entry}": lambda values: values.update({entry: torch.zeros(7, 2)}),
        f"a string for {entry}": lambda values: values.update({entry: "gone"}),
    }
    for name, damage in damages.items():
        damaged = copy.deepcopy(saved)
        damage(functools.reduce(operator.getitem, path, damaged["state"][key]))
        _expect_refusal(run, damaged, f"a state with {name}")
    forgotten = copy.deepcopy(saved)
    del forgotten["state"][key]
    _expect_refusal(run, forgotten, "a state with nothing for one parameter")
    _expect_refusal(run, {"state": saved["state"]}, "a state with no groups")


@clause(8, "a parameter's saved state is no larger than its own tensors")
def saved_size(subject: Subject) -> None:
    """A view is saved with all of its base tensor, so a batched optimizer would save all state with each parameter."""
    for key, named in _saved(subject)["state"].items():
        for path, x in leaves(named).items():
            if isinstance(x, Tensor):
                stored, what = x.untyped_storage().nbytes(), f"{x.nbytes} bytes for {path} of parameter {key}"
                expect(stored <= x.nbytes, what, f"{stored} bytes, as a view is saved")


@clause(13, "bfloat16 parameters have float32 state")
def float32_state(subject: Subject) -> None:
    """State is float32 after steps and loading: 1/1000 of a gradient changes nothing in an average with 8 bits."""
    run = subject.start(torch.bfloat16)
    run.steps(range(2))
    for where, each in (("", run), (" after loading", by_file(subject, run))):
        state = {path: x for path, x in each.everything().items() if path.startswith("state of")}
        tensors = {path: x for path, x in state.items() if isinstance(x, Tensor) and x.is_floating_point()}
        if not tensors:
            raise NotApplicable("keeps no state")
        coarse = [f"{path} in {str(x.dtype)[6:]}" for path, x in tensors.items() if x.dtype.itemsize < 4]
        expect(not coarse, f"state in float32{where}", f"{len(coarse)} tensors coarser, as {coarse[:1]}")


def expect_alike(subject: Subject, seen: Run, expected: Run, start: Snapshot, promise: str) -> None:
    """Raise `Broken` unless two runs have the same weights and state, bit for bit.

    Where all parameters move as one vector, which may join them in another order, weights are the same within rounding.
    """
    if subject.joint:
        expect_close(seen.weights(), expected.weights(), start, promise)
    else:
        expect_same(seen.everything(), expected.everything(), promise)


def through_file(state: Any) -> Any:
    """Save ``state`` to a file, and read it as hosts do."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_file(subject: Subject, run: Run) -> Run:
    """Transfer a run through a file, into a new optimizer over new parameters."""
    return carry(run.params, subject.start(run.dtype), through_file(run.optimizer.state_dict()))


def by_copy(subject: Subject, run: Run, duplicate: Callable[[Any], Any]) -> Run:
    """Transfer a run by a copy of the optimizer, which contains copies of its parameters.

    Where it was given a model, both are copied together.
    """
    if subject.by_model:
        params, optimizer, source = duplicate((run.params, run.optimizer, run.source))
        return Run(params, optimizer, source)
    optimizer = duplicate(run.optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Run(dict(zip(run.params, params, strict=True)), optimizer, run.source)


def by_name_reversed(subject: Subject, run: Run) -> Run:
    """Transfer a run from an optimizer of (name, tensor) pairs to one of the same pairs in reverse order.

    The layers of a model are in reverse order, where the optimizer has their parameters' names.
    """
    if not subject.takes_forms:
        if not all("param_names" in group for group in run.optimizer.param_groups):
            raise NotApplicable("takes a model, and keeps no names of its parameters")
        params = dict(reversed(subject.params(run.dtype).items()))
        return carry(run.params, subject.over(params, list(params.values())), through_file(run.optimizer.state_dict()))
    named = subject.over(run.params, list(run.params.items()))
    named.optimizer.load_state_dict(run.optimizer.state_dict())
    params = dict(reversed(subject.params(run.dtype).items()))
    new = subject.over(params, list(params.items()))
    return carry(run.params, new, through_file(named.optimizer.state_dict()))


def by_distributed(subject: Subject, run: Run, flatten: bool) -> Run:
    """Transfer a run by the state dicts of torch.distributed.checkpoint, in one process."""
    if not torch.distributed.is_available():
        raise NotApplicable("this torch was built without torch.distributed")
    import torch.distributed.checkpoint.state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = through_file(dcp.get_optimizer_state_dict(_model(run.params), run.optimizer, options=options))
    new = carry(run.params, subject.start(run.dtype))
    dcp.set_optimizer_state_dict(_model(new.params), new.optimizer, saved, options=options)
    return new


def _model(params: Mapping[str, Tensor]) -> nn.Module:
    """Return a model of the given parameters, with names without dots."""
    return nn.ParameterDict({name.replace(".", "_"): p for name, p in params.items()})


def carry(weights: Mapping[str, Tensor], run: Run, saved: Any = None) -> Run:
    """Copy weights into a run, load the saved state if there is one, and return the run."""
    with torch.no_grad():
        for name, p in run.params.items():
            p.copy_(weights[name])
    if saved is not None:
        run.optimizer.load_state_dict(saved)
    return run


def _saved(subject: Subject) -> dict[str, Any]:
    """Return the ``state_dict`` of a run after two steps."""
    run = subject.start()
    run.steps(range(2))
    return run.optimizer.state_dict()


def _resumes(subject: Subject, transfer: Transfer, dtype: torch.dtype | None = None) -> None:
    """Expect a run that is interrupted and transferred to end as one that is not, and to leave the original alone."""
    straight, first = subject.start(dtype), subject.start(dtype)
    for run in (straight, first):
        run.steps(range(4))
    second = transfer(subject, first)
    middle = straight.everything()
    expect_same(second.everything(), middle, "weights and state to arrive bit for bit")
    for run in (straight, second):
        run.steps(range(4, 8))
    expect_same(second.everything(), straight.everything(), "the same training as without the break, bit for bit")
    expect_same(first.everything(), middle, "no change in the original while its copy trains")
    first.steps(range(4, 8))
    expect_same(first.everything(), straight.everything(), "the original to train on as if there were no copy")


def _expect_refusal(run: Run, state: Any, name: str) -> None:
    """Expect loading to raise an error, and the optimizer to be as before."""
    before = _all_of(run)
    try:
        run.optimizer.load_state_dict(state)
    except Exception:
        expect_same(_all_of(run), before, f"an optimizer that refused {name} to be as before")
    else:
        raise Broken(f"expected an error for {name}; saw it loaded")


def _all_of(run: Run) -> Snapshot:
    """Return a copy of weights, state and options."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    return run.everything() | snapshot({"group": groups})


def _expect_plain(value: Any, path: str) -> None:
    """Expect only tensors, numbers, strings, and dicts of these with string keys."""
    if isinstance(value, dict):
        for key, child in value.items():
            expect(isinstance(key, str), f"names in {path}", f"a key of type {type(key).__name__}")
            _expect_plain(child, f"{path}, {key}")
        return
    plain = value is None or isinstance(value, Tensor | int | float | str)
    expect(plain, "tensors, numbers, strings and dicts", f"{type(value).__name__} in {path}")


def _path_to_a_tensor(tree: Any) -> list[Any]:
    """Return the keys of nested dicts that lead to a tensor with several entries."""
    for key, child in tree.items() if isinstance(tree, dict) else ():
        if isinstance(child, Tensor) and child.numel() > 1:
            return [key]
        with contextlib.suppress(NotApplicable):
            return [key, *_path_to_a_tensor(child)]
    raise NotApplicable("keeps no tensors in dicts")
