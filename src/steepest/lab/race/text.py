"""The text of the results: headline, notes, tables and JSON, for the console and the report alike."""

from __future__ import annotations

import math
from dataclasses import fields
from operator import attrgetter
from typing import Any

from steepest.lab.race.results import Result, Results
from steepest.lab.race.trial import distance, loss
from steepest.lab.shared.contenders import Contender
from steepest.lab.shared.table import Table


def headline(results: Results) -> tuple[str, str]:
    """Return the race in one sentence, and one more with the losses that it rests on."""
    base = results.baseline
    if base is None or results.target is None:
        return "The baseline has not finished a run yet, so there is nothing to compare with.", ""
    rivals = [result for result in results.entries if result is not base]
    poison = f" with {poisoned(results.plan.poison)}" if results.plan.poison else ""
    length = distance(results.plan.steps, results.plan.seconds)
    losses = f"After {length}{poison}, {base.label} ends at a loss of {loss(base.final)}"
    if not rivals:
        return "No other contender has finished a run to compare with.", f"{losses}."
    top = min(rivals, key=lambda result: result.final)
    if math.isfinite(top.final):
        losses += f"{_of_others(top, rivals, base)} at {loss(top.final)}."
    else:
        losses += "; the others diverged."
    ahead = [result for result in rivals if result.beats(base) and result.steps_share and result.time_share]
    if not ahead:
        noise = " by more than the noise between seeds" if results.plan.seeds > 1 else ""
        return f"No contender is ahead of {base.label}{noise}.", losses
    fewest, fastest = (min(ahead, key=attrgetter(share)) for share in ("steps_share", "time_share"))
    at_most = {"≤": "at most ", "": ""}
    steps = f"{at_most[fewest.bound]}{percent(fewest.steps_share)} of {base.label}'s steps"
    time = f"{at_most[fastest.bound]}{percent(fastest.time_share)} of {base.label}'s {results.clock}"
    claim = f"{fewest.label} reaches {base.label}'s final loss after {steps}"
    if (fastest.time_share or 1) >= 1:
        return f"{claim}; no contender is shown to need less {results.clock}.", losses
    return claim + (f" and {time}." if fastest is fewest else f", and {fastest.label} after {time}."), losses


def _of_others(top: Result, rivals: list[Result], base: Result) -> str:
    """Return how the sentence on the losses goes on from the baseline to the best of its rivals."""
    if len(rivals) == 1:
        return f", and {top.label}"
    return f", and {top.label}, {'the lowest' if top.final < base.final else 'the next'},"


def notes(results: Results) -> list[str]:
    """Return what a reader must know to read the table correctly."""
    lines = [_poison_note(results)] if results.plan.poison else []
    lines += [_tuning_note(results), _noise_note(results)]
    chosen = [f"{result.label} {others}" for result in results.entries if (others := _other_choices(result))]
    if chosen:
        lines.append(f"Best of what was tuned besides lr: {'; '.join(chosen)}.")
    if results.plan.seconds:
        lines.append(f"Everybody had {results.plan.seconds:g} s of {results.clock}: numbers of steps differ.")
    if own := [result.label for result in results.entries if result.own_passes]:
        lines.append(f"In the times of {', '.join(own)} the model's passes and the optimizer's work are not separable.")
    if any(result.best_at_edge_of for result in results.entries):
        lines.append("* best at the edge of what was tried: the optimum may lie beyond.")
    if any(result.bound for result in results.entries):
        lines.append("≤ where a run passes the target before its learning rate has come down: an upper bound.")
    return lines


def _poison_note(results: Results) -> str:
    counts = (
        f"{r.label} {'uncounted' if r.updates_skipped is None else r.updates_skipped} of {r.gradients_poisoned}"
        for r in results.entries
    )
    return (
        "At each step each parameter's gradient got NaN or infinite entries with probability "
        f"{results.plan.poison:g}. Updates left out, of the gradients poisoned: {', '.join(counts)}."
    )


def _tuning_note(results: Results) -> str:
    """Say how equal the tuning was."""
    counts = {result.settings_tried for result in results.entries}
    seeds, all_seeds = (plural(count, "seed") for count in (results.plan.tuning_seeds, results.plan.seeds))
    if counts == {1}:
        return f"Everybody ran at preset settings, {all_seeds} each; --full tunes all with the same number of trials."
    if len(counts) == 1:
        return f"Everybody was tuned with the same number of trials: {counts.pop()} settings × {seeds}."
    tried = ", ".join(f"{result.label} {result.settings_tried}" for result in results.entries)
    return f"Not tuned equally. Settings tried, × {seeds}: {tried}."


def _noise_note(results: Results) -> str:
    """Say how large a difference must be to mean anything."""
    if results.plan.seeds < 2:
        return "One seed only: there is no telling how much of a difference is luck."
    if not math.isfinite(results.noise):
        return "No setting has finished two seeds: there is no telling how much of a difference is luck."
    return (
        f"{plural(results.plan.seeds, 'seed')}: the same setting ends up to {results.noise:.2g} apart, "
        "so smaller differences between contenders mean nothing (and few seeds understate it)."
    )


def _other_choices(result: Result) -> str:
    """Return the best values of tuned settings other than the learning rate, starred like it."""
    names = [name for name in result.entry.tuned if name != "lr"]
    return ", ".join(f"{name}={result.best.value(name)}{_star(result, name)}" for name in names)


def main_table(results: Results) -> Table:
    """Return one row per entry, within eighty columns unless labels are long."""
    base, clock = results.plan.baseline.label, results.clock.replace(" ", "\n")
    head = ["contender", "best\nlr", "final loss", f"steps to\n{base}'s", f"{clock}\nto it", "ms/step\nmodel\n+opt"]
    return Table([*head, "opt ms\np50/p95", "state\nB/par", "peak\nMB"], [_cells(result) for result in results.entries])


def columns(results: Results) -> list[str]:
    """Return what the columns of the main table say, in their order."""
    base, clock = results.plan.baseline.label, results.clock
    spread = ", and half its range" if results.plan.seeds > 1 else ""
    return [
        "best lr: the learning rate of the hidden matrices with the lowest final loss.",
        f"final loss: the validation loss at the end, as a mean over seeds{spread}; rows are in its order.",
        f"steps to {base}'s: steps until the loss is {base}'s final one, and in parentheses divided by {base}'s steps.",
        f"{clock} to it: {clock} of model and optimizer until then, divided by {base}'s; below 1 is better.",
        "ms/step: mean milliseconds of a step, for the model's passes and for the optimizer.",
        "opt ms: milliseconds of the optimizer's steps, the median and the 95th percentile.",
        "state: bytes of the optimizer's state for each parameter of the model.",
        "peak: megabytes that the optimizer's construction and first step hold at once, its state among them; "
        "weights and gradients are not counted.",
    ]


def _cells(result: Result) -> list[str]:
    count = result.steps_to_target
    half_range = f" ±{result.half_range:#.2g}" if len(result.finals) > 1 else ""
    return [
        result.label,
        f"{result.best.rate}{_star(result, 'lr')}",
        loss(result.final) + half_range if math.isfinite(result.final) else "diverged",
        f"{count} ({result.steps_share:.2f})" if count else "not reached",
        f"{result.bound}{result.time_share:.2f}" if result.time_share else "–",
        f"{result.model_ms:.0f}+{result.optimizer_ms:.1f}",
        f"{result.optimizer_ms_p50:.1f}/{result.optimizer_ms_p95:.1f}",
        f"{result.state_bytes_per_parameter:.0f}",
        f"{result.optimizer_peak_bytes / 1e6:.3g}" if result.optimizer_peak_bytes else "–",
    ]


def _star(result: Result, name: str) -> str:
    """Mark a setting whose best value is at the edge of what was tried."""
    return "*" if name in result.best_at_edge_of else ""


def poisoned(share: float) -> str:
    """Say how many gradients were poisoned.

    >>> poisoned(0.01)
    '1% of gradients poisoned'
    """
    return f"{share * 100:.3g}% of gradients poisoned"


def percent(share: float | None) -> str:
    """Return a share in percent, with a digit more where it would be 0.

    >>> percent(0.48), percent(0.004)
    ('48%', '0.4%')
    """
    assert share is not None
    return f"{share:.0%}" if share >= 0.01 else f"{share * 100:.1g}%"


def plural(count: int, word: str) -> str:
    """Return count and word.

    >>> plural(1, "seed"), plural(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{count} {word}{'' if count == 1 else 's'}"


def settings(contender: Contender) -> str:
    """Return a contender's settings as a user would type them."""
    values = {**contender.options, "warmup": contender.warmup}
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def as_json(results: Results) -> dict[str, Any]:
    """Return the results as plain values, with None for what is not finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        return list(map(plain, value)) if isinstance(value, tuple) else value

    def entry(result: Result) -> dict[str, Any]:
        values = {f.name: getattr(result, f.name) for f in fields(result) if f.name not in ("entry", "best", "runs")}
        count = result.steps_to_target
        values |= {"final": result.final, "steps_to_target": str(count) if count else None}
        values |= {"contender": result.label, "settings": result.best.settings()}
        return {name: plain(value) for name, value in values.items()}

    return {
        "headline": " ".join(headline(results)),
        "target": results.target,
        "poison": results.plan.poison,
        "seconds": results.plan.seconds,
        "contenders": [entry(result) for result in results.entries],
    }
