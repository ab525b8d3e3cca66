"""What is trained: four short methods say everything that a race needs to know.

Your own goes into a file, ``steepest race --workload my_task.py``, which defines one class:

    class MyTask(Workload):
        def model(self): ...                  # a fresh module; the random state is seeded already
        def batch(self, generator): ...       # one training batch, drawn with this generator only
        def loss(self, model, batch): ...     # a scalar tensor
        def validation(self, model): ...      # a float; lower is better

Contenders of one seed see the same initial weights and the same batches. Each run has a process of its own with one
thread, so data that takes long to prepare should be kept in a file.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.files import import_file
from steepest.lab.shared.fingerprints import code_hash

BUILT_IN = {
    "stdlib": "steepest.lab.workloads.stdlib:StandardLibrary",
    "digits": "steepest.lab.workloads.digits:Digits",
    "digits-vit": "steepest.lab.workloads.digits:DigitsViT",
    "photo": "steepest.lab.workloads.photo:Photo",
    "convnet": "steepest.lab.workloads.convnet:ConvNet",
}


class Workload(ABC):
    """Something to train. A subclass needs no arguments to be made."""

    steps: int = 300
    """How long a race is unless ``--steps`` says otherwise."""
    measure: str = "validation loss"
    """What `validation` returns, in words."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh model. torch's global random state is seeded just before."""

    @abstractmethod
    def batch(self, generator: torch.Generator) -> Any:
        """One training batch, by this generator's random numbers alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar to be minimised."""

    @abstractmethod
    def validation(self, model: nn.Module) -> float:
        """How good the model is, the same way each time; lower is better. Gradients are off, the mode is eval."""

    def fingerprint(self) -> str:
        """What tells this workload from another: results with another fingerprint are not reused.

        By default the code of its file, comments aside. A subclass that reads data adds their hash.
        """
        return code_hash(inspect.getfile(type(self)))

    def describe(self) -> dict[str, str]:
        """Facts about the data for the report, such as their hash."""
        return {}


def load_workload(spec: str) -> Workload:
    """The workload of this name, or the one that the Python file of this name defines.

    >>> type(load_workload("stdlib")).__name__
    'StandardLibrary'
    """
    if spec in BUILT_IN:
        module, _, name = BUILT_IN[spec].partition(":")
        found: type[Workload] = getattr(importlib.import_module(module), name)
        return found()
    if not spec.endswith(".py"):
        raise BadInput(f"unknown workload {spec!r}: give one of {', '.join(BUILT_IN)}, or a Python file")
    return _from_file(Path(spec))


def _from_file(path: Path) -> Workload:
    """An instance of the one workload that the file defines."""
    module = import_file(path, "workload file")
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Workload) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        count = f"{len(own) or 'no'} class{'' if len(own) < 2 else 'es'}"
        raise BadInput(f"workload file {path}: defines {count} derived from steepest.lab.Workload; one is needed")
    try:
        workload: Workload = own[0]()
    except Exception as error:
        raise BadInput(f"workload file {path}: {own[0].__name__}() failed: {one_line(error)}") from error
    return workload
