"""Families of models: what the command line names, as a workload for each width.

A name is a workload with an option ``width``, built-in or in a file, as ``steepest race --workload`` takes it. Or it is
a function of a width in a Python file, ``my_model.py:make``, which returns such a workload, or a module. For a module
the file says how to train it:

    def make(width): ...              # a fresh module; the random state is seeded already
    def batch(generator): ...         # one batch, drawn with this generator only
    def loss(model, batch): ...       # a scalar tensor

``my_model.py`` alone means its function ``model``, if it has one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from steepest.lab.shared.calls import parse_call, spell_call
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.files import import_file
from steepest.lab.workloads.workload import Workload, load_workload

Family = Callable[[int], Workload]
"""Returns the workload whose model has this width."""


@final
class InFile(Workload):
    """A module that a function in a file makes, with the file's ``batch`` and ``loss``."""

    def __init__(self, make: Callable[[], nn.Module], batch: Callable[..., Any], loss: Callable[..., Tensor]) -> None:
        self.make, self.draw, self.criterion = make, batch, loss

    @override
    def model(self) -> nn.Module:
        return self.make()

    @override
    def batch(self, generator: torch.Generator) -> Any:
        return self.draw(generator)

    @override
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.criterion(model, batch)

    @override
    def validation(self, model: nn.Module) -> float:
        return self.loss(model, self.batch(torch.Generator().manual_seed(0))).item()


def family(name: str) -> Family:
    """Return the workloads by width that the command line names.

    Raises:
        BadInput: if there is no such workload, file or function, or if it takes no width; the message says what to do.

    >>> sum(p.numel() for p in family("stdlib(depth=1)")(32).model().parameters())
    20576
    """
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _of_function(Path(file), function)
    if name.endswith(".py") and callable(getattr(import_file(Path(name), "model file"), "model", None)):
        return _of_function(Path(name), "model")
    return _of_workload(name)


def _of_workload(name: str) -> Family:
    """Return the family of a workload that has the option ``width``."""
    known = inspect.signature(type(load_workload(name))).parameters
    if "width" not in known:
        has = f"has only {', '.join(known)}" if known else "has no options"
        raise BadInput(
            f"workload {name!r} {has}; a check over widths needs an option width: stdlib has it, and in a file "
            "`def __init__(self, width: int = 64)` or a function `model(width)` does it"
        )
    kind, options = (name, {}) if name.endswith(".py") else parse_call(name)
    return lambda width: load_workload(spell_call(kind, options | {"width": width}))


def _of_function(path: Path, name: str) -> Family:
    """Return the family that a function of the width in a file makes."""
    module = import_file(path, "model file")
    make = getattr(module, name, None)
    if not callable(make):
        raise BadInput(f"model file {path}: defines no function {name}(width)")
    try:
        inspect.signature(make).bind(64)
    except TypeError:
        raise BadInput(
            f"model file {path}: {name}() must take one argument, the width; write `def {name}(width):` and make each "
            "hidden layer as wide"
        ) from None

    def sized(width: int) -> Workload:
        try:
            made = make(width)
        except Exception as error:
            raise BadInput(f"model file {path}: {name}({width}) failed: {one_line(error)}") from error
        if isinstance(made, Workload):
            return made
        if not isinstance(made, nn.Module):
            raise BadInput(f"model file {path}: {name}() returned {type(made).__name__}, not a torch.nn.Module")
        missing = [f"{part}({of})" for part, of in NEEDED.items() if not callable(getattr(module, part, None))]
        if missing:
            raise BadInput(
                f"model file {path}: defines no function {' and no '.join(missing)}, without which a module can't be "
                "trained; see steepest.lab.coordcheck.families"
            )
        return InFile(lambda: make(width), module.batch, module.loss)

    return sized


NEEDED = {"batch": "generator", "loss": "model, batch"}
"""The functions that stand beside one that returns a module, with their arguments."""
