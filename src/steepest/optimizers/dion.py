"""The orthogonalized family on part of a matrix."""

from __future__ import annotations

from typing import final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.spelling import Params, given


@final
class Dion2(Optimizer):
    """Muon on the rows that have waited longest: a fraction of the work, and of what must be communicated.

    Ahn, Amsel and Langford, "Dion2: A Simple Method to Shrink Matrix in Muon", arXiv:2512.16928. Gradients add up; at
    each step the rows (columns, if the matrix is tall) with the largest L1 norm are orthogonalized, applied and decay.
    It keeps 4mn bytes.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: see `Muon`.
        fraction: of the shorter side's rows that move at each step, rounded up.
        ef_decay: what the rows that have moved keep of their accumulated gradient. It takes the place of a momentum.
        weight_decay: strength of the decay; it acts on all rows.
        scale: see `Muon`; it is computed from the whole matrix's shape, so that rows move as under Muon.
        ns: see `Muon`.
        ns_dtype: see `Muon`.
        eps: see `Muon`.
        weight_decay_method: see `Muon`.
        merge_dims: see `Muon`.
        compile: see `Muon`.
        cuda_graph: see `Muon`.
        nonfinite: see `Muon`.
        stochastic_rounding: see `Muon`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(4, 4))
        >>> opt = Dion2([W], lr=0.1, fraction=0.25, scale="none", ns="exact")
        >>> W.grad = torch.diag(torch.tensor([1.0, 2.0, 4.0, 3.0]))
        >>> opt.step()
        >>> W.diagonal().detach()
        tensor([ 0.0000,  0.0000, -0.1000,  0.0000])
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        fraction: float = 0.25,
        ef_decay: float = 0.95,
        weight_decay: float = 0.01,
        *,
        scale: str = "match_rms_adamw",
        ns: str = "keller",
        ns_dtype: str = "auto",
        eps: float = 1e-7,
        weight_decay_method: str = "decoupled",
        merge_dims: bool = True,
        compile: bool = False,
        cuda_graph: bool = False,
        nonfinite: str = "skip",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, "dion2", **given(locals()))


@final
class Dion(Optimizer):
    """The momentum's leading subspace, orthonormalized; what is left out stays in the momentum.

    Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv:2504.05295. One power iteration per step follows the
    subspace of rank r. It keeps 4(mn + min(m, n) r) bytes. `Dion2` is its authors' later and simpler method.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: see `Muon`.
        momentum: what the applied part of the momentum keeps; the rest stays whole.
        rank_fraction: r as a fraction of the shorter side, rounded up.
        weight_decay: strength of the decay.
        scale: see `Muon`; the paper's is "mup". A step of rank r has sqrt(r / min(m, n)) of the root mean square that
            the name promises.
        orthonormalize: "rcqr", randomized Cholesky-QR: products and triangular solves, as GPUs like them; or "qr",
            Householder's. Up to rounding they give the same steps.
        weight_decay_method: see `Muon`.
        merge_dims: see `Muon`.
        compile: see `Muon`.
        cuda_graph: see `Muon`.
        nonfinite: see `Muon`.
        stochastic_rounding: see `Muon`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(4, 2))
        >>> opt = Dion([W], lr=0.1, rank_fraction=0.5, scale="none")
        >>> W.grad = torch.ones(4, 2)
        >>> opt.step()
        >>> torch.linalg.svdvals(W.data)
        tensor([0.1000, 0.0000])
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        rank_fraction: float = 0.25,
        weight_decay: float = 0.01,
        *,
        scale: str = "match_rms_adamw",
        orthonormalize: str = "rcqr",
        weight_decay_method: str = "decoupled",
        merge_dims: bool = True,
        compile: bool = False,
        cuda_graph: bool = False,
        nonfinite: str = "skip",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, "dion", **given(locals()))
