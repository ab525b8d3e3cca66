"""The reference of the documentation holds every public name, and its site every page: each once."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
MODULES = ["steepest", "steepest.curvature", "steepest.functional", "steepest.integrations", "steepest.testing"]
LISTED = [
    name
    for page in sorted(DOCS.glob("reference/*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]


def found(name: str) -> Any:
    """What a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    holder = importlib.import_module(module)
    return getattr(holder, attribute) if hasattr(holder, attribute) else importlib.import_module(name)


def public(module: Any) -> list[str]:
    """What a module exports; without a list of that, the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    defined = {
        name: thing for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__
    }
    return [
        name
        for name, thing in defined.items()
        if name[0] != "_" and (inspect.isroutine(thing) or inspect.isclass(thing))
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    listed = [found(name) for name in LISTED if name != "steepest.integrations.timm"]  # it needs timm
    holder = importlib.import_module(module)
    names = public(holder)
    assert names
    missing = [f"{module}.{name}" for name in names if not any(getattr(holder, name) is thing for thing in listed)]
    assert not missing, f"docs/reference has no {', '.join(missing)}"


def test_no_name_is_in_it_twice() -> None:
    assert [name for name, count in Counter(LISTED).items() if count > 1] == []


def test_every_page_is_in_the_site_once() -> None:
    listed = re.findall(r"^ +- .+: ([\w/-]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    from_elsewhere = {"index.md", "changelog.md", "contributing.md", "figures.md"}
    assert sorted(listed) == sorted(written | from_elsewhere)
