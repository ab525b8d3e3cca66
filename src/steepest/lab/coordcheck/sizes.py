"""Sizes in a network after a few steps, layer by layer, and the powers of the width by which they grow.

Yang et al., arXiv:2203.03466, section 4 and appendix D.1: where a learning rate carries over from a narrow network to a
wide one, activations and their changes have about the same size at every width. A layer here is a module that has
trainable parameters of its own. x are its inputs and y its outputs on a batch that it was not trained on; W are its
parameters, W₀ as they were at first.

    update   rms(W - W₀) / rms(W₀)
    change   rms(y - y₀) / rms(x)        y₀: its outputs on the same x with W₀
    size     rms(y)

The change is what a matrix's spectral norm bounds: ``|(W - W₀) x| ≤ ‖W - W₀‖ |x|``. Tables, whose x are indices, and
layers without matrices, above all norms, have outputs that don't grow with x: their change is ``rms(y - y₀)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from steepest.lab.race.stepping import stepper
from steepest.lab.shared.contenders import Contender
from steepest.lab.shared.errors import BadInput
from steepest.lab.workloads.workload import Workload

STEADY = 0.25
"""The largest exponent of the width, up or down, that counts as none: over a factor of 16 it makes a factor of 2."""


@dataclass(frozen=True)
class Sizes:
    """A layer's sizes after the last step; None where there is nothing to measure."""

    update: float | None
    change: float | None
    size: float | None


SIZES = tuple(field.name for field in fields(Sizes))


@dataclass(frozen=True)
class Growth:
    """A layer's sizes at each width, and the exponents of the width by which they grow."""

    layer: str
    sizes: Mapping[int, Sizes]

    def exponent(self, what: str) -> float | None:
        """Return the exponent of one of the sizes, by its name."""
        return exponent({width: getattr(sizes, what) for width, sizes in self.sizes.items()})

    @property
    def flags(self) -> dict[str, float]:
        """The exponents that are too large. Updates have none: they may shrink while what they do stays the same."""
        found = {what: self.exponent(what) for what in ("change", "size")}
        return {what: value for what, value in found.items() if value is not None and abs(value) > STEADY}


def exponent(sizes: Mapping[int, float | None]) -> float | None:
    """Return the slope of the logarithm of a size over that of the width, by least squares; None if one is 0 or None.

    >>> exponent({32: 1.0, 64: 2.0, 128: 4.0}), exponent({32: 0.0, 64: 1.0})
    (1.0, None)
    """
    if any(not size for size in sizes.values()):
        return None
    xs, ys = [math.log2(width) for width in sizes], [math.log2(size) for size in sizes.values() if size]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def growth(found: Mapping[int, Mapping[str, Sizes]]) -> list[Growth]:
    """Return each layer's sizes over the widths.

    Raises:
        BadInput: if widths differ in their layers, or in nothing.
    """
    first, *others = found.values()
    if any(layers.keys() != first.keys() for layers in others):
        odd = sorted(set().union(*(layers.keys() ^ first.keys() for layers in others)))
        raise BadInput(f"models of different widths have different layers ({', '.join(odd[:3])}): vary the width only")
    return [Growth(layer, {width: layers[layer] for width, layers in found.items()}) for layer in first]


def sizes(workload: Workload, contender: Contender, steps: int, seed: int = 0) -> dict[str, Sizes]:
    """Train a fresh model at a constant rate for some steps, and return the sizes in it, layer by layer.

    Raises:
        BadInput: if the model has no trainable layer, or its loss is no longer finite.
    """
    torch.manual_seed(seed)
    model = workload.model()
    layers = trainable_layers(model)
    if not layers:
        raise BadInput("the model has no layer with trainable parameters")
    first = {name: {key: p.detach().clone() for key, p in _own(layer).items()} for name, layer in layers.items()}
    way = stepper(model, contender.optimizer(model), workload, torch.Generator().manual_seed(seed))
    for step in range(1, steps + 1):
        way.prepare()
        if not math.isfinite(loss := way.step()):
            raise BadInput(
                f"{contender.label}: the loss is {loss} in step {step}; lower the rate, {contender.rule}(lr=1e-3)"
            )
    model.eval()
    with first_calls(layers) as calls:
        workload.loss(model, workload.batch(torch.Generator().manual_seed(seed + 1)))
    return {name: _sizes(layer, first[name], calls.get(name)) for name, layer in layers.items()}


def trainable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have trainable parameters of their own, by name.

    >>> list(trainable_layers(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1).requires_grad_(False))))
    ['0']
    """
    modules = {name or type(model).__name__: module for name, module in model.named_modules()}
    return {name: module for name, module in modules.items() if any(p.requires_grad for p in _own(module).values())}


class Call(NamedTuple):
    """A call of a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any


@contextmanager
def first_calls(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """Collect the first call of each layer, for as long as the context lasts."""
    calls: dict[str, Call] = {}

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
            calls.setdefault(name, Call(args, kwargs, outputs))

        return hook

    handles = [layer.register_forward_hook(listen(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _sizes(layer: nn.Module, first: Mapping[str, Tensor], call: Call | None) -> Sizes:
    moved = rms([p - first[name] for name, p in _own(layer).items()])
    scale = rms(list(first.values()))
    update = moved / scale if scale else None
    if call is None:  # its parameters are read by another module
        return Sizes(update, None, None)
    now = _tensor(call.outputs)
    before = _tensor(functional_call(layer, dict(first), call.args, call.kwargs))
    if now is None or before is None:
        return Sizes(update, None, None)
    inputs = _tensor((*call.args, *call.kwargs.values()))
    scale = 1.0
    if inputs is not None and inputs.is_floating_point() and any(p.dim() > 1 for p in first.values()):
        scale = rms([inputs])
    return Sizes(update, rms([now - before]) / scale if scale else None, rms([now]))


def rms(tensors: Sequence[Tensor]) -> float:
    """Return the root mean square of all entries.

    >>> rms([torch.tensor([3.0, 4.0]), torch.tensor([[0.0], [0.0]])])
    2.5
    """
    squares = sum(x.detach().double().square().sum().item() for x in tensors)
    return math.sqrt(squares / sum(x.numel() for x in tensors))


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _tensor(value: Any) -> Tensor | None:
    """Return the first tensor in a value, such as a layer's outputs."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((found for part in value if (found := _tensor(part)) is not None), None)
    return None
