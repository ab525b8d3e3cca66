"""Which modules' curvature can be captured, and of the others the reason why not.

A layer is a module that multiplies rows of inputs by its weight, and does nothing else: a linear layer, a convolution,
or the ``Conv1D`` of Hugging Face's transformers, whose weight is stored as ``[in, out]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from steepest.curvature.patches import patches, pixels, tokens

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BLOCK_BYTES = 2**26
"""The most bytes that the rows of inputs of one block take, where one sample takes no more."""

REASONS = (
    (nn.MultiheadAttention, "MultiheadAttention multiplies by its packed weight itself, and calls no module for it"),
    (nn.RNNBase, "a recurrent layer's products are within one fused call"),
    (nn.RNNCellBase, "a recurrent cell calls no module for its products"),
    ((nn.Embedding, nn.EmbeddingBag), "a table's rows are looked up: its inputs have a diagonal of counts"),
    (TRANSPOSED_CONVOLUTIONS, "transposed convolutions are not captured yet"),
    (nn.Bilinear, "a bilinear layer multiplies by two inputs"),
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer is a module whose weight W, with the bias as last column, is G matrices ``[m, n̄]``.

    Example:
        >>> layers(nn.Conv2d(4, 6, 3, groups=2))[""].shape
        (2, 3, 19)
    """

    name: str
    """The module's name, as in ``model.named_modules()``."""
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    """The bias that is captured along, or None: there is none, or the weight is trained and the bias is not."""

    @property
    def is_convolution(self) -> bool:
        """Whether the weight multiplies patches."""
        return isinstance(self.module, CONVOLUTIONS)

    @property
    def groups(self) -> int:
        """G, the number of groups of a convolution; else 1."""
        return self.module.groups if isinstance(self.module, CONVOLUTIONS) else 1

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as ``[in, out]``."""
        return stores_inputs_first(self.module)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of matrices, of rows (outputs) and of columns (inputs, and 1 for a bias): ``(G, m, n̄)``."""
        m, n = self.weight.shape[0], math.prod(self.weight.shape[1:])
        m, n = (n, m) if self.transposed else (m, n)
        return self.groups, m // self.groups, n + (self.bias is not None)

    def join(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the matrix ``[m, n̄]`` of tensors of the weight's and the bias' shapes; ``[G, m, n̄]`` for G > 1.

        Example:
            >>> layer = layers(nn.Linear(2, 1))[""]
            >>> layer.join(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0]))
            tensor([[1., 2., 3.]])
        """
        G, m, _ = self.shape
        matrix = (weight.mT if self.transposed else weight).reshape(G, m, -1)
        if bias is not None:
            matrix = torch.cat([matrix, bias.reshape(G, m, 1)], -1)
        return matrix if G > 1 else matrix[0]

    def blocks(self, inputs: Tensor, gradients: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of inputs ``ā [G, b, S, n̄]`` and of gradients ``δ [G, b, S, m]``, b samples at a time.

        They are float32, or float64 where the weight is. A block takes at most `BLOCK_BYTES`, or is one sample.

        Args:
            inputs: what the module was called with, ``[N, ..., n]``, or ``[N, C, *spatial]`` for a convolution.
            gradients: of a loss with respect to what the module returned, ``[N, ..., m]`` or ``[N, M, *spatial]``.
        """
        dtype = statistics_dtype(self.weight)
        module = self.module
        if isinstance(module, CONVOLUTIONS):
            if inputs.dim() == len(module.kernel_size) + 1:  # one image without a batch's dimension
                inputs, gradients = inputs[None], gradients[None]
            positions = math.prod(gradients.shape[2:])
        else:
            inputs, gradients = tokens(inputs)[0], tokens(gradients)[0]
            positions = inputs.shape[1]
        G, _, columns = self.shape
        samples = max(BLOCK_BYTES // max(G * positions * columns * dtype.itemsize, 1), 1)
        for x, d in zip(torch.split(inputs, samples), torch.split(gradients, samples), strict=True):
            if isinstance(module, CONVOLUTIONS):
                rows, d = patches(x.to(dtype), module, self.bias is not None), pixels(d, module)
            else:
                rows, d = x[None].to(dtype), d[None]
                if self.bias is not None:
                    rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)  # faster than pad
            yield rows, d.to(dtype)


def layers(model: nn.Module) -> dict[str, Layer]:
    """Return the layers of a model whose curvature can be captured, by the name of the module.

    Frozen layers are among them; as long as they are frozen nothing is captured.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.LayerNorm(5), nn.Flatten(), nn.Linear(100, 2))
        >>> list(layers(model))
        ['0', '4']
    """
    found = {}
    for name, module, reason in _examined(model):
        if reason is None:
            weight, bias = module._parameters["weight"], module._parameters["bias"]
            assert weight is not None
            joined = bias if bias is not None and bias.requires_grad >= weight.requires_grad else None
            found[name] = Layer(name, module, weight, joined)
    return found


def unsupported(model: nn.Module) -> dict[str, str]:
    """Return the modules whose parameters are not captured, by name, and the reasons in words.

    >>> unsupported(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    {'1': 'LayerNorm has no matrix that multiplies its inputs'}
    """
    return {name: reason for name, _, reason in _examined(model) if reason is not None}


def stores_inputs_first(module: nn.Module) -> bool:
    """Return whether a module's weight is stored as [in, out]: in transposed convolutions and transformers' Conv1D."""
    return isinstance(module, TRANSPOSED_CONVOLUTIONS) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def statistics_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of a weight's statistics: float64 where the weight is, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _examined(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield the modules that hold parameters, and the reason why they are not captured, or None."""
    modules = dict(model.named_modules())
    parents = {child: parent for parent in modules.values() for child in parent.children()}
    holders: dict[Tensor, list[str]] = {}
    for name, module in modules.items():
        for param in module._parameters.values():
            if param is not None:
                holders.setdefault(param, []).append(name)
    for name, module in modules.items():
        held = [param for param in module._parameters.values() if param is not None]
        if isinstance(module, ParametrizationList) or not (held or is_parametrized(module)):
            continue
        others = [other for param in held for other in holders[param] if other != name]
        yield name, module, _reason(module, parents.get(module), others)


def _reason(module: nn.Module, parent: nn.Module | None, others: list[str]) -> str | None:
    """Return why a module that holds parameters is not captured, or None if it is."""
    kind = re.sub("^Parametrized", "", type(module).__name__)
    for classes, reason in REASONS:
        if isinstance(module, classes):
            return reason
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention multiplies by this weight itself, and doesn't call this module"
    known = next((known for known in (nn.Linear, *CONVOLUTIONS) if isinstance(module, known)), None)
    if known is None and not stores_inputs_first(module):
        return f"{kind} has no matrix that multiplies its inputs"
    if is_parametrized(module):
        return "its weight or bias is parametrized: made from other parameters before each use"
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return "its weight or bias is no parameter, but made from others before each call"
    if known is not None and (type(module).forward is not known.forward or "forward" in vars(module)):
        return f"{kind} has a forward of its own, so that its outputs may be other than {known.__name__}'s"
    if any(name not in ("weight", "bias") for name, param in module._parameters.items() if param is not None):
        return f"{kind} has further parameters"
    unshaped: bool = is_lazy(weight)
    if unshaped:
        return "its weight has no shape yet: call the model once before"
    if not weight.is_floating_point():
        return f"its weight is of {weight.dtype}, and only real floating-point numbers are captured"
    if others:
        return f"its weight or bias is shared with {', '.join(map(repr, others))}"
    return None
