"""Taking over the state of another library's optimizer.

saved     the other optimizer's state, one parameter after the other, and which one here each is
dialects  what its entries mean, in the terms and conventions of this package
placing   where that belongs in the state of a rule
report    what was taken over, to print
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from steepest.adopting.dialects import read
from steepest.adopting.placing import Values, place
from steepest.adopting.report import Adoption, Row
from steepest.adopting.saved import NoCounterpart, Saved, match, saved_parameters
from steepest.engine.optimizer import Optimizer
from steepest.exchange.shards import is_dtensor
from steepest.rule import State
from steepest.stack.names import parameter_names

__all__ = ["Adoption", "Row", "adopt"]

COMPARED = (
    "lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "amsgrad", "shampoo_beta", "precondition_frequency",
)  # fmt: skip
"""Options that have the same meaning under the same name in other libraries."""
COUNTS_AND_MARKS = ("step", "clock", "in_basis")
"""Entries that are not worth a word where they start fresh and others don't."""


def adopt(optimizer: Optimizer, state_dict: Mapping[str, Any], names: Sequence[str] | None = None) -> Adoption:
    """Take over the state of another library's optimizer, as far as it has a meaning here.

    Moments, momenta, bases and numbers of updates are taken over, and converted where conventions differ. Options stay
    as they are here. docs/checkpoints.md lists the optimizers that are known.

    Args:
        optimizer: The one that takes over, before its first step.
        state_dict: The other one's. If there were several, adopt one after the other, with names.
        names: The names of the parameters in ``state_dict``, in its order, if it has none. For an optimizer of
            ``model.parameters()`` they are ``[name for name, _ in model.named_parameters()]``.

    Returns:
        What was taken over; what starts fresh, and why; which options differ.

    Raises:
        ValueError: If it can't be told which parameter is which, if entries are damaged, or if parameters are sharded.
            Nothing has changed then.

    Example:
        >>> import torch, steepest
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> adamw.step()
        >>> optimizer = steepest.for_model(model, "muon", lr=3e-3, weight_decay=0.01)
        >>> print(steepest.adopt(optimizer, adamw.state_dict(), [name for name, _ in model.named_parameters()]))
        parameter  rule   taken over                 starts fresh
        0.weight   muon   momentum_buffer
        0.bias     adamw  exp_avg, exp_avg_sq, step
        2.bias     adamw  exp_avg, exp_avg_sq, step
        2.weight   adamw  exp_avg, exp_avg_sq, step
        group 0: lr=0.003, there 0.001
        ...
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__}: only an optimizer of steepest takes over another one's state")
    groups = optimizer.param_groups
    if any(is_dtensor(p) for group in groups for p in group["params"]):
        raise ValueError("parameters are sharded: adopt in one process, and load its state with load_consolidated")
    saved, named = saved_parameters(state_dict, names)
    found = match(groups, saved, named)
    rows: list[Row] = []
    values: dict[Tensor, Values] = {}
    options: list[str] = []
    labels = iter(parameter_names(groups))
    for number, group in enumerate(groups):
        for p in group["params"]:
            here, why = optimizer.state.get(p, {}), ""
            try:
                values[p] = _values(found.get(p), p, group, here)
                options += _differences(number, group, found[p].options)
            except NoCounterpart as reason:
                values[p], why = {}, str(reason)
            rows.append(_row(next(labels), group["rule"], here, values[p], why))
    _load(optimizer, values)
    known = {one.name for one in found.values()}
    left = [one.name for one in saved if one.name not in known] if len(found) < len(saved) else []
    return Adoption(tuple(rows), tuple(dict.fromkeys(options)), tuple(left))


def _values(saved: Saved | None, p: Tensor, group: Mapping[str, Any], here: State) -> Values:
    """Return what a parameter takes over."""
    if saved is None:
        raise NoCounterpart("not in the saved state")
    if not here:
        raise NoCounterpart("it has no state before its first gradient")
    return place(read(saved, p.shape), p, group, here)


def _row(name: str, rule: str, here: State, values: Values, why: str) -> Row:
    taken = tuple(key for key in here if key in values)
    silent = COUNTS_AND_MARKS if taken else ()
    fresh = tuple(key for key in here if key not in values and key.split(".")[0] not in silent)
    return Row(name, rule, taken, fresh, why or ("the saved state has no such thing" if fresh else ""))


def _differences(number: int, group: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options that a group has at other values than the saved group of one of its parameters."""
    for name in COMPARED:
        if name in group and name in there:
            mine, theirs = (_plain(options[name]) for options in (group, there))
            if mine != theirs:
                yield f"group {number}: {name}={mine!r}, there {theirs!r}"


def _plain(value: Any) -> Any:
    """Return a number as a number if it is a tensor, and a list as a tuple."""
    if isinstance(value, Tensor):
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def _load(optimizer: Optimizer, values: Mapping[Tensor, Values]) -> None:
    """Load a state that has these values, and is otherwise the optimizer's own."""
    state_dict = optimizer.state_dict()
    for group, there in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for p, key in zip(group["params"], there["params"], strict=True):
            for name, value in values[p].items():
                x = state_dict["state"][key][name]
                x.copy_(value) if isinstance(value, Tensor) else x.fill_(value)
    kept = ("params", "param_names", "rule", "format")  # other options stay as they are where a state has none
    slim = [{k: group[k] for k in kept if k in group} for group in state_dict["param_groups"]]
    optimizer.load_state_dict(state_dict | {"param_groups": slim})
