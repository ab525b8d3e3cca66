"""The command ``steepest check``: it finds an optimizer by name and checks the contract, clause by clause."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import steepest
from steepest.lab.shared.errors import BadInput, one_line
from steepest.optimizers import NAMES
from steepest.rule import nearest
from steepest.testing import Report, Verdict, check_optimizer
from steepest.testing.subject import Factory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
LOOKS = {Verdict.KEPT: "green", Verdict.BROKEN: "bold red", Verdict.NOT_APPLICABLE: "dim"}


@dataclass(frozen=True)
class Request:
    """The options of the command line."""

    spec: str
    """``module:Class``, or the name of one of our optimizers."""
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "cpu"
    slow: bool = False
    as_json: bool = False


def run(request: Request, console: Console) -> bool:
    """Check an optimizer, print the verdicts, and return whether every clause is kept.

    Raises:
        BadInput: if there is no such optimizer, or it can't be built with these options.
    """
    if request.dtype not in DTYPES:
        raise BadInput(f"dtype {request.dtype!r}: there are {', '.join(DTYPES)}")
    factory = find(request.spec, request.options)
    try:
        with console.status(f"checking {request.spec}"):
            report = check_optimizer(
                factory, name=request.spec, dtype=DTYPES[request.dtype], device=request.device, slow=request.slow
            )
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{request.spec}: {one_line(error)}") from error
    if request.as_json:
        console.print_json(json.dumps(plain(report, request.spec)))
        return report.ok
    found = ", ".join(f"{package} {version}" for package, version in _versions(request.spec).items())
    console.print(f"[bold]{request.spec}[/]  [dim]{found}[/]", highlight=False)
    console.print(table(report))
    for shape, why in (report.refused or {}).items():
        console.print(f"not given: a parameter of {shape}, refused: {why}", style="dim", markup=False, highlight=False)
    console.print(report.summary, style="bold", markup=False, highlight=False)
    return report.ok


def find(spec: str, options: Mapping[str, Any]) -> Factory:
    """Find the factory of an optimizer, by ``module:Class`` or by one of our names.

    >>> find("torch.optim:SGD", {"lr": 0.1})([torch.zeros(1, requires_grad=True)]).defaults["lr"]
    0.1
    >>> find("saop", {})
    Traceback (most recent call last):
    steepest.lab.shared.errors.BadInput: 'saop': no such optimizer (did you mean 'soap'?); others go by module:Class
    """
    module, colon, name = spec.partition(":")
    if not colon:
        if spec.lower() not in NAMES:
            raise BadInput(f"{spec!r}: no such optimizer{nearest(spec, NAMES)}; others go by module:Class")
        return lambda params, **overrides: steepest.create(spec, params, **{**options, **overrides})
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as with python -m, so that a file at hand can be named
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise BadInput(f"{spec}: {one_line(error)}") from error
    if not callable(found):
        raise BadInput(f"{spec}: is no class, but {type(found).__name__}")
    return functools.partial(found, **options)


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Parse options from the command line, each ``name=value``.

    >>> parse_options(["betas=(0.9, 0.95)", "nesterov=True", "graft=adam"])
    {'betas': (0.9, 0.95), 'nesterov': True, 'graft': 'adam'}
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise BadInput(f'option "{text}": write it as "betas=(0.9, 0.95)", a name and a value')
        try:
            options[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[name.strip()] = value.strip()
    return options


def table(report: Report) -> Table:
    """Return a line for each clause, and below it the evidence if it is broken, or the reason why it doesn't apply."""
    shown = Table("", "clause", "", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.columns[0].justify, shown.columns[2].no_wrap = "right", True
    for finding in report.findings:
        words = Text(finding.clause.title)
        if finding.why:
            words.append(f"\n  {finding.why}", style="dim")
        verdict = Text(finding.verdict.value, style=LOOKS[finding.verdict])
        shown.add_row(str(finding.clause.number), words, verdict)
    return shown


def plain(report: Report, spec: str) -> dict[str, Any]:
    """Return the report as JSON has it: verdict and evidence, clause by clause."""
    findings = {f.clause.name: {"verdict": f.verdict.value, "why": f.why} for f in report.findings}
    return {
        "optimizer": spec,
        "versions": _versions(spec),
        "kept": len(report.kept),
        "broken": len(report.broken),
        "not_applicable": len(report.not_applicable),
        "refused": dict(report.refused or {}),
        "clauses": findings,
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each of these packages that is installed."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _versions(spec: str) -> dict[str, str]:
    """Return the versions of an optimizer's package, if it is installed, and of torch."""
    return versions(spec.partition(":")[0].partition(".")[0] if ":" in spec else "steepest", "torch")
