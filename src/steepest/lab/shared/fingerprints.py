"""What decides a result, in short: hashes of code without its comments, and names of machines and versions."""

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
    """The SHA-256 of anything that JSON can hold.

    >>> digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def code_hash(*files: str | Path) -> str:
    """The hash of what these Python files do: comments, docstrings and layout don't count."""
    return digest([_meaning(Path(file).read_text(encoding="utf-8")) for file in sorted(map(str, files))])


@functools.cache
def library_hash() -> str:
    """The hash of all code that decides how a run goes: the optimizers and the training loop, not the reports."""
    package = Path(__file__).parent.parent
    shown = {package / "cli.py", *(package / "lab").glob("*.py")}
    trained = {package / "lab" / name for name in ("training.py", "meters.py", "poison.py")}
    return code_hash(*(file for file in package.rglob("*.py") if file not in shown or file in trained))


def versions() -> dict[str, str]:
    """Of everything that decides a result."""
    try:
        mine = importlib.metadata.version("steepest")
    except importlib.metadata.PackageNotFoundError:
        mine = "not installed"  # but found on PYTHONPATH
    return {
        "steepest": mine,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


@functools.cache
def machine() -> str:
    """The processor, as well as it can be told."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if models:
            return f"{models[0]} ({platform.machine()})"
    return platform.processor() or platform.machine()


def _meaning(source: str) -> str:
    """The syntax tree of ``source`` without docstrings.

    >>> _meaning("def f():\\n    'Doc.'\\n    return 1  # why") == _meaning("def f(): return 1")
    True
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
