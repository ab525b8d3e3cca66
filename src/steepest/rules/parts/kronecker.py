"""Kronecker factors: a matrix's curvature as one covariance of its rows and one of its columns.

For gradients ``G [..., m, n]`` the two factors are ``L ≈ E[G Gᵀ]`` (``[..., m, m]``) and ``R ≈ E[Gᵀ G]``
(``[..., n, n]``); their eigenvectors ``Q_L``, ``Q_R`` are the coordinates in which Shampoo and SOAP work. These
functions feed the factors, refresh the eigenvectors and project into and out of them. SOAP itself runs on them, on
stacks ``[B, m, n]``; called directly they take single matrices as well, or any leading batch dimensions.

Factors and eigenbases are passed as lists ``[left, right]``. A side without preconditioning is ``None``: the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.linalg.attempts import succeeded
from steepest.linalg.eigenbasis import (
    conjugate,
    eigenbasis_error,
    eigenvectors,
    eigh_with_fallback,
)
from steepest.linalg.solvers import by_columns, next_basis, reordered
from steepest.linalg.symmetric import accumulate_gram
from steepest.linalg.whitening import root_mean_square, whitening_weights

Sides = Sequence[Tensor | None]
"""``[left, right]``; None is the identity."""

INTO = [[0], [0]]
OUT_OF = [[0], [1]]


def precondition(x: Tensor, eigenbasis_list: Sides | None = None, dims: list[list[int]] | None = None) -> Tensor:
    """Project ``x`` into the eigenbases, ``Q_Lᵀ x Q_R``, or back out of them, ``Q_L x Q_Rᵀ``.

    Args:
        x: matrices ``[..., m, n]``.
        eigenbasis_list: ``[Q_L [..., m, m], Q_R [..., n, n]]``; None (or an entry None) leaves that side as it is.
        dims: which dimension of ``x`` is contracted with which of each basis, as in `torch.tensordot`:
            ``[[0], [0]]`` (the default) projects into the eigenbases, ``[[0], [1]]`` back.

    Raises:
        TypeError: if ``x`` or a basis is not a tensor.
        ValueError: if shapes don't fit, or for other ``dims``.

    Example:
        >>> x = torch.arange(6.0).reshape(2, 3)
        >>> Q_L, Q_R = torch.eye(2).flip(0), torch.eye(3)
        >>> precondition(x, [Q_L, Q_R])
        tensor([[3., 4., 5.],
                [0., 1., 2.]])
        >>> torch.equal(precondition(precondition(x, [Q_L, Q_R]), [Q_L, Q_R], dims=[[0], [1]]), x)
        True
    """
    if dims not in (None, INTO, OUT_OF):
        raise ValueError(f"dims={dims!r}: must be [[0], [0]] (into the eigenbases) or [[0], [1]] (back)")
    if eigenbasis_list is None:
        return x
    left, right = _sides(eigenbasis_list, x, "eigenbasis_list")
    if left is not None:
        x = _times(left if dims == OUT_OF else left.mT, x)
    if right is not None:
        x = _times(x, right.mT if dims == OUT_OF else right)
    return x


def _times(A: Tensor, B: Tensor) -> Tensor:
    """``A B``. Of two stacks by the function for them, which looks at their shapes once, not six times."""
    return torch.bmm(A, B) if A.dim() == B.dim() == 3 and len(A) == len(B) else A @ B


def init_kronecker_factors(
    grad_shape: Sequence[int], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Zero factors for gradients of a shape: ``L [..., m, m]`` and ``R [..., n, n]``.

    Args:
        grad_shape: ``[..., m, n]``.
        device: where to make them.
        dtype: torch's default dtype (float32) if not given: sums of outer products and their decomposition are not
            safe in anything less.

    Example:
        >>> [tuple(K.shape) for K in init_kronecker_factors(torch.Size([10, 20]))]
        [(10, 10), (20, 20)]
    """
    if len(grad_shape) < 2:
        raise ValueError(f"grad_shape={list(grad_shape)}: must have at least two dimensions")
    *batch, m, n = grad_shape
    return (
        torch.zeros(*batch, m, m, device=device, dtype=dtype),
        torch.zeros(*batch, n, n, device=device, dtype=dtype),
    )


def update_kronecker_factors(kronecker_factor_list: Sides, grad: Tensor, shampoo_beta: float | Tensor) -> None:
    """Shampoo's and SOAP's feed, in place: ``L ← β L + (1-β) G Gᵀ``, ``R ← β R + (1-β) Gᵀ G``.

    Args:
        kronecker_factor_list: ``[L [..., m, m], R [..., n, n]]``.
        grad: ``G [..., m, n]``.
        shampoo_beta: β, a number or one per matrix ``[..., 1, 1]``.

    Example:
        >>> L, R = init_kronecker_factors([2, 3])
        >>> update_kronecker_factors([L, R], torch.ones(2, 3), shampoo_beta=0.9)
        >>> L
        tensor([[0.3000, 0.3000],
                [0.3000, 0.3000]])
    """
    left, right = _sides(kronecker_factor_list, grad, "kronecker_factor_list")
    if left is not None:
        accumulate_gram(left, grad, shampoo_beta)
    if right is not None:
        accumulate_gram(right, grad.mT, shampoo_beta)


def update_kronecker_factors_kl_shampoo(
    kronecker_factor_list: Sides,
    grad: Tensor,
    shampoo_beta: float | Tensor,
    eigenbasis_list: Sides,
    eps: float,
    eigval_exp: float = -1.0,
    *,
    relative_floor: float = 0.0,
    quotient_list: Sides | None = None,
) -> None:
    """KL-Shampoo's feed, in place: each side sees the gradient whitened by the other (arXiv:2509.03378).

    ``L ← β L + (1-β) G Q_R s_R Q_Rᵀ Gᵀ / n`` and ``R ← β R + (1-β) Gᵀ Q_L s_L Q_Lᵀ G / m``, both from the old factors,
    with ``s = λ^eigval_exp`` and λ the Rayleigh quotients of the old factors in the old bases.

    Args:
        kronecker_factor_list: ``[L [..., m, m], R [..., n, n]]``.
        grad: ``G [..., m, n]``.
        shampoo_beta: β, a number or one per matrix ``[..., 1, 1]``.
        eigenbasis_list: ``[Q_L, Q_R]``. A side None is taken as white.
        eps: λ counts as at least this, as the authors have it. Factors start at zero, so their first feed is 1/eps
            too large, and a quotient that rounding has made negative becomes a weight of 1/eps.
        eigval_exp: the exponent; -1 is the paper's.
        relative_floor: if positive, it takes the place of ``eps``: λ counts as at least this fraction of the largest,
            and the first feed, when the factors are zero, is divided by the gradient's root mean square instead.
            Then a gradient c times as large gives factors c times as large, at every step.
        quotient_list: the λ of both sides, ``[..., m]`` and ``[..., n]``, where the caller keeps them. They are brought
            up to date, in place: λ is linear in the factor and takes the gradient in as it does. That saves a product
            on each side, 2m³ + 2n³; λ must be measured anew (`conjugate` with ``diag=True``) when bases have turned.

    Example:
        >>> L, R = init_kronecker_factors([2, 2])
        >>> G = torch.diag(torch.tensor([2.0, 1.0]))
        >>> update_kronecker_factors_kl_shampoo([L, R], G, 0.0, [torch.eye(2), torch.eye(2)], eps=1.0)
        >>> L
        tensor([[2.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    factors = _sides(kronecker_factor_list, grad, "kronecker_factor_list")
    bases = _sides(eigenbasis_list, grad, "eigenbasis_list")
    rms = root_mean_square(grad)
    whitened: list[Tensor | None] = []
    for K, Q in zip(factors, bases, strict=True):
        if K is None or Q is None:
            whitened.append(None)
            continue
        quotients = conjugate(K, Q, diag=True)
        weights = whitening_weights(quotients, rms, eps, eigval_exp, relative_floor)  # [..., d]
        whitened.append(Q * weights.sqrt().unsqueeze(-2))
    m, n = grad.shape[-2:]
    for K, X, white, width in zip(factors, (grad, grad.mT), reversed(whitened), (n, m), strict=True):
        if K is not None:
            accumulate_gram(K, X if white is None else X @ white, shampoo_beta, scale=1 / width)


def update_eigenbasis_and_exp_avgs(
    kronecker_factor_list: Sides,
    eigenbasis_list: Sides,
    exp_avg_sq: Tensor,
    exp_avg: Tensor,
    use_eigh: bool = False,
    power_iter_steps: int = 1,
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Let the eigenbases follow their factors, and Adam's two moments with them.

    ``exp_avg`` is a vector in the old basis and turns exactly: ``Q_newᵀ Q_old exp_avg ...``. ``exp_avg_sq`` holds one
    number per pair of eigenvectors; it cannot turn, and follows the reordering of the columns, in place.

    Args:
        kronecker_factor_list: ``[L [..., m, m], R [..., n, n]]``.
        eigenbasis_list: ``[Q_L, Q_R]``, the current bases.
        exp_avg_sq: ``[..., m, n]``, changed in place.
        exp_avg: ``[..., m, n]``, in the current bases.
        use_eigh: a full eigendecomposition instead of orthogonal iteration.
        power_iter_steps: iterations of the latter.

    Returns:
        ``(eigenbases, exp_avg, exp_avg_sq)``, of which only ``exp_avg_sq`` is the tensor that was passed. A matrix for
        which a decomposition fails, in float64 too, keeps all three as they were.

    Example:
        >>> L, R = torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2)
        >>> moments = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
        >>> (Q_L, Q_R), m, v = update_eigenbasis_and_exp_avgs(
        ...     [L, R], [torch.eye(2), torch.eye(2)], moments.clone(), moments, use_eigh=True)
        >>> v
        tensor([[5., 5.],
                [1., 1.]])
    """
    bases, reordered = refresh_eigenbases(
        kronecker_factor_list, eigenbasis_list, exp_avg_sq, use_eigh, power_iter_steps
    )
    turned = precondition(precondition(exp_avg, eigenbasis_list, OUT_OF), bases, INTO)
    found = failures(bases, exp_avg_sq)[..., None, None] == 0
    exp_avg_sq.copy_(torch.where(found, reordered, exp_avg_sq))
    kept = [
        None if Q is None or old is None else torch.where(found, Q, old)
        for Q, old in zip(bases, eigenbasis_list, strict=True)
    ]
    return kept, torch.where(found, turned, exp_avg), exp_avg_sq


def refresh_eigenbases(
    kronecker_factor_list: Sides,
    eigenbasis_list: Sides,
    exp_avg_sq: Tensor,
    use_eigh: bool = False,
    power_iter_steps: int = 1,
    match_columns: bool = True,
    solver: str = "qr",
    solved: Sequence[tuple[Tensor, ...] | None] = (None, None),
) -> tuple[list[Tensor | None], Tensor]:
    """New eigenbases by any solver, and ``exp_avg_sq`` in their columns' order; nothing is changed in place.

    A basis that no solver finds is NaN.

    Without ``match_columns`` a full decomposition leaves ``exp_avg_sq`` by rank: where two eigenvalues have crossed,
    each direction then goes on with the other's second moments.

    Example:
        >>> K = torch.diag(torch.tensor([1.0, 4.0]))
        >>> bases, v = refresh_eigenbases([K, None], [torch.eye(2), None], torch.tensor([[1.0], [9.0]]), use_eigh=True)
        >>> v
        tensor([[9.],
                [1.]])
    """
    solver = "eigh" if use_eigh else solver
    if solver == "eigh" and not match_columns:
        return [None if K is None else eigenvectors(K) for K in kronecker_factor_list], exp_avg_sq
    return get_eigenbasis_qr(
        kronecker_factor_list, eigenbasis_list, exp_avg_sq, power_iter_steps, solver=solver, solved=solved
    )


def failures(bases: Sides, x: Tensor) -> Tensor:
    """How many of the bases of each matrix in ``x [..., m, n]`` no solver found: an int64 tensor ``[...]``.

    >>> failures([torch.eye(2), torch.full((3, 3), torch.nan)], torch.zeros(2, 3))
    tensor(1)
    """
    count = torch.zeros(x.shape[:-2], dtype=torch.int64, device=x.device)
    for Q in bases:
        if Q is not None:
            count += ~succeeded(Q)
    return count


def all_eigenbases_met_criteria(
    kronecker_factor_list: Sides, eigenbasis_list: Sides, adaptive_update_tolerance: float = 1e-7
) -> bool:
    """Whether every eigenbasis still diagonalizes its factor well enough: ``‖K‖_F - ‖diag(QᵀKQ)‖₂ ≤ tol · ‖K‖_F``.

    The answer is a Python bool: on a GPU, asking waits for the device.

    Example:
        >>> K = torch.diag(torch.tensor([2.0, 1.0]))
        >>> all_eigenbases_met_criteria([K, K], [torch.eye(2), torch.eye(2)])
        True
    """
    return bool(eigenbases_met(kronecker_factor_list, eigenbasis_list, adaptive_update_tolerance).all())


def eigenbases_met(kronecker_factor_list: Sides, eigenbasis_list: Sides, tolerance: float) -> Tensor:
    """`all_eigenbases_met_criteria` matrix by matrix: a bool tensor of the batch's shape, on the device."""
    met = [
        eigenbasis_error(K, Q) <= tolerance
        for K, Q in zip(kronecker_factor_list, eigenbasis_list, strict=True)
        if K is not None and Q is not None
    ]
    return torch.stack(met).all(dim=0) if met else torch.tensor(True)


def get_eigenbasis_eigh(kronecker_factor_list: Sides, eps: float | None = None) -> list[Tensor | None]:
    """The eigenbases of the factors by full decomposition, columns by descending eigenvalue.

    Args:
        kronecker_factor_list: symmetric ``[..., d, d]``; None stays None.
        eps: added to the diagonals first.

    Example:
        >>> Q, = get_eigenbasis_eigh([torch.diag(torch.tensor([1.0, 2.0]))])
        >>> Q.abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    return [None if K is None else eigh_with_fallback(K, eps=eps)[1] for K in kronecker_factor_list]


def get_eigenbasis_qr(
    kronecker_factor_list: Sides,
    eigenbasis_list: Sides,
    exp_avg_sq: Tensor,
    power_iter_steps: int = 1,
    *,
    solver: str = "qr",
    solved: Sequence[tuple[Tensor, ...] | None] = (None, None),
) -> tuple[list[Tensor | None], Tensor]:
    """The eigenbases by orthogonal iteration from the current ones, and ``exp_avg_sq`` in the columns' new order.

    Args:
        kronecker_factor_list: ``[L [..., m, m], R [..., n, n]]``.
        eigenbasis_list: ``[Q_L, Q_R]``.
        exp_avg_sq: ``[..., m, n]``; not changed.
        power_iter_steps: products with the factor per refresh.
        solver: another way to them, by its name in `steepest.linalg.solvers`; "auto": the fastest on the device.
        solved: of a side, what the solver gave elsewhere: ``(Q, order)``.

    Returns:
        ``(eigenbases, exp_avg_sq)``: column i of a basis and index i of ``exp_avg_sq`` belong together, by descending
        Rayleigh quotient of the columns before they moved.

    Example:
        >>> K = torch.diag(torch.tensor([1.0, 4.0]))
        >>> (Q, _), v = get_eigenbasis_qr([K, None], [torch.eye(2), None], torch.tensor([[1.0], [9.0]]))
        >>> v
        tensor([[9.],
                [1.]])
    """
    bases: list[Tensor | None] = []
    orders: list[Tensor | None] = []
    for K, Q, done in zip(kronecker_factor_list, eigenbasis_list, solved, strict=True):
        if K is None or Q is None:
            bases.append(None)
            orders.append(None)
            continue
        Q, order = done or next_basis(K, Q, power_iter_steps, solver)
        bases.append(by_columns(Q))
        orders.append(order)
    return bases, reorder(exp_avg_sq, orders)


def reorder(x: Tensor, orders: Sequence[Tensor | None]) -> Tensor:
    """Rows and columns of ``x [..., m, n]`` in the orders ``[..., m]`` and ``[..., n]``; None leaves them."""
    rows, columns = orders
    return reordered(reordered(x, rows, -2), columns, -1)


def _sides(sides: Sides, x: Tensor, name: str) -> Sides:
    """``sides`` if they fit ``x [..., m, n]``; otherwise an error in words."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected matrices [..., m, n] as a tensor, not {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"expected matrices [..., m, n], not a tensor of shape {list(x.shape)}")
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise ValueError(f"{name}: must be a list of two, [left, right] (None for a side that stays as it is)")
    for side, K, d in zip(("left", "right"), sides, x.shape[-2:], strict=True):
        if K is None:
            continue
        if not isinstance(K, Tensor):
            raise TypeError(f"{name}: the {side} entry must be a tensor or None, not {type(K).__name__}")
        if K.shape[-2:] != (d, d):
            raise ValueError(
                f"{name}: the {side} entry has shape {list(K.shape)}, but matrices of shape {list(x.shape)} need "
                f"[..., {d}, {d}]"
            )
    return sides
