"""The words of a search: its table, its notes, and the code that makes the optimizer with the best setting."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from steepest.lab.race.text import plural
from steepest.lab.race.trial import loss
from steepest.lab.shared.calls import parse_call, spell_call
from steepest.lab.shared.contenders import Contender
from steepest.lab.shared.presets import FINAL_RATE
from steepest.lab.shared.table import Table
from steepest.lab.suite.protocol import edges
from steepest.lab.tune.search import Search


def code(contender: Contender) -> str:
    """Return the two statements that make the optimizer for a model.

    >>> from steepest.lab.shared.contenders import preset
    >>> print(code(preset("muon")))
    import steepest
    optimizer = steepest.for_model(
        model, "muon", lr=0.06, momentum=0.85, weight_decay=0.1,
        elementwise={"lr": 0.02, "betas": (0.7, 0.95), "weight_decay": 0.1},
    )
    """
    package, call, first = "steepest", "steepest.for_model", f"model, {contender.rule!r}, "
    if contender.rule == "sgd":
        package, call, first = "torch", "torch.optim.SGD", "model.parameters(), "
    lines = [first + "".join(f"{name}={value!r}, " for name, value in contender.options.items())]
    lines += [f"elementwise={dict(contender.elementwise)!r}, "] if contender.elementwise else []
    folded = "\n".join(
        textwrap.indent(textwrap.fill(line.strip(), 76, break_on_hyphens=False), "    ") for line in lines
    )
    return f"import {package}\noptimizer = {call}(\n{folded}\n)".replace("'", '"')


def table(search: Search) -> Table:
    """Return a row for each trial; ``*`` marks a best value that may lie beyond what was tried."""
    rows: list[dict[str, str]] = []
    for trial, row in zip(search.tried, search.rows, strict=True):
        setting, is_best = trial.contender, trial is search.best
        stars = {name: "*" for name in edges(search.tried) if is_best}
        others = (setting.elementwise or {}).get("lr")
        cells = {
            "trial": f"{len(rows) + 1}{' best' if is_best else ''}",
            "lr": f"{setting.lr:g}{stars.get('lr', '')}",
            "lr of other\nparameters": "" if others is None else f"{others:g}{stars.get('elementwise', '')}",
            "weight\ndecay": f"{setting.options.get('weight_decay', 0.0):g}",
            "changed": _changed(search.start, setting),
            "final loss": loss(trial.loss) if math.isfinite(trial.loss) else "failed" if row.failure else "diverged",
            "CPU s": f"{row.cpu_seconds:.0f}",
        }
        rows.append(cells)
    head = [title for title in rows[0] if any(row[title] for row in rows)]
    return Table(head, [[row[title] for title in head] for row in rows])


def _changed(start: Contender, setting: Contender) -> str:
    """Return the settings that have no column of their own and are not those of the start."""
    names = [name for name in (*setting.options, "warmup") if name not in ("lr", "weight_decay")]
    return ", ".join(f"{name}={setting.value(name)}" for name in names if setting.value(name) != start.value(name))


def headline(search: Search) -> str:
    """Return the result in one sentence."""
    tried = plural(len(search.tried), "setting")
    if search.best is None:
        lower = float(f"{min(trial.contender.lr for trial in search.tried) / 64:.2g}")
        return f'None of {tried} trained: start lower, --optimizer "{_spelled(search, lr=lower)}".'
    setting = str(search.best.contender).removeprefix(search.start.label).strip()
    return f"{search.start.label} ends at {loss(search.best.loss)} with {setting}, the best of {tried}."


def notes(search: Search) -> list[str]:
    """Return what a reader must know."""
    best = search.best.contender if search.best else search.start
    schedule = (
        f"it rises for {best.warmup:.0%} of the {search.steps} steps, then falls along a cosine to {FINAL_RATE:.0%}"
    )
    lines = [f"Rates are the highest of a schedule: {schedule}. One seed: small differences are luck."]
    found = edges(search.tried) if search.best else ()
    if "lr" in found:
        goes_on = f"--trials {search.trials + 4}" if search.next_setting is None else "the search"
        lines.append(f"* the best learning rate is the lowest or highest that was tried: {goes_on} goes on beyond.")
    if "elementwise" in found:
        spec = _spelled(search, lr=best.lr, elementwise={"lr": (best.elementwise or {})["lr"]})
        lines.append(
            "* the best rate of other parameters, of which three were tried, is the lowest or highest: start from it, "
            f'--optimizer "{spec}".'
        )
    return lines


def _spelled(search: Search, **changes: Any) -> str:
    """Return the optimizer as a user would type it, with other settings."""
    name, options = parse_call(search.start.label)
    return spell_call(name, options | changes)
