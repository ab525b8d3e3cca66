"""Comparisons of what was seen with what was expected, and descriptions of their differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Snapshot = dict[str, Any]
"""The leaves of nested containers by path."""


class Broken(AssertionError):
    """The clause is broken; the message is the evidence."""


class NotApplicable(Exception):
    """The clause does not apply to this optimizer; the message is the reason."""


def expect(condition: bool, expected: str, seen: object) -> None:
    """Raise `Broken` unless ``condition``, with the evidence: what was expected, and what was seen."""
    if not condition:
        raise Broken(f"expected {expected}; saw {seen}")


def leaves(tree: Any, path: str = "") -> Snapshot:
    """Return the leaves of nested dicts, lists and tuples, by path.

    >>> leaves({"W": {"step": 3, "norms": [1.0, 2.0]}})
    {'W/step': 3, 'W/norms/0': 1.0, 'W/norms/1': 2.0}
    """
    if not isinstance(tree, Mapping | list | tuple):
        return {path: tree}
    children = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    prefix = f"{path}/" if path else ""
    return {at: leaf for key, child in children for at, leaf in leaves(child, f"{prefix}{key}").items()}


def snapshot(tree: Any) -> Snapshot:
    """Return a copy of the leaves of nested dicts, lists and tuples, by path."""
    return {path: x.detach().clone() if isinstance(x, Tensor) else x for path, x in leaves(tree).items()}


def expect_same(seen: Snapshot, expected: Snapshot, promise: str) -> None:
    """Raise `Broken` unless two snapshots are the same, bit for bit."""
    both = expected.keys() & seen.keys()
    differences = [f"{path} missing" for path in expected.keys() - both]
    differences += [f"{path} new" for path in seen.keys() - both]
    differences += [f"{path}: {how}" for path in both if (how := difference(seen[path], expected[path]))]
    _report(promise, sorted(differences))


def expect_close(seen: Snapshot, expected: Snapshot, start: Snapshot, promise: str, tolerance: float = 1e-3) -> None:
    """Raise `Broken` unless weights moved as expected, within a share ``tolerance`` of the way and rounding."""
    differences = []
    for name, x in expected.items():
        moved = (x.double() - start[name].double()).norm().item()
        off = (seen[name].double() - x.double()).norm().item()
        rounding = torch.finfo(x.dtype).eps * x.double().norm().item()
        if not off <= tolerance * moved + rounding:
            differences.append(f"{name}: off by {off:.2g} where the expected ones moved by {moved:.2g}")
    _report(promise, differences)


def expect_moved(seen: Snapshot, start: Snapshot, promise: str) -> None:
    """Raise `Broken` unless every parameter moved, to finite values."""
    still = [name for name, x in seen.items() if x.numel() and torch.equal(x, start[name])]
    _report(promise, [f"{name} did not move" for name in still])
    expect_finite(seen, promise)


def expect_finite(seen: Snapshot, promise: str) -> None:
    """Raise `Broken` if any number is NaN or infinite."""
    bad = {path: (x.numel(), int((~x.isfinite()).sum())) for path, x in seen.items() if isinstance(x, Tensor)}
    _report(promise, [f"{path}: {n} of {size} entries NaN or infinite" for path, (size, n) in bad.items() if n])


def difference(seen: Any, expected: Any) -> str:
    """Return how two leaves differ, or "" if they are the same, where NaN equals NaN.

    >>> difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    '1 of 2 entries differ, first 2 expected, 2.5 seen'
    """
    if isinstance(seen, Tensor) and isinstance(expected, Tensor):
        if seen.dtype != expected.dtype or seen.shape != expected.shape:
            return f"{_kind(expected)} expected, {_kind(seen)} seen"
        off = ~((seen == expected) | (seen.isnan() & expected.isnan()))
        if not off.any():
            return ""
        was, now = (x[off].flatten()[0].item() for x in (expected, seen))
        return f"{int(off.sum())} of {off.numel()} entries differ, first {was:.9g} expected, {now:.9g} seen"
    by_identity: Any = object.__eq__
    if type(seen).__eq__ is by_identity and type(seen) is type(expected):
        return ""  # objects that can't be compared, which clauses on plain state report
    both_nan = seen != seen and expected != expected
    return "" if seen == expected or both_nan else f"{_word(expected)} expected, {_word(seen)} seen"


def one_line(error: BaseException) -> str:
    """Return an exception in one line.

    >>> one_line(KeyError("lr"))
    "KeyError: 'lr'"
    """
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:160]}" if words else type(error).__name__


def _report(promise: str, differences: list[str]) -> None:
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise Broken(f"expected {promise}; saw {differences[0]}{more}")


def _word(x: Any) -> str:
    return _kind(x) if isinstance(x, Tensor) and x.numel() > 1 else repr(x)[:60]


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
