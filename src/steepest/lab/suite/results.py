"""The results of a suite as plain values, which its JSON file holds: tables and other machines start from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from steepest.lab.shared.fingerprints import versions
from steepest.lab.suite import protocol
from steepest.lab.suite.running import Stage
from steepest.lab.suite.scores import Score, scores
from steepest.lab.suite.suite import COLUMNS, Cell, Suite


def as_json(suite: Suite, left_out: Sequence[Stage], command: str) -> dict[str, Any]:
    """Return the results: summary, cells, and the log of all runs.

    Ratios are a contender's steps or time to the baseline's final loss, divided by the baseline's; less is better.
    """
    tables = {column: scores(suite, column) for column in COLUMNS}
    return {
        "command": command,
        "versions": versions(),
        "protocol": {
            "baseline": suite.baseline.label,
            "trials": protocol.TRIALS,
            "seeds": protocol.SEEDS,
            "lengths": list(protocol.LADDER),
        },
        "summary": {column: {s.label: _summary(s) for s in table} for column, table in tables.items()},
        "workloads": [
            {"name": task.name, "steps": task.steps, "measure": task.measure, "fingerprint": task.fingerprint}
            for task in suite.tasks
        ],
        "cells": {
            column: {s.label: {cell.task.name: _cell(cell) for cell in s.cells} for s in table}
            for column, table in tables.items()
        },
        "refused": [
            {"optimizer": label, "workload": task, "reason": reason} for (label, task), reason in suite.refused.items()
        ],
        "left_out": [{"optimizer": contender.label, "column": column} for contender, column in left_out],
        "failures": [
            {"optimizer": row.optimizer, "workload": row.workload, "settings": row.settings, "reason": row.failure}
            for row in suite.log
            if row.failure
        ],
        "trials": suite.log.as_json(),
    }


def dumps(results: Mapping[str, Any]) -> str:
    """Return the JSON of results, with one run per line."""
    trials = results["trials"]
    rows = ",\n".join(json.dumps(row) for row in trials["rows"])
    settings = ",\n".join(json.dumps(row) for row in trials["settings"])
    marked = {**results, "trials": {**trials, "rows": ["@rows"], "settings": ["@settings"]}}
    return json.dumps(marked, indent=1).replace('"@rows"', rows).replace('"@settings"', settings) + "\n"


def _summary(score: Score) -> dict[str, Any]:
    return {
        "steps": _plain(score.steps),
        "time": _plain(score.time),
        "worst": _plain(score.worst),
        "workloads": score.compared,
        "bounded": score.bounded,
        "significantly_better": sum(cell.better for cell in score.cells),
        "significantly_worse": sum(cell.worse for cell in score.cells),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "settings": cell.contender.settings(),
        "edges": list(cell.edges),
        "steps": None if cell.steps is None else _plain(cell.steps.value),
        "bound": "" if cell.steps is None else cell.steps.bound,
        "time": _plain(cell.time),
        "step_time": _plain(cell.step_time),
        "significant": cell.significant,
        "final": _plain(cell.final),
        "baseline_in_same_time": _plain(cell.same_time),
        "lengths": [
            {"share": share, "losses": [_plain(loss) for loss in losses]} for share, losses in cell.losses.items()
        ],
    }


def _plain(value: float | None) -> float | None:
    """Return a number with six significant digits; None if there is none, or it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
