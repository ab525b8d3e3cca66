"""Gradients at a model's outputs that make its Fisher: for targets drawn from the model, or from a root of the Hessian.

Each of them stands in the place of the gradient of a loss with respect to the outputs, and goes backward through the
model from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LIKELIHOODS = ("categorical", "normal", "bernoulli")


def rows_of(shape: Sequence[int], likelihood: str = "normal") -> int:
    """Return the number of loss terms of a model's outputs of this shape: the product of all sizes but the last.

    Outputs of one dimension are one row for a categorical likelihood, whose classes they are; otherwise each number
    is a row.

    Example:
        >>> rows_of((5, 2, 3)), rows_of((5,)), rows_of((5,), "categorical")
        (10, 5, 1)
    """
    return math.prod(shape if len(shape) == 1 and likelihood != "categorical" else shape[:-1])


@torch.no_grad()
def sampled_gradient(outputs: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """Return the gradients of each row's ``-log p(y | outputs)`` for targets y that are drawn from the model.

    Args:
        outputs: ``[..., C]``. "categorical": logits of C classes, as for `torch.nn.functional.cross_entropy` (but
            with the classes last). "normal": means, with variance 1, as for half a squared error. "bernoulli": logits
            of independent yes and no, as for `torch.nn.functional.binary_cross_entropy_with_logits`.
        likelihood: one of these three words.
        generator: on the outputs' device.

    Returns:
        ``[..., C]`` in the outputs' dtype. Over the draws its mean is 0, and its second moments are the Fisher
        information of the outputs.

    Raises:
        ValueError: for another word.
    """
    f = outputs.double() if outputs.dtype == torch.float64 else outputs.float()
    if likelihood == "normal":
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        return noise.to(outputs.dtype)
    if likelihood == "bernoulli":
        p = f.sigmoid()
        return (p - torch.bernoulli(p, generator=generator)).to(outputs.dtype)
    if likelihood != "categorical":
        raise ValueError(f"likelihood={likelihood!r}: must be one of {', '.join(map(repr, LIKELIHOODS))}")
    p = f.softmax(-1)
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).view(*p.shape[:-1], 1)
    return (p - torch.zeros_like(p).scatter_(-1, drawn, 1.0)).to(outputs.dtype)
