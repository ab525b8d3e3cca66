"""The workload, which is what a race trains: four short methods tell it all that it needs to know.

A file for ``steepest race --workload my_task.py`` defines one class:

    class MyTask(Workload):
        def model(self): ...                  # a fresh module; the random state is seeded already
        def batch(self, generator): ...       # one training batch, drawn with this generator only
        def loss(self, model, batch): ...     # a scalar tensor
        def validation(self, model): ...      # a float; lower is better

Some optimizers ask for more. A workload without it goes to the others:

        likelihood = "categorical"            # kfac and ekfac: the loss is -log p of the model's outputs
        def residuals(self, batch): ...       # gauss-newton: a list of `steepest.Residual`

The built-in ones, in files of this folder, are examples to copy:

    stdlib, lora        GPT: source code; fine-tuned to prose        convnet             convolutions, batch norm
    lstm                LSTM: source code                            diffusion           U-Net that removes noise
    vit, mlp            corrupted digits                             autoencoder         deep and narrow
    digits              clean digits: quick, too easy to rank by     photo               sines: a SIREN
    pinn, burgers       differential equations, in float64

Options of the constructor, such as ``def __init__(self, *, width: int = 64)``, can be set where the workload is named:
``steepest race --workload "stdlib(width=128, depth=4)"``. They are part of its name in records. Workloads of the suite
have the option ``scale``, a factor on the network's widths.

Contenders of one seed get the same initial weights and the same batches. Each run has a process of its own with one
thread, so data that takes long to prepare should be kept in a file.
"""

from __future__ import annotations

import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.shared.calls import parse_call, spell_call
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.files import import_file
from steepest.lab.shared.fingerprints import code_hash, digest
from steepest.newton.residual import Residual

BUILT_IN = {
    "stdlib": "steepest.lab.workloads.stdlib:StandardLibrary",
    "digits": "steepest.lab.workloads.digits:Digits",
    "photo": "steepest.lab.workloads.photo:Photo",
    "convnet": "steepest.lab.workloads.convnet:ConvNet",
    "autoencoder": "steepest.lab.workloads.autoencoder:Autoencoder",
    "lstm": "steepest.lab.workloads.lstm:Recurrent",
    "mlp": "steepest.lab.workloads.mlp:Perceptron",
    "vit": "steepest.lab.workloads.vit:VisionTransformer",
    "lora": "steepest.lab.workloads.lora:LoRA",
    "diffusion": "steepest.lab.workloads.diffusion:Diffusion",
    "pinn": "steepest.lab.workloads.pinn:Poisson",
    "burgers": "steepest.lab.workloads.pinn:Burgers",
}
SUITE = ("stdlib", "lstm", "vit", "convnet", "mlp", "autoencoder", "photo", "pinn", "lora", "diffusion")
"""Workloads of the suite, which are of different kinds."""
Pairs = tuple[Tensor, Tensor]
"""Inputs ``[b, ...]`` and targets ``[b, ...]``."""


class Workload(ABC):
    """A model, training batches, a loss and a validation. Arguments of a subclass's constructor have defaults."""

    steps: int = 300
    """Length of a race without ``--steps``."""
    measure: str = "validation loss"
    """Name of what `validation` returns."""
    likelihood: str | None = None
    """The distribution, "categorical", "bernoulli" or "normal", of which `loss` is -log p, up to a factor, where the
    outputs of the model are its parameters; None if there is none."""

    @property
    def suite_steps(self) -> int:
        """Length of a run in the suite: `steps`, unless the class sets a number of its own."""
        return self.steps

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a fresh model; torch's global random state was seeded just before."""

    @abstractmethod
    def batch(self, generator: torch.Generator) -> Any:
        """Return one training batch, drawn with this generator only."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar to be minimised."""

    @abstractmethod
    def validation(self, model: nn.Module) -> float:
        """Return how good the model is, by the same data each time; lower is better. The mode is eval, without grad."""

    def residuals(self, batch: Any) -> Sequence[Residual] | None:
        """Return what the loss is half the mean square of, as functions of one point; None if it is no such sum."""
        return None

    def describe(self) -> dict[str, str]:
        """Return facts about the data for the report, such as their hash."""
        return {}

    def fingerprint(self) -> str:
        """Return a hash of the code of the workload's file and of `describe`; runs with another hash are not reused."""
        return digest([code_hash(inspect.getfile(type(self))), self.describe()])


class Supervised(Workload):
    """A workload of inputs and targets, of which the first ``held_out`` are for validation only."""

    inputs: Tensor
    targets: Tensor
    held_out: int
    batch_size: int

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the model's outputs, cross entropy by default."""
        return F.cross_entropy(outputs, targets)

    @override
    def batch(self, generator: torch.Generator) -> Pairs:
        chosen = torch.randint(self.held_out, len(self.targets), (self.batch_size,), generator=generator)
        return self.inputs[chosen], self.targets[chosen]

    @override
    def loss(self, model: nn.Module, batch: Pairs) -> Tensor:
        inputs, targets = batch
        return self.criterion(model(inputs), targets)

    @override
    def validation(self, model: nn.Module) -> float:
        return self.loss(model, (self.inputs[: self.held_out], self.targets[: self.held_out])).item()


def shuffled(inputs: Tensor, targets: Tensor) -> Pairs:
    """Return inputs and targets in a random order that is always the same."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    return inputs[order], targets[order]


@contextmanager
def needs(packages: str, extra: str = "lab") -> Iterator[None]:
    """Turn a missing package into an error that says how to install it."""
    try:
        yield
    except ImportError as error:
        raise BadInput(f'this workload needs {packages}: pip install "steepest[{extra}]"') from error


def scaled(width: int, scale: float, multiple: int = 1) -> int:
    """Return a width times ``scale``, as the nearest multiple of a number and at least that.

    Raises:
        ValueError: if ``scale`` is no positive number.

    >>> scaled(64, 0.5), scaled(64, 1.3, multiple=4), scaled(64, 0.001)
    (32, 84, 1)
    """
    if not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise ValueError(f"scale={scale!r}: must be a positive number")
    return max(round(width * scale / multiple), 1) * multiple


def at_least_one(**options: int) -> None:
    """Raise a ValueError for an option that is no positive integer.

    >>> at_least_one(width=64, depth=0)
    Traceback (most recent call last):
    ValueError: depth=0: must be a positive integer
    """
    for name, value in options.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a positive integer")


def load_workload(spec: str) -> Workload:
    """Return the built-in workload of this name, or the one that the Python file of this name defines.

    Options of the workload's constructor may follow in brackets.

    Raises:
        BadInput: if there is no such workload, option or value.

    >>> type(load_workload("stdlib")).__name__
    'StandardLibrary'
    >>> sum(p.numel() for p in load_workload("stdlib(width=32, depth=1)").model().parameters())
    20576
    >>> load_workload("photo(size=2)")
    Traceback (most recent call last):
    steepest.lab.shared.errors.BadInput: workload 'photo(size=2)': no option 'size'; there are scale
    """
    name, options = _parse(spec)
    if name in BUILT_IN:
        module, _, class_name = BUILT_IN[name].partition(":")
        found: type[Workload] = getattr(importlib.import_module(module), class_name)
    elif name.endswith(".py"):
        found = _from_file(Path(name))
    else:
        raise BadInput(f"unknown workload {name!r}: give one of {', '.join(BUILT_IN)}, or a Python file")
    known = [option for option in inspect.signature(found).parameters if not option.startswith("_")]
    for option in options:
        if option not in known:
            there_are = f"there are {', '.join(known)}" if known else "it has none"
            raise BadInput(f"workload {spec!r}: no option {option!r}; {there_are}")
    try:
        return found(**options)
    except BadInput:
        raise
    except Exception as error:
        where = f"workload {spec!r}" if name in BUILT_IN else f"workload file {name}: {found.__name__}() failed"
        raise BadInput(f"{where}: {one_line(error)}") from error


def canonical(spec: str) -> str:
    """Return the one spelling of a workload and its options by which records know it; the path of a file is absolute.

    Raises:
        BadInput: if what stands in brackets is no list of options.

    >>> canonical("stdlib( width=128,depth=4 )"), canonical("stdlib")
    ('stdlib(width=128, depth=4)', 'stdlib')
    """
    name, options = _parse(spec)
    return spell_call(str(Path(name).resolve()) if name.endswith(".py") else name, options)


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a workload and its options."""
    if spec.endswith(".py"):  # a path may hold brackets
        return spec, {}
    try:
        return parse_call(spec)
    except ValueError as error:
        raise BadInput(f"workload {error}, like stdlib(width=128, depth=4)") from None


def _from_file(path: Path) -> type[Workload]:
    """Return the one workload that the file defines."""
    module = import_file(path, "workload file")
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Workload) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        count = f"{len(own) or 'no'} class{'' if len(own) < 2 else 'es'}"
        raise BadInput(f"workload file {path}: defines {count} derived from steepest.lab.Workload; one is needed")
    return own[0]
