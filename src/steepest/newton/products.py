"""Products of vectors with Jacobians, Hessians, Gauss-Newton and Fisher matrices, from the graph of a loss.

With parameters ``θ [P]``, outputs ``o(θ)`` of M numbers and a loss ``ℓ(o)``:

    J = ∂o/∂θ  [M, P]        H_L = ∂²ℓ/∂o²  [M, M]
    Gauss-Newton matrix      Jᵀ H_L J                                 [P, P]
    Fisher matrix            Jᵀ F_o J, F_o of the model's likelihood  [P, P]
    Hessian                  ∂²ℓ/∂θ²                                  [P, P]

No matrix is formed, and no functional form of the model is needed (Pearlmutter, 1994; Schraudolph, 2002). Jᵀu is one
backward pass. It is linear in u, so that J v is the derivative of ⟨Jᵀw, v⟩ by w, wherever w is: a backward pass through
the backward pass of w = 0, whose graph is made once and serves all products.

Vectors of parameters are flat, ``[P]``; vectors of outputs have the outputs' shape. The weights must not move between
two products of one graph: torch raises then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A square matrix as a function from vectors to vectors."""

Likelihood = Literal["categorical", "normal", "bernoulli"]
LIKELIHOODS = get_args(Likelihood)


class Jacobian:
    """The derivative ``J [M, P]`` of outputs with M numbers by parameters with P numbers.

    Args:
        outputs: ``[...]``, in the graph that made them. The graph lives as long as this object does.
        params: the parameters; those that the outputs don't depend on have columns of zeros.

    Each method raises a ValueError if the outputs have no graph, or depend on none of the parameters.

    Example:
        >>> W = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> J = Jacobian(W**2, [W])
        >>> J.times(torch.tensor([1.0, 1.0])), J.transposed_times(torch.tensor([0.0, 1.0])), J.dense()
        (tensor([2., 4.]), tensor([0., 4.]), tensor([[2., 0.],
                [0., 4.]]))
    """

    def __init__(self, outputs: Tensor, params: Sequence[Tensor]) -> None:
        self.outputs, self.params = outputs, params

    def times(self, v: Tensor) -> Tensor:
        """Return ``J v``, of the outputs' shape, for ``v [P]``."""
        w, pulled = self._pulled
        return _derivative(pulled, split(v, self.params), [w]).view_as(self.outputs)

    def transposed_times(self, u: Tensor) -> Tensor:
        """Return ``Jᵀ u [P]`` for ``u`` of the outputs' shape."""
        return join(pull(self.outputs, self.params, u, what="outputs"), self.params)

    def used(self) -> Tensor:
        """Return whether the outputs depend on each parameter, for each of its entries ``[P]``."""
        parts = zip(self._pulled[1], self.params, strict=True)
        return torch.cat([torch.full((p.numel(),), x is not None, device=p.device) for x, p in parts])

    def dense(self, chunk: int = 256) -> Tensor:
        """Return ``J [M, P]`` itself, by M backward passes, ``chunk`` of which run as one batch."""
        size = self.outputs.numel()
        rows = [self._rows(start, min(start + chunk, size)) for start in range(0, size, chunk)]
        return torch.cat(rows)

    def _rows(self, start: int, stop: int) -> Tensor:
        unit = torch.zeros(stop - start, self.outputs.numel(), dtype=self.outputs.dtype, device=self.outputs.device)
        unit[range(stop - start), range(start, stop)] = 1.0
        units = unit.view(stop - start, *self.outputs.shape)  # [rows, ...]
        pulled = pull(self.outputs, self.params, units, what="outputs", batch=True)
        parts = [
            units.new_zeros(stop - start, p.numel()) if g is None else g.reshape(stop - start, -1)
            for g, p in zip(pulled, self.params, strict=True)
        ]
        return torch.cat(parts, 1)  # [rows, P]

    @cached_property
    def _pulled(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """``w = 0`` of the outputs' shape, and ``Jᵀ w`` as a function of w."""
        w = torch.zeros_like(self.outputs, requires_grad=True)
        return w, pull(self.outputs, self.params, w, what="outputs", graph=True)


def hessian(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Product]:
    """Return the gradient ``[P]`` of a loss, and the product of its Hessian with a vector ``[P]``.

    Raises:
        ValueError: if the loss has no graph, or depends on none of the parameters.

    Example:
        >>> W = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> gradient, product = hessian((W**3).sum(), [W])
        >>> gradient, product(torch.ones(2))
        (tensor([ 3., 12.]), tensor([ 6., 12.]))
    """
    first = pull(loss, params, what="loss", graph=True)
    return join(first, params).detach(), lambda v: _derivative(first, split(v, params), params)


def output_hessian(loss: Tensor, outputs: Tensor) -> Product:
    """Return the product of ``H_L = ∂²ℓ/∂o²`` with a vector of the outputs' shape; both are in the loss' graph.

    Raises:
        ValueError: if the loss does not depend on the outputs.

    Example:
        >>> outputs = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> output_hessian((outputs**3).sum(), outputs)(torch.ones(2))
        tensor([ 6., 12.])
    """
    if not outputs.requires_grad:
        raise ValueError("no graph behind the outputs: return them as the model computed them, not detached")
    (first,) = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
    if first is None:
        raise ValueError(
            "the loss does not depend on the outputs: the closure must compute it from the very tensor that it "
            "returns, not from a detached or another one"
        )
    return lambda u: _derivative([first], [u], [outputs]).view_as(outputs)


def likelihood_hessian(outputs: Tensor, likelihood: Likelihood) -> Product:
    """Return the product of ``F_o``, the Fisher matrix of the outputs, with a vector of the outputs' shape.

    It is that of the mean over rows of the negative log likelihood, which its Hessian equals, whatever the targets.
    Rows are what is left of the outputs' shape without its last dimension.

        categorical    softmax of C logits           (diag p - p pᵀ) / rows
        normal         mean of C unit normals        I / rows
        bernoulli      logits of C independent bits  diag(p (1 - p)) / rows

    Raises:
        ValueError: for an unknown likelihood and for outputs whose shape doesn't fit.

    Example:
        >>> likelihood_hessian(torch.zeros(1, 2), "categorical")(torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.2500, -0.2500]])
    """
    check_likelihood(likelihood)
    o = outputs.detach()
    if o.dim() < 2:
        raise ValueError(
            f"outputs of shape {list(o.shape)} for likelihood={likelihood!r}: must be [rows, ..., C], with one row of "
            "numbers for each datum; unsqueeze(-1) makes a column of single numbers"
        )
    if likelihood == "categorical" and o.shape[-1] < 2:
        raise ValueError(
            f"outputs of shape {list(o.shape)} for likelihood='categorical': must be [rows, ..., C] with the logits of "
            "at least two classes; single logits of yes or no are likelihood='bernoulli'"
        )
    rows = max(1, o.numel() // max(1, o.shape[-1]))
    if likelihood == "normal":
        return lambda u: u / rows
    if likelihood == "bernoulli":
        variance = o.sigmoid() * (-o).sigmoid() / rows  # [..., C]
        return lambda u: variance * u
    p = o.softmax(-1)  # [..., C]
    return lambda u: p * (u - (p * u).sum(-1, keepdim=True)) / rows


def gauss_newton(J: Jacobian, inner: Product) -> Product:
    """Return the product of ``Jᵀ H J`` with a vector ``[P]``, ``inner`` being the product of H ``[M, M]``."""
    return lambda v: J.transposed_times(inner(J.times(v)))


def check_likelihood(likelihood: object) -> None:
    """Raise a ValueError unless the likelihood is one that is known."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood={likelihood!r}: must be one of {', '.join(map(repr, LIKELIHOODS))}")


def pull(
    x: Tensor, params: Sequence[Tensor], u: Tensor | None = None, *, what: str, graph: bool = False, batch: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradient of ⟨x, u⟩ by each parameter, by one backward pass; None where there is none.

    Args:
        x: in a graph, which is kept.
        params: the parameters.
        u: of x's shape, with one dimension more in front for a ``batch`` of vectors; None for a scalar x.
        what: how messages call x.
        graph: whether gradients can be differentiated again.
        batch: whether u is a batch.

    Raises:
        ValueError: if x has no graph any more, never had one, or if it holds none of the parameters.

    >>> pull(torch.ones(()), [], what="loss")
    Traceback (most recent call last):
    ValueError: no graph behind the loss: return it as the model computed it, not a number, detached, or under no_grad
    """
    if not x.requires_grad:
        raise ValueError(
            f"no graph behind the {what}: return it as the model computed it, not a number, detached, or under no_grad"
        )
    try:
        found = torch.autograd.grad(
            x, params, u, retain_graph=True, create_graph=graph, allow_unused=True, is_grads_batched=batch
        )
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ValueError(
            f"the graph of the {what} is gone: the closure must not call backward(); the optimizer does that itself"
        ) from error
    if all(g is None for g in found):
        raise ValueError(f"none of the optimizer's parameters is in the graph of the {what}")
    return found


def split(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Return a vector ``[P]`` as tensors of the parameters' shapes.

    >>> split(torch.arange(3.0), [torch.zeros(1), torch.zeros(1, 2)])
    [tensor([0.]), tensor([[1., 2.]])]
    """
    return [x.view(p.shape) for x, p in zip(torch.split(v, [p.numel() for p in params]), params, strict=True)]


def join(tensors: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Return tensors of the parameters' shapes as a vector ``[P]``; None counts as zeros.

    >>> join([None, torch.ones(1, 2)], [torch.zeros(1), torch.zeros(1, 2)])
    tensor([0., 1., 1.])
    """
    pairs = zip(tensors, params, strict=True)
    return torch.cat([p.new_zeros(p.numel()) if x is None else x.reshape(-1) for x, p in pairs])


def _derivative(first: Sequence[Tensor | None], v: Sequence[Tensor], by: Sequence[Tensor]) -> Tensor:
    """Return the gradient of ⟨first, v⟩ by tensors, as a vector; what does not depend on them counts as zero."""
    pairs = [(g, x) for g, x in zip(first, v, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return join([None] * len(by), by)
    gradients, vectors = zip(*pairs, strict=True)
    return join(torch.autograd.grad(gradients, by, vectors, retain_graph=True, allow_unused=True), by)
