"""Roots of a loss' Hessian with respect to a model's outputs, row by row: what the exact ("type2") Fisher is made of.

Backward passes from the columns of a root ``H = R Rᵀ`` give gradients whose second moments are ``Jᵀ H J``, the
Gauss-Newton matrix: a Fisher without sampling. A pass from ``R ε`` with random signs ε gives that on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.curvature.likelihoods import sampled_gradient

Loss = Callable[[Any, Any], Tensor]
LINEAR = "the loss is linear in the outputs, so that its Hessian is zero; take fisher='empirical'"


def root_columns(loss: Loss, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
    """Yield the columns of a root of the loss' Hessian in each row of the outputs, each of the outputs' shape.

    The root is ``√w (diag(√p) - p √pᵀ)`` for cross entropy, which its Hessian tells, otherwise the symmetric one.
    Where a layer's output is in several rows' graphs, sums over these depend on the choice.

    Args:
        loss: from outputs and targets to a scalar. It must be a sum of functions of single rows.
        outputs: ``[..., C]``; a row is what stands along the last dimension. C columns are yielded.
        targets: whatever the loss takes.

    Raises:
        ValueError: for losses that are linear, not convex in the outputs, or couple rows.

    Example:
        >>> columns = root_columns(nn.MSELoss(reduction="sum"), torch.zeros(1, 2), torch.ones(1, 2))
        >>> torch.stack(list(columns), -1)
        tensor([[[1.4142, 0.0000],
                 [0.0000, 1.4142]]])
    """
    weights = entropy_weights(loss, outputs, targets)
    if weights is not None:
        yield from _entropy_root(outputs, weights)
        return
    H = _hessian(loss, outputs, targets)
    p = outputs.detach().softmax(-1)
    weights = (H.diagonal(dim1=-2, dim2=-1).sum(-1) / (p - p * p).sum(-1))[..., None]
    entropy = weights[..., None] * (torch.diag_embed(p) - p[..., :, None] * p[..., None, :])
    if torch.allclose(H, entropy, rtol=1e-4, atol=1e-4 * float(H.abs().max())):
        yield from _entropy_root(outputs, weights)
    else:
        yield from _symmetric_root(H).unbind(-1)


def random_column(loss: Loss, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
    """Return a random tensor of the outputs' shape, whose second moments are, on average, the loss' Hessian.

    For cross entropy it is the gradient for classes drawn from the model, and no Hessian is made.
    """
    weights = entropy_weights(loss, outputs, targets)
    if weights is not None:
        return sampled_gradient(outputs.detach(), "categorical", generator) * weights.sqrt()
    R = _symmetric_root(_hessian(loss, outputs, targets))  # [..., C, C]
    signs = torch.randint(0, 2, outputs.shape, generator=generator, device=outputs.device).to(R) * 2 - 1
    return (R @ signs[..., None])[..., 0]


def entropy_weights(loss: Loss, outputs: Tensor, targets: Any) -> Tensor | None:
    """Return what each row counts ``[..., 1]`` if the loss is torch's cross entropy without further options.

    >>> entropy_weights(F.cross_entropy, torch.ones(4, 3), torch.tensor([0, 1, -100, 2])).flatten()
    tensor([0.3333, 0.3333, 0.0000, 0.3333])
    """
    reduction, ignored = "mean", -100
    if isinstance(loss, nn.CrossEntropyLoss):
        if loss.weight is not None:
            return None
        reduction, ignored = loss.reduction, loss.ignore_index
    elif loss is not F.cross_entropy:
        return None
    if outputs.dim() > 2 or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    counted = (targets != ignored).to(outputs.dtype)[..., None]
    return counted / counted.sum() if reduction == "mean" else counted


def _entropy_root(outputs: Tensor, weights: Tensor) -> Iterator[Tensor]:
    p = outputs.detach().softmax(-1)
    for c in range(p.shape[-1]):
        column = -p * p[..., c : c + 1].sqrt()
        column[..., c] += p[..., c].sqrt()
        yield column * weights.sqrt()


def _hessian(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """The loss' second derivatives in each row, ``[..., C, C]``."""
    with torch.enable_grad():
        f = outputs.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(f, targets), f, create_graph=True)
        if not g.requires_grad:
            raise ValueError(LINEAR)
        columns = [torch.autograd.grad(g[..., c].sum(), f, retain_graph=True)[0] for c in range(f.shape[-1])]
        probe = torch.cos(torch.arange(1.0, f.numel() + 1, device=f.device)).view(f.shape).to(f.dtype)
        (product,) = torch.autograd.grad(g, f, probe)
    H = torch.stack(columns, -1)
    if not H.any():
        raise ValueError(LINEAR)
    if not torch.allclose((H @ probe[..., None])[..., 0], product, rtol=1e-3, atol=1e-3 * float(H.abs().max())):
        raise ValueError(
            f"outputs of shape {list(outputs.shape)}: the loss is no sum over rows, the last dimension; if classes are "
            "another dimension, move that to the end within the loss' function; otherwise take fisher='empirical'"
        )
    return H


def _symmetric_root(H: Tensor) -> Tensor:
    """``H^½ [..., C, C]``."""
    values, vectors = torch.linalg.eigh(H)
    if values.min() < -1e-4 * values.abs().max():
        raise ValueError("the loss is not convex in the outputs: take fisher='empirical'")
    root: Tensor = (vectors * values.clamp_min(0.0).sqrt()[..., None, :]) @ vectors.mT
    return root
