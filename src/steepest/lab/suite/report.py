"""The leaderboard: one HTML file that works offline, made from the results. Its text is in report.html."""

from __future__ import annotations

from typing import Any

from steepest.lab.shared.report import render
from steepest.lab.shared.table import Table
from steepest.lab.suite import text
from steepest.lab.suite.curves import curve
from steepest.lab.suite.text import Results


def page(results: Results) -> str:
    """Return the leaderboard as HTML."""
    base = results["protocol"]["baseline"]
    trials = results["trials"]
    return render(
        "suite/report.html",
        results=results,
        base=base,
        titles=text.TITLES,
        headline=text.headline(results),
        explanation=text.explanation(base),
        means=text.MEANS,
        remarks=text.notes(results),
        rows={column: _rows(results, column) for column in text.TITLES},
        settings=_settings(results),
        provenance_facts={
            "command": results["command"],
            **results["versions"],
            "machines": ", ".join(trials["machines"]),
            "runs": f"{len(trials['rows']):,}",
            "lengths": ", ".join(f"{share:g}" for share in results["protocol"]["lengths"])
            + " of the workload's steps, as far as they are needed",
        },
    )


def _rows(results: Results, column: str) -> list[dict[str, Any]]:
    """Return what the template shows of each contender: its means, and a cell per workload."""
    base = results["protocol"]["baseline"]
    return [
        {
            "label": label,
            "means": [(row[name], text.speed_up(row[name])) for name in ("steps", "time", "worst")],
            "over": row["workloads"],
            "cells": [_cell(results, column, label, base, workload["name"]) for workload in results["workloads"]],
        }
        for label, row in results["summary"][column].items()
    ]


def _cell(results: Results, column: str, label: str, base: str, workload: str) -> dict[str, Any]:
    """Return what the template shows of a cell."""
    table = results["cells"][column]
    shown: dict[str, Any] = {"text": text.cell_text(results, column, label, workload), "steps": None}
    if (cell := table[label].get(workload)) is None:
        return shown
    return shown | {
        "steps": cell["steps"],
        "verdict": "base" if label == base else text.verdict(results, column, label, workload),
        "curve": curve(cell["lengths"], table[base][workload]["lengths"]),
        "title": f"{label} on {workload}: {_words(cell['settings'])}; time {text.speed_up(cell['time'])}",
    }


def _settings(results: Results) -> dict[str, Table]:
    """Return the settings of each cell, by column."""
    return {
        column: Table(
            ["contender", "workload", "final loss", "speed-up in time", "best at the edge of", "settings"],
            [
                [
                    *(label, workload, _loss(cell["final"]), text.speed_up(cell["time"])),
                    *(", ".join(cell["edges"]) or "–", _words(cell["settings"])),
                ]
                for label, row in results["cells"][column].items()
                for workload, cell in row.items()
            ],
            labels=2,
        )
        for column in text.TITLES
    }


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4g}"


def _words(settings: Results) -> str:
    """Return settings as a user would type them."""
    options = {**settings["options"], "warmup": settings["warmup"]}
    if settings["elementwise"] != settings["options"]:
        options["elementwise"] = settings["elementwise"]
    return ", ".join(f"{name}={value}" for name, value in options.items())
