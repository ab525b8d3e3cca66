"""Routing where names are known, and the model isn't: modules are put up by what their parameters are called.

`steepest.route` reads modules: their types, their order, what is beside them. A name such as ``layers.3.mlp.up.weight``
tells where a module was, and mostly its type. So parameters with names are hung up in modules on the meta device that
stand in for the model's, and routed like a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

EMBEDDING = re.compile(
    r"(^|_)(\w*embed\w*|wte|wpe|tok\w*|shared|positions?|relative\w*|codebooks?)(_|\d|$)", re.IGNORECASE
)
PATCHES = re.compile(r"patch|proj", re.IGNORECASE)
EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


Held = Mapping[str, Mapping[str, Tensor]]
Children = Mapping[str, Mapping[str, str]]


class Standing(nn.Module):
    """A module of which nothing is known but its name and its parameters."""


class Conv1D(nn.Module):
    """Stands in for the linear layer of transformers that stores ``[inputs, outputs]``; its name and ``nf`` say so."""

    nf = 0


def skeleton(named: Mapping[str, Tensor]) -> nn.Module:
    """Return modules that hold these parameters under these names; nothing is copied, and nothing else is allocated.

    >>> import torch
    >>> weight = nn.Parameter(torch.zeros(4, 3, 2, 2))
    >>> made = skeleton({"stem.0.weight": weight})
    >>> made
    Standing(
      (stem): ModuleList(
        (0): Conv2d(3, 4, kernel_size=(2, 2), stride=(1, 1), bias=False)
      )
    )
    >>> made.stem[0].weight is weight
    True
    """
    held: dict[str, dict[str, Tensor]] = {"": {}}
    children: dict[str, dict[str, str]] = {}
    for name, p in named.items():
        *above, local = name.split(".")
        held.setdefault(".".join(above), {})[local] = p
        for depth, child in enumerate(above):
            parent, path = ".".join(above[:depth]), ".".join(above[: depth + 1])
            children.setdefault(parent, {})[child] = path
    sides = [_bias_side(params) for params in held.values()]
    return _module("", held, children, 1 in sides and 0 not in sides)


def _bias_side(params: Mapping[str, Tensor]) -> int | None:
    """Return the dimension of a weight that is as long as its bias, if only one of two is."""
    weight, bias = params.get("weight"), params.get("bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.numel() not in weight.shape:
        return None
    return None if weight.shape[0] == weight.shape[1] else list(weight.shape).index(bias.numel())


def _module(path: str, held: Held, children: Children, inputs_first: bool) -> nn.Module:
    """Return the module at a path; ``inputs_first``: biases are as long as their weights are wide."""
    inside = children.get(path, {})
    made = _leaf(path, held.get(path, {}), inside, inputs_first)
    for local, p in held.get(path, {}).items():
        made._parameters[local] = p  # type: ignore[assignment]  # shards and plain tensors, too
    for child, below in inside.items():
        made._modules[child] = _module(below, held, children, inputs_first)
    return made


def _leaf(path: str, params: Mapping[str, Tensor], inside: Mapping[str, str], inputs_first: bool) -> nn.Module:
    """Return an empty module of the type that its name and its parameters suggest."""
    if inside and not params and all(child.isdigit() for child in inside):
        return nn.ModuleList()
    weight = params.get("weight")
    if weight is None or inside or weight.ndim < 2 or weight.numel() == 0:
        return Standing()
    name = path.split(".")[-1]
    rows, columns = weight.shape[:2]
    if weight.ndim == 2:
        if EMBEDDING.search(name) and not PATCHES.search(name):
            return _emptied(nn.Embedding(1, 1, device="meta"))
        if inputs_first and "bias" in params:
            return Conv1D()
        return _emptied(nn.Linear(columns, rows, bias="bias" in params, device="meta"))
    kind = None if EXPERTS.search(path) else CONVOLUTIONS.get(weight.ndim)
    if kind is None:
        return Standing()
    groups = rows if columns == 1 else 1
    kernel = tuple(weight.shape[2:])
    made: nn.Module = kind(columns * groups, rows, kernel, groups=groups, bias="bias" in params, device="meta")
    return _emptied(made)


def _emptied(module: nn.Module) -> nn.Module:
    for name in module._parameters:
        module._parameters[name] = None
    return module
