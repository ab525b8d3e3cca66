"""What an H200 should come to, and by how much a measurement made or missed it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

TF32 = " in TF32"
"""Behind the name of a peer that is run so."""
HIGH = "fp32_matmul_prec='high'"
Set = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A limit, and who is measured against it: in float32 as it comes, and in TF32."""

    text: str
    limit: float
    unit: str
    value: Callable[[Sequence[Set], bool], float | None]
    """Of all sets; whether in TF32."""


def goals(sets: Sequence[Set]) -> list[dict[str, Any]]:
    """A row for each goal: what was measured, and by which factor of the limit; None where nothing was."""
    rows = []
    for goal in GOALS:
        row: dict[str, Any] = {"goal": goal.text, "limit": goal.limit, "unit": goal.unit}
        for way, tf32 in (("float32", False), ("tf32", True)):
            value = goal.value(sets, tf32)
            row[way] = value
            row[f"{way}_met"] = None if value is None else value <= goal.limit
            row[f"{way}_of_limit"] = None if value is None else value / goal.limit
        rows.append(row)
    return rows


def milliseconds(shapes: str, name: str, options: str = "") -> Callable[[Sequence[Set], bool], float | None]:
    """The mean step of one of ours; a model that was cut counts in proportion."""

    def value(sets: Sequence[Set], tf32: bool) -> float | None:
        label = _label(name, tf32, options)
        for one, row in _rows(sets, shapes):
            if row["contender"] == label:
                return _mean(one, row) * one["of_layers"] / one["layers"]
        return None

    return value


def over(name: str, base: str) -> Callable[[Sequence[Set], bool], float | None]:
    """The mean step of one of ours over that of another of ours, on GPT-2's shapes."""

    def value(sets: Sequence[Set], tf32: bool) -> float | None:
        ours, other = (milliseconds("gpt2-124m", one)(sets, tf32) for one in (name, base))
        return None if ours is None or other is None else ours / other

    return value


def over_peers(name: str, of: str = "") -> Callable[[Sequence[Set], bool], float | None]:
    """The mean step of one of ours over that of the fastest peer of its family, in the set where that is worst.

    In TF32 both are; ``of``: only peers whose names begin with it.
    """

    def value(sets: Sequence[Set], tf32: bool) -> float | None:
        label = _label(name, tf32)
        ratios = []
        for one in sets:
            rows = [row for row in one["rows"] if not row["error"]]
            for ours in (row for row in rows if row["contender"] == label):
                peers = [
                    _mean(one, row)
                    for row in rows
                    if not row["ours"]
                    and row["family"] == ours["family"]
                    and row["contender"].endswith(TF32) == tf32
                    and row["contender"].startswith(of)
                ]
                ratios += [_mean(one, ours) / min(peers)] if peers else []
        return max(ratios, default=None)

    return value


def unevenness(sets: Sequence[Set], tf32: bool) -> float | None:
    """The longest step over the mean, staggered."""
    options = f"{HIGH},stagger=True" if tf32 else "stagger=True"
    found = [row[one["clock"]]["max_over_mean"] for one, row in _rows(sets, "gpt2-124m", f"soap-f10({options})")]
    return max(found, default=None)


GOALS = (
    Goal("GPT-2 124M, SOAP f = 10", 12.0, "ms", milliseconds("gpt2-124m", "soap-f10")),
    Goal("GPT-2 124M, SOAP f = 1", 45.0, "ms", milliseconds("gpt2-124m", "soap-f1")),
    Goal("GPT-2 124M, one-sided SOAP f = 10", 3.0, "ms", milliseconds("gpt2-124m", "soap-f10", "max_precond_dim=768")),
    Goal("GPT-2 124M, KL over SOAP, f = 10", 1.05, "", over("kl-soap-f10", "soap-f10")),
    Goal("1B, SOAP f = 10", 300.0, "ms", milliseconds("llama-1b", "soap-f10")),
    Goal("SOAP f = 1 over the fastest peer", 0.2, "", over_peers("soap-f1")),
    Goal("SOAP f = 10 over the fastest peer", 0.33, "", over_peers("soap-f10")),
    Goal("Muon over torch.optim.Muon", 0.6, "", over_peers("muon", "torch.optim")),
    Goal("longest step over the mean, SOAP f = 10, staggered", 1.5, "", unevenness),
)


def _label(name: str, tf32: bool, options: str = "") -> str:
    """As contenders are named; Muon computes in bfloat16, whatever float32 is computed in."""
    words = ",".join(word for word in (HIGH if tf32 and name != "muon" else "", options) if word)
    return f"{name}({words})" if words else name


def _rows(sets: Sequence[Set], shapes: str, contender: str = "") -> Iterator[tuple[Set, dict[str, Any]]]:
    """What was measured on some shapes, the model with most layers first."""
    for one in sorted(sets, key=lambda one: -int(one["layers"])):
        for row in one["rows"]:
            if one["name"] == shapes and not row["error"] and contender in ("", row["contender"]):
                yield one, row


def _mean(one: Set, row: dict[str, Any]) -> float:
    mean = row[one["clock"]]["mean"]
    return math.nan if mean is None else float(mean)
