"""What `steepest check` finds, for our optimizers, torch's and those of two libraries; docs/conformance.md shows it.

    pip install pytorch_optimizer==4.1.0 heavyball==3.2.1
    python benchmarks/conformance.py            # some minutes; run it in the repository's root
    python benchmarks/conformance.py --tables   # only the page's tables anew, from the figures kept

Each optimizer is checked by a command of its own, in a process of its own. Verdicts and evidence go to
benchmarks/results/conformance.json, the tables to docs/conformance.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from steepest.optimizers import BY_CLOSURE, NAMES
from steepest.testing import CLAUSES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "conformance.json"
PAGE = ROOT / "docs" / "conformance.md"
PACKAGES = ("steepest", "torch", "pytorch_optimizer", "heavyball")

WITH_OPTIONS = dict.fromkeys(NAMES, "--lr 1e-2") | {
    **dict.fromkeys(("kfac", "ekfac"), ""),
    **dict.fromkeys((*BY_CLOSURE, "gauss-newton"), ""),
    "natural-gradient": "--option likelihood=normal",
}
OURS = {f"steepest {name}": f"steepest check {name} {options}".rstrip() for name, options in WITH_OPTIONS.items()}
OTHERS = {
    "torch AdamW": "steepest check torch.optim:AdamW --lr 1e-3",
    "torch SGD": "steepest check torch.optim:SGD --lr 1e-3 --option momentum=0.9",
    "torch Adafactor": "steepest check torch.optim:Adafactor --lr 1e-2",
    "torch Muon": "steepest check torch.optim:Muon --lr 1e-3",
    "torch LBFGS": "steepest check torch.optim:LBFGS --option line_search_fn=strong_wolfe",
    "pytorch_optimizer SOAP": "steepest check pytorch_optimizer:SOAP --lr 1e-3",
    "pytorch_optimizer Muon": "steepest check benchmarks.conformance:muon_of_pytorch_optimizer --lr 1e-3",
    "heavyball SOAP": "TORCHDYNAMO_DISABLE=1 steepest check heavyball:SOAP --lr 1e-3",
    "heavyball Muon": "TORCHDYNAMO_DISABLE=1 steepest check heavyball:Muon --lr 1e-3",
}


def muon_of_pytorch_optimizer(params: Iterable[Any], **options: Any) -> Optimizer:
    """Its Muon, told of every group that it is one of matrices, and given nothing else."""
    from pytorch_optimizer import Muon

    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    groups = [{"use_muon": True, **group, "params": _as_list(group["params"])} for group in groups]
    for item in (item for group in groups for item in group["params"]):
        if (item[1] if isinstance(item, tuple) else item).ndim < 2:
            raise ValueError("no matrix, so use_muon=True is not for it")
    return Muon(groups, **options)


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def measure(name: str, command: str) -> dict[str, Any]:
    """Run a command; totals, and what is not kept, with evidence."""
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words[: words.index("steepest")])
    arguments = words[words.index("steepest") + 1 :]
    done = subprocess.run(
        [sys.executable, "-m", "steepest.cli", *arguments, "--json"],
        env=os.environ | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):
        sys.exit(f"{command}: {done.stderr}")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    why = {
        verdict: {clause: found["why"] for clause, found in found["clauses"].items() if found["verdict"] == word}
        for verdict, word in (("broken", "broken"), ("not_applicable", "n/a"))
    }
    print(f"{name}: {found['kept']} kept, {found['broken']} broken, {found['not_applicable']} not applicable")
    return {"optimizer": name, "command": command, "kept": found["kept"], **why, "not_given": found["refused"]}


def totals(rows: list[dict[str, Any]]) -> str:
    """How many clauses each keeps. Rows of one library with equal counts are one line."""
    lines: dict[tuple[str, int, int, int], list[str]] = {}
    for row in rows:
        library, _, name = row["optimizer"].partition(" ")
        counts = (row["kept"], len(row["broken"]), len(row["not_applicable"]))
        lines.setdefault((library, *counts), []).append(name)
    table = ["| library | optimizer | kept | broken | not applicable |", "|---|---|---|---|---|"]
    for (library, *counts), names in lines.items():
        numbers = " | ".join(map(str, counts))
        table.append(f"| {library} | {', '.join(names)} | {numbers} |")
    return "\n".join(table)


def broken(rows: list[dict[str, Any]]) -> str:
    """Which clause is broken by whom."""
    columns = [row for row in rows if row["broken"]]
    table = [
        "| | clause | " + " | ".join(row["optimizer"].replace(" ", "<br>") for row in columns) + " |",
        "|---|---|" + ":-:|" * len(columns),
    ]
    for name in _broken_by_any(rows):
        marks = ["×" if name in row["broken"] else "–" if name in row["not_applicable"] else "" for row in columns]
        table.append(f"| {CLAUSES[name].number} | {CLAUSES[name].title} | " + " | ".join(marks) + " |")
    return "\n".join(table)


def meanings(rows: list[dict[str, Any]]) -> str:
    """What each of those clauses promises, and why anybody needs it."""
    return "\n".join(
        f"- *{CLAUSES[name].title}* ({CLAUSES[name].number}). {' '.join(CLAUSES[name].promise.split())}"
        for name in _broken_by_any(rows)
    )


def commands(rows: list[dict[str, Any]]) -> str:
    """What gave each line."""
    return "\n".join(["```", *(row["command"] for row in rows), "```"])


def _broken_by_any(rows: list[dict[str, Any]]) -> list[str]:
    return [name for name in CLAUSES if any(name in row["broken"] for row in rows)]


def date_and_versions(found: dict[str, Any]) -> str:
    """When, and with what."""
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    return f"Measured on {found['date']} with {versions}, {found['clauses']} clauses."


def page(text: str, found: dict[str, Any]) -> str:
    """The page with its parts made anew from the figures."""
    rows = found["optimizers"]
    parts = {
        "measured": date_and_versions(found),
        "totals": totals(rows),
        "broken": broken(rows),
        "meanings": meanings(rows),
        "commands": commands(rows),
    }
    for name, part in parts.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        _, after = rest.split(f"<!-- end of {name} -->", 1)
        text = f"{before}<!-- {name} -->\n{part}\n<!-- end of {name} -->{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.tables:
        found = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": {"Python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
            "clauses": sum(not clause.slow for clause in CLAUSES.values()),
            "optimizers": [measure(name, command) for name, command in {**OURS, **OTHERS}.items()],
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
