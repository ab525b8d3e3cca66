"""The decisions of the suite, as pure functions of the results so far. Nothing is trained here.

*Tuning* (`next_setting`). Everybody gets `TRIALS` trials on each workload, with one seed. First the learning rate walks
by factors of `RATE_STEP` from the preset's, uphill and downhill, until the best rate has a worse one on both sides, in
at most `WALK` trials. The rates of hidden matrices and of all other parameters walk together, as AdamW's do. Then come
the two rates half a step beside the best one, and what is left of the trials goes to other settings: the rate of the
other parameters alone and weight decay. An optimizer without such a rate of its own tries its momentum instead.

*Comparison* (`next_length`, `steps_ratio`). The best setting runs with several seeds, over lengths of `LADDER`, each
with a schedule of its own, until the target lies between two of them. Where it lies is interpolated in the logarithm of
the length.

*One setting for all* (`equivalent_length`, `choose`). A loss on a workload is worth the length that AdamW needs for
it. The one setting is the rate, of all that were tried with the preset's other settings, that has the best geometric
mean of these lengths over all workloads.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, variance
from typing import Any, NamedTuple

from steepest.lab.shared.contenders import Contender

TRIALS = 8
"""Settings that each contender tries on each workload."""
WALK = 5
"""Most of them that the walk over learning rates takes."""
RATE_STEP = 4.0
"""Factor between neighbouring learning rates of the walk."""
HALF_STEPS = (RATE_STEP**0.5, RATE_STEP**-0.5)
"""Factors from the walk's best rate to the two that are tried beside it."""
SEEDS = 3
"""Seeds of each run that is compared with another."""
LADDER = (0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
"""Lengths of runs, as shares of the workload's."""
BASELINE_LENGTHS = (0.7, 1.0, 1.4, 2.0)
"""Lengths that the baseline runs, so that others can be compared with what it reaches in their time."""
MOST_EXTRAPOLATED = 4.0
"""A loss outside of the baseline's curve is worth at most so many times the whole length, and at least its inverse."""

MEMORIES: Mapping[str, tuple[Any, ...]] = {
    "betas": ((0.9, 0.95), (0.9, 0.99), (0.8, 0.95)),
    "momentum": (0.95, 0.8, 0.9),
}
"""Usual values of the decay rates of moments, for optimizers that step all parameters alike; two of them are tried."""
DAMPINGS = (1e-1, 1e-3)
"""Values of K-FAC's damping that are tried; its default lies between them."""
WARMUPS = (0.1, 0.5)
"""Shares of warm-up that are tried where an optimizer has no other setting."""
DECAY = 1e-3
"""Weight decay of a step, decay times rate, that is tried where the preset has none; AdamW's preset has as much."""


class Tried(NamedTuple):
    """A setting and its final loss, which is infinite where the run diverged."""

    contender: Contender
    loss: float


class Ratio(NamedTuple):
    """Steps to the target as a share of the baseline's; less is better."""

    value: float
    bound: str = ""
    """``≤`` if even the shortest run reached the target, ``≥`` if even the longest did not."""


# Tuning.


def scaled(contender: Contender, factor: float) -> Contender:
    """Return the contender with all its learning rates multiplied by ``factor``.

    >>> from steepest.lab.shared.contenders import preset
    >>> soap = scaled(preset("soap"), 4)
    >>> soap.lr, soap.elementwise["lr"], str(soap)
    (0.08, 0.08, 'soap lr 0.08')
    """
    changes: dict[str, Any] = {"lr": contender.lr * factor}
    if contender.elementwise and "lr" in contender.elementwise:
        changes["elementwise"] = {"lr": contender.elementwise["lr"] * factor}
    return contender.varied(**changes)


def next_setting(start: Contender, losses: Sequence[float], trials: int = TRIALS) -> Contender | None:
    """Return the setting to try after trials that ended at these losses; None after ``trials`` of them, or of fewer.

    With more trials than `TRIALS` the walk may be longer; the plan ends earlier when nothing is left to try.

    >>> from steepest.lab.shared.contenders import preset
    >>> str(next_setting(preset("adamw"), [])), str(next_setting(preset("adamw"), [2.0]))
    ('adamw lr 0.01', 'adamw lr 0.04')
    """
    if len(losses) >= trials:
        return None
    plan = _plan(start, trials)
    try:
        setting = next(plan)
        for loss in losses:
            setting = plan.send(loss)
    except StopIteration:
        return None
    return setting


def best_of(tried: Sequence[Tried]) -> Tried:
    """Return the trial with the lowest loss; among equals, such as diverged ones, that with the lowest rate."""
    return min(tried, key=lambda trial: (trial.loss, trial.contender.lr))


def edges(tried: Sequence[Tried]) -> tuple[str, ...]:
    """Return the settings whose best value has no worse one on both sides, so that a better one may lie beyond.

    These are ``lr`` and ``elementwise``, the rate of parameters that are no hidden matrices relative to that of those.
    """
    best = best_of(tried).contender
    rates = {trial.contender.lr for trial in tried}
    shares = {_share(trial.contender) for trial in tried}
    moved = _share(best) != _share(tried[0].contender)
    found = [("lr", best.lr in (min(rates), max(rates)))]
    found.append(("elementwise", moved and _share(best) in (min(shares), max(shares))))
    return tuple(name for name, at_edge in found if at_edge)


def _share(contender: Contender) -> float:
    """Return the rate of parameters that are no hidden matrices as a share of that of those; 1 where all are alike."""
    rate = (contender.elementwise or {}).get("lr", contender.lr)
    return float(f"{rate / contender.lr:.6g}")


def _plan(start: Contender, trials: int) -> Generator[Contender, float, None]:
    """Yield the settings to try, at least ``trials`` if there are so many; each one's loss is sent back."""
    walk: dict[int, float] = {}
    while len(walk) < max(WALK, trials - TRIALS + WALK) and (k := next_exponent(walk)) is not None:
        walk[k] = yield scaled(start, RATE_STEP**k)
    tried = [Tried(scaled(start, RATE_STEP**k), loss) for k, loss in walk.items()]
    middle = best_of(tried).contender
    for factor in HALF_STEPS:
        setting = scaled(middle, factor)
        tried.append(Tried(setting, (yield setting)))
    middle = best_of(tried).contender
    for changes in _other_settings(start, middle):
        setting = _changed(best_of(tried).contender, changes)
        tried.append(Tried(setting, (yield setting)))


def rates_only(losses: Sequence[float]) -> int:
    """Return how many of the first trials differ in the rate alone: the walk, and the half steps beside its best one.

    >>> rates_only([2.0, 3.0, 2.5, 1.9, 2.1, 1.8, 1.7, 2.0])
    5
    """
    walk: dict[int, float] = {}
    for loss in losses[:WALK]:
        if (k := next_exponent(walk)) is None:
            break
        walk[k] = loss
    return len(walk) + len(HALF_STEPS)


def next_exponent(walk: Mapping[int, float]) -> int | None:
    """Return where the walk goes on, in steps from its start; None once the best rate has been passed on both sides.

    >>> next_exponent({}), next_exponent({0: 2.0}), next_exponent({0: 2.0, 1: 1.0}), next_exponent({0: 2.0, 1: 3.0})
    (0, 1, 2, -1)
    >>> next_exponent({0: 2.0, 1: 3.0, -1: 2.5}) is None
    True
    """
    if not walk:
        return 0
    best = min(walk, key=lambda k: (walk[k], k))
    return next((k for k in (best + 1, best - 1) if k not in walk), None)


def _other_settings(start: Contender, middle: Contender) -> list[dict[str, Any]]:
    """Return the changes to try once the rate is found, as `Contender.varied` takes them, the best first kept."""
    changes: list[dict[str, Any]]
    if start.elementwise and "lr" in start.elementwise:
        rate = (middle.elementwise or {})["lr"]
        changes = [{"elementwise": {"lr": rate * factor}} for factor in (RATE_STEP, 1 / RATE_STEP)]
    elif name := next((name for name in MEMORIES if name in start.options), None):
        changes = [{name: value} for value in MEMORIES[name] if value != start.options[name]]
    elif start.rule in ("kfac", "ekfac"):
        changes = [{"damping": value} for value in DAMPINGS]
    else:
        changes = [{"warmup": value} for value in WARMUPS if value != start.warmup]
    decay = {"weight_decay": 0.0 if start.options.get("weight_decay") else DECAY / middle.lr}
    return [*changes[:2], decay | ({"elementwise": decay} if start.elementwise else {})]


def _changed(contender: Contender, changes: Mapping[str, Any]) -> Contender:
    """Return the contender with these changes, and its name says so."""
    words = [f"{name} {value['lr']:g}" for name, value in changes.items() if isinstance(value, dict) and "lr" in value]
    words += [f"{name} {value}" for name, value in changes.items() if not isinstance(value, dict)]
    variant = ", ".join([contender.variant or f"lr {contender.lr:g}", *words])
    return replace(contender.varied(**changes), variant=variant)


# Comparison.


def next_length(losses: Mapping[float, float], target: float) -> float | None:
    """Return the next length to run, given the mean final loss of each that was run; None if they are enough.

    >>> next_length({}, 2.0), next_length({1.0: 1.9}, 2.0), next_length({1.0: 1.9, 0.7: 2.1}, 2.0)
    (1.0, 0.7, None)
    >>> next_length({1.0: 2.1}, 2.0), next_length({1.0: 2.1, 1.4: 2.05, 2.0: 2.01}, 2.0)
    (1.4, None)
    """
    if 1.0 not in losses:
        return 1.0
    if not math.isfinite(target):
        return None
    down = losses[1.0] <= target
    for share in [s for s in reversed(LADDER) if s < 1] if down else [s for s in LADDER if s > 1]:
        if share not in losses:
            return share
        if (losses[share] <= target) != down:
            return None
    return None


def steps_ratio(losses: Mapping[float, float], target: float) -> Ratio:
    """Return the length at which the target is reached, interpolated between lengths that were run.

    >>> steps_ratio({1.0: 1.5, 0.5: 2.5}, 2.0).value == 0.5**0.5
    True
    >>> steps_ratio({0.25: 1.0, 0.35: 1.0}, 2.0), steps_ratio({1.0: 2.2, 2.0: 2.1}, 2.0)
    (Ratio(value=0.25, bound='≤'), Ratio(value=2.0, bound='≥'))
    """
    shares = sorted(losses)
    first = next((share for share in shares if losses[share] <= target), None)
    if first is None:
        return Ratio(shares[-1], "≥")
    before = max((share for share in shares if share < first), default=None)
    if before is None or not math.isfinite(losses[before]):
        return Ratio(first, "≤")
    part = (losses[before] - target) / (losses[before] - losses[first])
    return Ratio(before * (first / before) ** part)


def significant(ours: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether two means of final losses over seeds differ by more than luck.

    They do if their difference, times the square root of the number of seeds, exceeds twice the pooled standard
    deviation over seeds. Where one side diverged, they do unless the other diverged, too.

    >>> significant([1.0, 1.1, 1.2], [1.5, 1.6, 1.7]), significant([1.0, 1.1, 1.2], [1.1, 1.2, 1.3])
    (True, False)
    """
    if not all(map(math.isfinite, (*ours, *others))):
        return all(map(math.isfinite, ours)) != all(map(math.isfinite, others))
    count = min(len(ours), len(others))
    if count < 2:
        return False
    spread = math.sqrt((variance(ours) + variance(others)) / 2)
    return abs(fmean(ours) - fmean(others)) * math.sqrt(count) > 2 * spread


def loss_at(curve: Mapping[float, float], share: float) -> float | None:
    """Return the baseline's loss after ``share`` of the length, interpolated; None outside of what it ran.

    >>> loss_at({1.0: 2.0, 2.0: 1.0}, 2**0.5), loss_at({1.0: 2.0}, 3.0)
    (1.5, None)
    """
    for (a, loss_a), (b, loss_b) in pairwise(sorted(curve.items())):
        if a <= share <= b:
            return loss_a + (loss_b - loss_a) * math.log(share / a) / math.log(b / a)
    return curve.get(share)


# One setting for all.


def equivalent_length(curve: Mapping[float, float], loss: float) -> float:
    """Return the length that the baseline needs for this loss, as a share of the workload's.

    The baseline's curve is interpolated in the logarithm of the length. Beyond its ends it goes on with its mean slope,
    up to `MOST_EXTRAPOLATED` times the length or its share.

    >>> curve = {1.0: 2.0, 2.0: 1.0}
    >>> [round(equivalent_length(curve, loss), 2) for loss in (1.5, 0.5, 2.5, float("inf"), -9.0)]
    [1.41, 2.83, 0.71, 0.25, 4.0]
    """
    lowest = math.inf
    points = []
    for share, height in sorted(curve.items()):  # a longer run that ends higher says nothing
        if math.isfinite(height) and height < lowest:
            lowest = height
            points.append((math.log(share), height))
    if not points or not math.isfinite(loss):
        return 1 / MOST_EXTRAPOLATED
    (first, top), (last, bottom) = points[0], points[-1]
    slope = (last - first) / (top - bottom) if len(points) > 1 else math.inf
    most = math.log(MOST_EXTRAPOLATED)
    if loss == top:
        found = first
    elif loss > top:
        found = first - (loss - top) * slope
    elif loss < bottom:
        found = last + (bottom - loss) * slope
    else:
        found = next(
            a + (b - a) * (high - loss) / (high - low)
            for (a, high), (b, low) in pairwise(points)
            if low <= loss <= high
        )
    return math.exp(min(most, max(-most, found)))


def choose(lengths: Sequence[Mapping[str, float]], workloads: Sequence[str]) -> tuple[int, list[str]]:
    """Return the best setting for all workloads, and on which of these it must be run before that is certain.

    Args:
        lengths: For each setting, the equivalent length on each workload on which it was run.
        workloads: All workloads.

    Where a setting was not run it can't be better than the best that any setting reaches there. The one that could
    still become the best in the geometric mean is completed first; once that is complete, it is the best.

    >>> choose([{"a": 2.0, "b": 2.0}, {"a": 1.0}], "ab"), choose([{"a": 2.0, "b": 1.0}, {"b": 2.0}], "ab")
    ((0, []), (1, ['a']))
    """
    top = {name: max((row[name] for row in lengths if name in row), default=1.0) for name in workloads}
    hopes = [fmean(math.log(row.get(name, top[name])) for name in workloads) for row in lengths]
    best = max(range(len(lengths)), key=lambda i: (hopes[i], len(lengths[i])))
    return best, [name for name in workloads if name not in lengths[best]]
