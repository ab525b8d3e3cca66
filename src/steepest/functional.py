"""The parts of SOAP and KL-Shampoo as functions on single matrices or batches ``[..., m, n]``.

Shampoo describes gradients ``G [..., m, n]`` by two Kronecker factors, ``L ≈ E[G Gᵀ] [..., m, m]`` and
``R ≈ E[Gᵀ G] [..., n, n]``. SOAP runs Adam in the coordinates of their eigenbases ``Q_L`` and ``Q_R``
(Vyas et al., arXiv:2409.11321). A gradient into these coordinates and back:

    >>> G = torch.randn(2, 3)
    >>> factors = init_kronecker_factors(G.shape)
    >>> update_kronecker_factors(factors, G, shampoo_beta=0.95)
    >>> projected = precondition(G, bases := get_eigenbasis_eigh(factors))
    >>> torch.allclose(precondition(projected, bases, dims=[[0], [1]]), G, atol=1e-5)
    True

Lists hold an entry per side, ``[left, right]``; a side that is None or left out stays as it is. Results hold no
autograd graph. Wrong types raise a TypeError and wrong shapes a ValueError, which name the argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeVar, cast

import torch
from torch import Tensor

from steepest.linalg.attempts import succeeded
from steepest.linalg.eigenbasis import conjugate as conjugate
from steepest.linalg.eigenbasis import eigenbasis_error
from steepest.linalg.eigenbasis import eigh_with_fallback as eigh_with_fallback
from steepest.linalg.solvers import SOLVERS, by_columns, reordered
from steepest.linalg.solvers import orthogonal_iteration as orthogonal_iteration
from steepest.linalg.surroundings import without_autocast
from steepest.linalg.symmetric import accumulate_gram
from steepest.linalg.whitening import root_mean_square, whitening_weights

Sides = Sequence[Tensor | None]
Dims = Sequence[Sequence[int]]
Entry = TypeVar("Entry", bound=Tensor | None)  # a list without None gives a list without None


@without_autocast
def precondition(x: Tensor, eigenbasis_list: Sides | None = None, dims: Dims | None = None) -> Tensor:
    """Project ``x`` into the eigenbases, ``Q_Lᵀ x Q_R``, or back out of them, ``Q_L x Q_Rᵀ``.

    Args:
        x: matrices ``[..., m, n]``.
        eigenbasis_list: ``[Q_L [..., m, m], Q_R [..., n, n]]`` or ``[Q_L]``. By default, as for ``[]``, x is returned.
        dims: which dimension of ``x`` is contracted with which of each basis, as in `torch.tensordot`, but dimensions
            keep their places. ``[[0], [0]]``, the default, projects into the eigenbases, ``[[0], [1]]`` back; the
            second basis meets the columns. For columns alone, ``[[1], [0]]`` and ``[Q]`` give ``x Q``, ``[[1], [1]]``
            gives ``x Qᵀ``. Batch dimensions are not counted. A ValueError for everything else.

    Example:
        >>> x, Q = torch.randn(10, 20), torch.linalg.qr(torch.randn(10, 10)).Q
        >>> torch.allclose(precondition(x, [Q], dims=[[0], [0]]), Q.T @ x, atol=1e-5)
        True
    """
    x = _matrices(x, "x")
    index = {0: 0, 1: 1, -2: 0, -1: 1}  # rows and columns
    try:
        (of_x,), (of_basis,) = [[0], [0]] if dims is None else dims
        side, back = index[of_x], index[of_basis] == 1
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"dims={dims!r}: must be [[0], [0]] (into the eigenbases) or [[0], [1]] (back)") from None
    bases = _sides([] if eigenbasis_list is None else eigenbasis_list, "eigenbasis_list", x, side, broadcast=True)
    return _project(x, bases, back)


def init_kronecker_factors(
    grad_shape: Sequence[int], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return zero Kronecker factors ``L [..., m, m]`` and ``R [..., n, n]`` for gradients of shape ``[..., m, n]``.

    Args:
        grad_shape: the shape of the gradients; ValueError if it has fewer than two dimensions.
        device: the factors' device; by default torch's.
        dtype: the factors' dtype; by default torch's, float32, as decompositions are not safe in lower precision.

    Example:
        >>> [tuple(K.shape) for K in init_kronecker_factors(torch.Size([10, 20]))]
        [(10, 10), (20, 20)]
    """
    if len(grad_shape) < 2:
        raise ValueError(f"grad_shape={list(grad_shape)}: must have at least two dimensions")
    *batch, m, n = grad_shape
    L, R = (torch.zeros(*batch, d, d, device=device, dtype=dtype) for d in (m, n))
    return L, R


@without_autocast
def update_kronecker_factors(kronecker_factor_list: Sides, grad: Tensor, shampoo_beta: float | Tensor) -> None:
    """Update the factors in place: ``L ← β L + (1-β) G Gᵀ`` and ``R ← β R + (1-β) Gᵀ G`` (arXiv:2409.11321, Alg. 3).

    Args:
        kronecker_factor_list: ``[L [..., m, m], R [..., n, n]]`` or ``[L]``; ValueError if they do not fit ``grad``.
        grad: the gradient ``G [..., m, n]``, in any dtype; products are computed in the factors'.
        shampoo_beta: the decay β, a number or one per matrix ``[..., 1, 1]``.

    Example:
        >>> L, R = torch.zeros(2, 2), torch.zeros(3, 3)
        >>> update_kronecker_factors([L, R], torch.ones(2, 3), shampoo_beta=0.5)
        >>> L.tolist()
        [[1.5, 1.5], [1.5, 1.5]]
    """
    grad = _matrices(grad, "grad")
    for K, X in zip(_sides(kronecker_factor_list, "kronecker_factor_list", grad), (grad, grad.mT), strict=True):
        _accumulate(K, X, shampoo_beta)


@without_autocast
def update_kronecker_factors_kl_shampoo(
    kronecker_factor_list: Sides,
    grad: Tensor,
    shampoo_beta: float | Tensor,
    eigenbasis_list: Sides,
    eps: float,
    eigval_exp: float = -1.0,
    *,
    relative_floor: float = 0.0,
) -> None:
    """Update the factors in place by KL-Shampoo: each takes in the gradient whitened by the other (arXiv:2509.03378).

    ``L ← β L + (1-β) G Q_R s_R Q_Rᵀ Gᵀ / n`` and ``R ← β R + (1-β) Gᵀ Q_L s_L Q_Lᵀ G / m``, with ``s = λ^eigval_exp``
    and λ the Rayleigh quotients ``diag(Qᵀ K Q)`` of the factors before the update.

    Args:
        kronecker_factor_list: ``[L [..., m, m], R [..., n, n]]`` or ``[L]``; ValueError if they do not fit ``grad``.
        grad: the gradient ``G [..., m, n]``.
        shampoo_beta: the decay β, a number or one per matrix ``[..., 1, 1]``.
        eigenbasis_list: ``[Q_L [..., m, m], Q_R [..., n, n]]``. A side without factor or basis whitens nothing.
        eps: the least that λ counts as. Factors start at zero, so their first update is 1/eps too large.
        eigval_exp: the exponent of λ; the default is the paper's.
        relative_floor: if positive, λ counts as at least this fraction of the largest instead of ``eps``, and as the
            gradient's root mean square while a factor is zero. Then factors scale with the gradients at every step.

    Example:
        >>> L, R = init_kronecker_factors([2, 2])
        >>> G = torch.diag(torch.tensor([2.0, 1.0]))
        >>> update_kronecker_factors_kl_shampoo([L, R], G, 0.0, [torch.eye(2), torch.eye(2)], eps=1.0)
        >>> L.tolist()
        [[2.0, 0.0], [0.0, 0.5]]
    """
    grad = _matrices(grad, "grad")
    factors = _sides(kronecker_factor_list, "kronecker_factor_list", grad)
    halves: list[Tensor | None] = [None, None]  # Q s^½ of each side, whose product with its transpose whitens
    for side, (K, Q) in enumerate(zip(factors, _sides(eigenbasis_list, "eigenbasis_list", grad), strict=True)):
        if K is not None and Q is not None and grad.numel():
            quotients = conjugate(K, Q.to(K.dtype), diag=True)  # [..., d]
            rms = root_mean_square(grad.to(K.dtype))  # [..., 1]
            weights = whitening_weights(quotients, rms, eps, eigval_exp, relative_floor)
            halves[side] = Q * weights.sqrt().unsqueeze(-2)
    for K, X, half in zip(factors, (grad, grad.mT), reversed(halves), strict=True):
        X = X if half is None else X.to(half.dtype) @ half
        _accumulate(K, X, shampoo_beta, scale=1 / max(X.shape[-1], 1))


@without_autocast
def update_eigenbasis_and_exp_avgs(
    kronecker_factor_list: Sequence[Entry],
    eigenbasis_list: Sequence[Entry],
    exp_avg_sq: Tensor,
    exp_avg: Tensor,
    use_eigh: bool = False,
    power_iter_steps: int = 1,
    *,
    match_columns: bool = True,
) -> tuple[list[Entry], Tensor, Tensor]:
    """Refresh the eigenbases and carry Adam's two moments into the new coordinates (arXiv:2409.11321, Alg. 3 and 4).

    ``exp_avg`` is projected out of the old bases and into the new. ``exp_avg_sq``, a variance for each pair of
    eigenvectors, cannot be rotated; its rows and columns are reordered as the eigenvectors are. A matrix for which
    every solver fails keeps its bases and moments. Returns the new eigenbases, the new ``exp_avg``, and ``exp_avg_sq``.

    Args:
        kronecker_factor_list: ``[L [..., m, m], R [..., n, n]]`` or ``[L]``.
        eigenbasis_list: the current eigenbases; not changed. ValueError if one is missing or does not fit.
        exp_avg_sq: Adam's second moment ``[..., m, n]``, changed in place.
        exp_avg: Adam's first moment ``[..., m, n]`` in the current bases; not changed.
        use_eigh: decompose the factors in full. The default, orthogonal iteration, costs less.
        power_iter_steps: products with the factor in an orthogonal iteration; more follow a moving factor closer.
        match_columns: with ``use_eigh``, reorder ``exp_avg_sq`` by the old columns' Rayleigh quotients. False leaves it
            by rank, as public implementations do: eigenvectors whose eigenvalues cross exchange their second moments.

    Example:
        >>> L, R = torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2)
        >>> bases, exp_avg, exp_avg_sq = update_eigenbasis_and_exp_avgs(
        ...     [L, R], [torch.eye(2), torch.eye(2)], torch.tensor([[1.0, 1.0], [5.0, 5.0]]), torch.zeros(2, 2))
        >>> exp_avg_sq.tolist()
        [[5.0, 5.0], [1.0, 1.0]]
    """
    v, m = _matrices(exp_avg_sq, "exp_avg_sq"), _matrices(exp_avg, "exp_avg")
    if m.shape != v.shape:
        raise ValueError(f"exp_avg has shape {list(m.shape)}, but exp_avg_sq {list(v.shape)}")
    old = _sides(eigenbasis_list, "eigenbasis_list", v)
    new, v_in_order = _refresh(kronecker_factor_list, old, v, use_eigh, power_iter_steps)
    all_found = torch.ones(v.shape[:-2], dtype=torch.bool, device=v.device)
    found = torch.stack([all_found, *(succeeded(Q) for Q in new if Q is not None)]).all(dim=0)[..., None, None]
    m = torch.where(found, _project(_project(m, old, back=True), new), m)
    if match_columns or not use_eigh:
        v.copy_(torch.where(found, v_in_order, v))
    kept = [None if Q is None or P is None else torch.where(found, Q, P) for Q, P in zip(new, old, strict=True)]
    return cast("list[Entry]", kept[: len(eigenbasis_list)]), m.to(exp_avg.dtype), exp_avg_sq


@without_autocast
def all_eigenbases_met_criteria(
    kronecker_factor_list: Sides, eigenbasis_list: Sides, adaptive_update_tolerance: float = 1e-7
) -> bool:
    """Return whether ``‖K‖_F - ‖diag(Qᵀ K Q)‖₂ ≤ tolerance · ‖K‖_F`` for all factors K, so that no update is needed.

    Args:
        kronecker_factor_list: symmetric factors ``[..., d, d]``, any number of them.
        eigenbasis_list: their eigenbases; ValueError if one is missing or of another shape.
        adaptive_update_tolerance: the tolerance; the default is about float32's rounding.

    Example:
        >>> K = torch.diag(torch.tensor([2.0, 1.0]))
        >>> all_eigenbases_met_criteria([K, K], [torch.eye(2), torch.eye(2)])
        True
    """
    pairs = _pairs(_sides(kronecker_factor_list, "kronecker_factor_list"), _sides(eigenbasis_list, "eigenbasis_list"))
    return all(bool((eigenbasis_error(K, Q.to(K.dtype)) <= adaptive_update_tolerance).all()) for K, Q in pairs)


@without_autocast
def get_eigenbasis_eigh(kronecker_factor_list: Sequence[Entry], eps: float | None = None) -> list[Entry]:
    """Return the eigenbases of the factors by full decomposition, columns by descending eigenvalue.

    A matrix that cannot be decomposed in float64 either, such as one with NaN, raises `torch.linalg.LinAlgError`.

    Args:
        kronecker_factor_list: symmetric factors ``[..., d, d]``, any number of them; ValueError if one is not square.
        eps: a number to add to their diagonals first, as help for the solver; by default nothing.

    Example:
        >>> k_factor1, k_factor2 = torch.randn(4, 4), torch.randn(5, 5)
        >>> ortho_matrices = get_eigenbasis_eigh([k_factor1 @ k_factor1.T, k_factor2 @ k_factor2.T])
        >>> [tuple(Q.shape) for Q in ortho_matrices]
        [(4, 4), (5, 5)]
    """
    factors = _sides(kronecker_factor_list, "kronecker_factor_list")
    return cast("list[Entry]", [None if K is None else eigh_with_fallback(K, eps=eps)[1] for K in factors])


@without_autocast
def get_eigenbasis_qr(
    kronecker_factor_list: Sequence[Entry],
    eigenbasis_list: Sequence[Entry],
    exp_avg_sq: Tensor,
    power_iter_steps: int = 1,
) -> tuple[list[Entry], Tensor]:
    """Return the eigenbases after orthogonal iteration, and ``exp_avg_sq`` in the order of their columns.

    Columns are ordered by descending Rayleigh quotient, then ``Q ← qr(K Q)`` (arXiv:2409.11321, Alg. 4); the basis of a
    matrix that no solver can factorize is NaN.

    Args:
        kronecker_factor_list: ``[L [..., m, m], R [..., n, n]]`` or ``[L]``.
        eigenbasis_list: the current eigenbases; ValueError if one is missing or does not fit.
        exp_avg_sq: Adam's second moment ``[..., m, n]``; not changed.
        power_iter_steps: products with the factor; more follow a moving factor closer, and cost more.

    Example:
        >>> G, H = torch.randn(2, 10, 20)
        >>> bases = get_eigenbasis_eigh([G @ G.T, G.T @ G])
        >>> (Q_L, Q_R), exp_avg_sq = get_eigenbasis_qr([H @ H.T, H.T @ H], bases, torch.rand(10, 20))
        >>> torch.allclose(Q_L.T @ Q_L, torch.eye(10), atol=1e-5)
        True
    """
    v = _matrices(exp_avg_sq, "exp_avg_sq")
    bases, v = _refresh(kronecker_factor_list, eigenbasis_list, v, False, power_iter_steps)
    return cast("list[Entry]", bases[: len(eigenbasis_list)]), v


def _matrices(x: Tensor, name: str) -> Tensor:
    """``x [..., m, n]``, without its graph but in the same memory; an error if it is something else."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [..., m, n], not {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"{name} must be matrices [..., m, n], not of shape {list(x.shape)}")
    return x.detach() if x.requires_grad else x


def _sides(
    given: Sides, name: str, x: Tensor | None = None, first: int = 0, broadcast: bool = False
) -> list[Tensor | None]:
    """The square matrices of a list; with ``x [..., m, n]``, ``[left, right]`` for its sides from ``first`` on."""
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} must be a list of matrices, not {type(given).__name__}")
    if x is not None and len(given) > 2 - first:
        raise ValueError(f"{name} has length {len(given)}; it must be at most {2 - first}, one for each side")
    entries = [None if K is None else _matrices(K, f"{name}[{i}]") for i, K in enumerate(given)]
    for i, K in enumerate(entries):
        if K is not None:
            *batch, d = K.shape[:-1] if x is None else [*x.shape[:-2], x.shape[first + i - 2]]
            sizes = zip_longest(K.shape[-3::-1], reversed(batch), fillvalue=1 if broadcast else 0)
            if K.shape[-2:] != (d, d) or not all(a == b or (broadcast and 1 in (a, b)) for a, b in sizes):
                raise ValueError(f"{name}[{i}] has shape {list(K.shape)}; it must be {[*batch, d, d]}")
    return entries if x is None else [*[None] * first, *entries, None, None][:2]


def _pairs(factors: Sides, bases: Sides) -> list[tuple[Tensor, Tensor]]:
    """The factors that are there with their bases, or an error."""
    if [None if K is None else K.shape for K in factors] != [None if Q is None else Q.shape for Q in bases]:
        raise ValueError("kronecker_factor_list and eigenbasis_list: every factor must have a basis of its shape")
    return [(K, Q) for K, Q in zip(factors, bases, strict=True) if K is not None and Q is not None]


def _project(x: Tensor, bases: Sides, back: bool = False) -> Tensor:
    for side, Q in enumerate(bases):
        if Q is not None:
            dtype = torch.promote_types(x.dtype, Q.dtype)
            x, Q = x.to(dtype), (Q.mT if back else Q).to(dtype)
            x = Q.mT @ x if side == 0 else x @ Q
    return x


def _accumulate(K: Tensor | None, X: Tensor, beta: float | Tensor, scale: float = 1.0) -> None:
    """``K ← β K + (1-β) · scale · X Xᵀ``, in place, if there is a K; an empty product is zero."""
    if K is not None and X.numel() == 0:
        K.mul_(beta)
    elif K is not None:
        accumulate_gram(K, X.to(K.dtype), beta, scale=scale)


def _refresh(factors: Sides, bases: Sides, v: Tensor, use_eigh: bool, steps: int) -> tuple[list[Tensor | None], Tensor]:
    """The next eigenbases ``[left, right]``, and ``v [..., m, n]`` in the order of their columns."""
    factors, new = _sides(factors, "kronecker_factor_list", v), _sides(bases, "eigenbasis_list", v)
    _pairs(factors, new)
    for side, (K, Q) in enumerate(zip(factors, new, strict=True)):
        if K is not None and Q is not None and K.numel():
            K = K.to(torch.promote_types(K.dtype, torch.float32))  # solvers know no lower precision
            found, order = SOLVERS["eigh" if use_eigh else "qr"](K, Q.to(K.dtype), steps)
            new[side] = by_columns(found.to(Q.dtype))
            v = reordered(v, order, side - 2) if v.numel() else v
    return new, v
