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
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import steepest
from steepest.lab.shared.errors import BadInput, one_line
from steepest.optimizers import BY_CLOSURE, NAMES
from steepest.rule import nearest
from steepest.testing import Report, Verdict, check_optimizer
from steepest.testing.subject import Factory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
OF_MODELS = {"kfac": "KFAC", "ekfac": "EKFAC", "gauss-newton": "GaussNewton"}
"""The classes of optimizers that take a model, by name."""
LOOKS = {Verdict.KEPT: "green", Verdict.BROKEN: "bold red", Verdict.NOT_APPLICABLE: "dim"}


def run(
    spec: str, options: Mapping[str, Any], console: Console, dtype: str, device: str, slow: bool, as_json: bool
) -> bool:
    """Check an optimizer by name or ``module:Class``, print the verdicts, and return whether every clause is kept.

    Raises:
        BadInput: if there is no such optimizer, or it can't be built with these options.
    """
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: there are {', '.join(DTYPES)}")
    check_device(device)
    factory = find(spec, options)
    try:
        with console.status(Text(f"checking {spec}")):
            report = check_optimizer(factory, name=spec, dtype=DTYPES[dtype], device=device, slow=slow)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{spec}: {one_line(error)}") from error
    package = spec.partition(":")[0].partition(".")[0] if ":" in spec else "steepest"
    found = versions(package, "torch")
    if as_json:
        counts = {name: len(getattr(report, name)) for name in ("kept", "broken", "not_applicable")}
        clauses = {f.clause.name: {"verdict": f.verdict.value, "why": f.why} for f in report.findings}
        told = {"optimizer": spec, "versions": found, **counts, "refused": report.refused, "clauses": clauses}
        console.print_json(json.dumps(told))
        return report.ok
    console.print(Text.assemble((spec, "bold"), "  ", (", ".join(map(" ".join, found.items())), "dim")))
    console.print(table(report))
    for line in report.omissions:
        console.print(Text(line, style="dim"))
    console.print(Text(report.summary, style="bold"))
    return report.ok


def check_device(device: str) -> None:
    """Raise `BadInput` unless torch can compute on a device, such as "cpu" or "cuda:1".

    >>> check_device("cpu")
    >>> check_device("tpu")
    Traceback (most recent call last):
    steepest.lab.shared.errors.BadInput: --device tpu: torch has no such device here; there is cpu, and with a GPU cuda
    """
    try:
        torch.empty(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"--device {device}: torch has no such device here; there is cpu, and with a GPU cuda"
        ) from error


def find(spec: str, options: Mapping[str, Any]) -> Factory:
    """Find the factory of an optimizer, by ``module:Class`` or by one of our names.

    >>> find("torch.optim:SGD", {"lr": 0.1})([torch.zeros(1, requires_grad=True)]).defaults["lr"]
    0.1
    >>> find("saop", {})
    Traceback (most recent call last):
    steepest.lab.shared.errors.BadInput: 'saop': no such optimizer (did you mean 'soap'?); others go by ...
    """
    module, colon, name = spec.partition(":")
    if colon and not (module and name):
        raise BadInput(f"{spec!r}: write module:Class, as in torch.optim:AdamW")
    if not colon:
        known = {*NAMES, *BY_CLOSURE, *OF_MODELS}
        if spec.lower() in OF_MODELS:
            return functools.partial(getattr(steepest, OF_MODELS[spec.lower()]), **options)
        if spec.lower() not in known:
            raise BadInput(
                f"{spec!r}: no such optimizer{nearest(spec, known)}; others go by module:Class, as in torch.optim:AdamW"
            )
        return lambda params, **overrides: steepest.create(spec, params, **{**options, **overrides})
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as with python -m, so that a file at hand can be named
    try:
        holder = importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"{spec}: {one_line(error)}; is the package installed, or the file in this folder?") from error
    try:
        found = functools.reduce(getattr, name.split("."), holder)
    except AttributeError as error:
        raise BadInput(f"{spec}: {module} has no {name}{nearest(name, dir(holder))}") from error
    if not callable(found):
        raise BadInput(f"{spec}: is no class, but {type(found).__name__}; name a class, as in torch.optim:AdamW")
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


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each of these packages that is installed."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
