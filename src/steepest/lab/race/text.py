"""What the records say, in words: headline, notes and cells of tables, for the console and the report alike."""

from __future__ import annotations

import math
from typing import Any

from steepest.lab.race.results import Finding, Findings
from steepest.lab.shared.contenders import Contender


def headline(findings: Findings) -> tuple[str, str]:
    """The race in one sentence, and one more with the losses behind it."""
    base = findings.baseline
    if base is None or findings.target is None:
        return "The baseline has not finished a run yet, so there is nothing to compare with.", ""
    rivals = [line for line in findings.lines if line is not base]
    poison = f" with {poisoned(findings.plan.poison)}" if findings.plan.poison else ""
    ends = f"After {findings.plan.steps} steps{poison}, {base.label} ends at {loss(base.final)}"
    if not rivals:
        return "Nobody has finished a run to compare with.", f"{ends}."
    top = min(rivals, key=lambda line: line.final)
    losses = (
        f"{ends}, {top.label} at {loss(top.final)}." if math.isfinite(top.final) else f"{ends}; the others diverged."
    )
    ahead = [line for line in rivals if line.beats(base) and line.steps_share and line.time_share]
    if not ahead:
        noise = " by more than the noise between seeds" if findings.plan.seeds > 1 else ""
        return f"Nobody is ahead of {base.label}{noise}.", losses
    frugal = min(ahead, key=lambda line: line.steps_share or math.inf)
    quick = min(ahead, key=lambda line: line.time_share or math.inf)
    steps = f"{_share(frugal, frugal.steps_share)} of its steps"
    time = f"{_share(quick, quick.time_share)} of its {findings.clock}"
    claim = f"{frugal.label} reaches {base.label}'s final loss in {steps}"
    return claim + (f" and {time}." if quick is frugal else f", {quick.label} in {time}."), losses


def tuning_note(findings: Findings) -> str:
    """How equal the tuning was."""
    counts = {line.tried for line in findings.lines}
    seeds = plural(findings.plan.seeds, "seed")
    trials = plural(findings.plan.tuning_seeds, "seed")
    if counts == {1}:
        return f"Everybody ran at preset settings, {seeds} each; --full tunes all with the same number of trials."
    if len(counts) == 1:
        return f"Everybody was tuned with the same number of trials: {counts.pop()} settings × {trials}."
    tried = ", ".join(f"{line.label} {line.tried}" for line in findings.lines)
    return f"Not tuned equally. Settings tried, × {trials}: {tried}."


def poison_note(findings: Findings) -> str:
    """What a poisoned race is, and what it has cost each contender."""
    counts = (
        f"{line.label} {'uncounted' if line.skipped is None else line.skipped} of {line.poisoned}"
        for line in findings.lines
    )
    return (
        "At each step each parameter's gradient got NaN or infinite entries with probability "
        f"{findings.plan.poison:g}. Updates left out, of the gradients poisoned: {', '.join(counts)}."
    )


def noise_note(findings: Findings) -> str:
    """How large a difference must be to mean anything."""
    if findings.plan.seeds < 2:
        return "One seed only: there is no telling how much of a difference is luck."
    if not math.isfinite(findings.noise):
        return "No setting has finished two seeds: there is no telling how much of a difference is luck."
    return (
        f"{plural(findings.plan.seeds, 'seed')}: the same setting ends up to {findings.noise:.2g} apart, "
        "so smaller differences between contenders mean nothing (and few seeds understate it)."
    )


def headers(findings: Findings) -> list[str]:
    """What stands over `cells`, in narrow lines."""
    base = findings.plan.baseline.label
    clock = findings.clock.replace(" ", "\n")
    return [
        "contender",
        "best\nlr",
        "final loss",
        f"steps to\n{base}'s",
        f"{clock}\nto it",
        "ms/step\nmodel\n+opt",
        "opt ms\np50/p95",
        "state\nB/par",
        "peak\nMB",
    ]


def cells(line: Finding) -> list[str]:
    """The line's numbers as short as can be."""
    return [
        line.label,
        rate(line),
        final(line),
        f"{line.reach} ({line.steps_share:.2f})" if line.reach else "not reached",
        f"{line.reach.bound}{line.time_share:.2f}" if line.reach and line.time_share else "–",
        f"{line.model_ms:.0f}+{line.optimizer_ms:.1f}",
        f"{line.optimizer_p50:.1f}/{line.optimizer_p95:.1f}",
        f"{line.bytes_per_parameter:.0f}",
        f"{line.peak_memory / 1e6:.0f}" if line.peak_memory else "–",
    ]


def loss(value: float) -> str:
    """To four digits.

    >>> loss(1.62), loss(0.0012344), loss(12345.6)
    ('1.620', '0.001234', '12346')
    """
    return f"{value:.{_decimals(value)}f}"


def poisoned(share: float) -> str:
    """What was done to the gradients.

    >>> poisoned(0.01)
    '1% of gradients poisoned'
    """
    return f"{share * 100:.3g}% of gradients poisoned"


def rate(line: Finding) -> str:
    """The best learning rate, starred where it stands at the edge of what was tried."""
    return f"{line.best.lr:g}" + ("*" if "lr" in line.edges else "")


def final(line: Finding) -> str:
    """Mean and half the range over seeds, if there are several."""
    if not math.isfinite(line.final):
        return "diverged"
    return loss(line.final) + (f" ±{line.spread:.{_decimals(line.final)}f}" if len(line.finals) > 1 else "")


def plural(count: int, word: str) -> str:
    """Count and word.

    >>> plural(1, "seed"), plural(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{count} {word}{'' if count == 1 else 's'}"


def settings(contender: Contender) -> str:
    """A contender's settings as one would type them."""
    values = {**contender.options, "warmup": contender.warmup}
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def notes(findings: Findings) -> list[str]:
    """What one must know to read the table rightly."""
    lines = [tuning_note(findings), noise_note(findings)]
    if findings.plan.poison:
        lines.insert(0, poison_note(findings))
    chosen = [f"{line.label} {others}" for line in findings.lines if (others := other_choices(line))]
    if chosen:
        lines.append(f"Best of what was tuned besides lr: {'; '.join(chosen)}.")
    if any(line.edges for line in findings.lines):
        lines.append("* best at the edge of what was tried: the optimum may lie beyond.")
    if any(line.reach and line.reach.bound for line in findings.lines):
        lines.append("≤ where the run was on its way further down: its learning rate had not come down yet.")
    return lines


def other_choices(line: Finding) -> str:
    """The best values of tuned settings other than the learning rate, starred like it."""
    names = [name for name in line.entry.tuned if name != "lr"]
    return ", ".join(f"{name}={line.best.value(name)}{'*' if name in line.edges else ''}" for name in names)


def as_json(findings: Findings) -> dict[str, Any]:
    """The lines as plain values; what isn't finite is None."""
    lines = [
        {
            "contender": line.label,
            "settings": line.best.settings(),
            "final": _finite(line.final),
            "finals": [_finite(loss) for loss in line.finals],
            "settings_tried": line.tried,
            "runs_diverged": line.diverged,
            "best_at_edge_of": list(line.edges),
            "steps_to_target": str(line.reach) if line.reach else None,
            "steps_share": line.steps_share,
            "time_share": line.time_share,
            "model_ms": _finite(line.model_ms),
            "optimizer_ms": _finite(line.optimizer_ms),
            "optimizer_ms_p50": _finite(line.optimizer_p50),
            "optimizer_ms_p95": _finite(line.optimizer_p95),
            "state_bytes_per_parameter": line.bytes_per_parameter,
            "peak_memory_bytes": line.peak_memory,
            "gradients_poisoned": line.poisoned,
            "updates_skipped": line.skipped,
        }
        for line in findings.lines
    ]
    return {
        "headline": " ".join(headline(findings)),
        "target": findings.target,
        "poison": findings.plan.poison,
        "contenders": lines,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _share(line: Finding, share: float | None) -> str:
    at_most = "at most " if line.reach and line.reach.bound else ""
    return f"{at_most}{share or math.nan:.0%}"


def _decimals(value: float) -> int:
    """How many make four digits."""
    return max(0, 3 - math.floor(math.log10(abs(value)))) if value else 3
