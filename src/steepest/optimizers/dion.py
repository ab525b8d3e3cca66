"""Dion2 and Dion."""

from __future__ import annotations

from typing import Unpack, final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.shared import Params, SharedOptions, sets_options
from steepest.rule.words import DecayMethod, Orthonormalizer, Polar, PolarDtype, Scale


@final
class Dion2(Optimizer):
    """Dion2 is Muon on the rows with the largest accumulated gradients, a fraction of them in each step.

    Ahn, Amsel and Langford, "Dion2: A Simple Method to Shrink Matrix in Muon", arXiv:2512.16928. Gradients add up; in
    each step the rows (columns, if the matrix is tall) with the largest L1 norm are orthogonalized, applied and decay.
    That is a fraction of Muon's work, and of what must be communicated. It keeps 4mn bytes.

    Args:
        params, lr, ns, ns_dtype, eps, weight_decay_method, merge_dims: As for `Muon`.
        fraction: The fraction of the shorter side's rows that move in each step, rounded up.
        ef_decay: The share of its accumulated gradient that a row keeps after it has moved. It takes the place of a
            momentum.
        weight_decay: The strength of the weight decay; it acts on all rows.
        scale: As for `Muon`, computed from the shape of the whole matrix, so that rows move as far as under Muon.
        options: `SharedOptions`.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(4, 4))
        >>> opt = Dion2([W], lr=0.1, fraction=0.25, scale="none", ns="exact")
        >>> W.grad = torch.diag(torch.tensor([1.0, 2.0, 4.0, 3.0]))
        >>> opt.step()
        >>> W.diagonal().detach()
        tensor([ 0.0000,  0.0000, -0.1000,  0.0000])
    """

    @sets_options("dion2")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        fraction: float = 0.25,
        ef_decay: float = 0.95,
        weight_decay: float = 0.01,
        *,
        scale: Scale = "match_rms_adamw",
        ns: Polar = "keller",
        ns_dtype: PolarDtype = "auto",
        eps: float = 1e-7,
        weight_decay_method: DecayMethod = "decoupled",
        merge_dims: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None: ...


@final
class Dion(Optimizer):
    """Dion orthonormalizes the leading subspace of the momentum; the rest stays in the momentum.

    Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv:2504.05295, Algorithm 1. One power iteration per step
    tracks a subspace of rank r. It keeps 4(mn + min(m, n) r) bytes. `Dion2` is its authors' later and simpler method.

    Args:
        params, lr, weight_decay, weight_decay_method, merge_dims: As for `Muon`.
        momentum: The share of the applied part that stays in the momentum; the rest of the momentum stays whole.
        rank_fraction: The rank r as a fraction of the shorter side, rounded up.
        scale: As for `Muon`; the paper's is "mup". An update of rank r has sqrt(r / min(m, n)) of the root mean square
            that the name promises.
        orthonormalize: "rcqr": randomized Cholesky-QR, by products and triangular solves, which suit GPUs. "qr":
            Householder's. Up to rounding both give the same updates.
        options: `SharedOptions`.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(4, 2))
        >>> opt = Dion([W], lr=0.1, rank_fraction=0.5, scale="none")
        >>> W.grad = torch.ones(4, 2)
        >>> opt.step()
        >>> torch.linalg.svdvals(W.data)
        tensor([0.1000, 0.0000])
    """

    @sets_options("dion")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        rank_fraction: float = 0.25,
        weight_decay: float = 0.01,
        *,
        scale: Scale = "match_rms_adamw",
        orthonormalize: Orthonormalizer = "rcqr",
        weight_decay_method: DecayMethod = "decoupled",
        merge_dims: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None: ...
