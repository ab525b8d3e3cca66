"""Fingerprints of what decides a result: hashes of code without comments, and names of machine and versions."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch


def digest(value: Any) -> str:
    """Return the SHA-256 of anything that JSON can hold.

    >>> digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def code_hash(*files: str | Path) -> str:
    """Return the hash of what Python files do, whatever their comments, docstrings and layout."""
    return digest([_syntax(Path(file).read_text(encoding="utf-8")) for file in sorted(map(str, files))])


@functools.cache
def library_hash() -> str:
    """Return the hash of all code that decides how a run goes: optimizers, training loop and workloads, no reports."""
    package = Path(__file__).parents[2]
    lab = package / "lab"
    training = [lab / "race" / name for name in ("training.py", "meters.py", "poison.py")]
    peers = lab / "shared" / "peers.py"
    optimizers = [path for path in package.rglob("*.py") if not path.is_relative_to(lab) and path.name != "cli.py"]
    return code_hash(*optimizers, *training, peers, *(lab / "workloads").glob("*.py"))


def versions() -> dict[str, str]:
    """Return the versions of steepest, torch and Python."""
    try:
        own = importlib.metadata.version("steepest")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"  # it was found on PYTHONPATH
    return {"steepest": own, "torch": torch.__version__, "Python": platform.python_version()}


@functools.cache
def machine() -> str:
    """Return the name of the processor, as exactly as the system tells it."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if models:
            return f"{models[0]} ({platform.machine()})"
    return platform.processor() or platform.machine()


def _syntax(source: str) -> str:
    """Return the syntax tree of ``source`` without docstrings.

    >>> _syntax("def f():\\n    'Doc.'\\n    return 1  # why") == _syntax("def f(): return 1")
    True
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
