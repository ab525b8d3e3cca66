"""Muon and its relatives: NorMuon, AdaMuon, Dion2 and Dion."""

from __future__ import annotations

from typing import Unpack, final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.shared import Params, SharedOptions, sets_options
from steepest.rule.words import Axis, DecayMethod, MomentDtype, Orthonormalizer, Polar, PolarDtype, Scale


@final
class Muon(Optimizer):
    """Muon orthogonalizes the momentum, so that all singular values of a matrix's update are equal.

    K. Jordan et al., https://kellerjordan.github.io/posts/muon (2024). For a weight of m rows and n columns it keeps
    4mn bytes. It is made for the weight matrices of hidden layers. Embeddings, heads, norms and biases train better
    under AdamW: `steepest.for_model` sends them there, in the same optimizer. A vector that Muon is given all the same
    moves by its normalized momentum.

    Args:
        params, weight_decay, merge_dims: As for `SOAP`.
        lr: The learning rate. With the default ``scale`` an entry's step has a root mean square of ``0.2 · lr``, about
            that of AdamW with noisy gradients. Small language models train best at several times AdamW's rate, so
            start with four times as much (docs/coming-from-adamw.md). With "original" it is the spectral norm of an
            update, and 0.02 is usual.
        momentum: The decay rate of the momentum.
        nesterov: Whether the momentum looks one step ahead; its author found that always better.
        scale: The factor on the polar factor of an m × n matrix. "match_rms_adamw" ``0.2 sqrt(max(m, n))``: entries
            have a root mean square of 0.2, about AdamW's, whose rate its authors keep (arXiv:2502.16982).
            "original" ``sqrt(max(1, m/n))``; "mup" ``sqrt(m/n)``; "none" 1. Other libraries' names mean the same here:
            "shape_scaling" (original), "rms_norm" (match_rms_adamw), "spectral_norm" and "unit_rms_norm" (mup).
        ns: The coefficients of the Newton-Schulz iteration that orthogonalizes: "keller" (the author's), "quintic_you",
            "polar_express_5", "polar_express_dion", "cans", "cubic5" or "deepseekv4" (`steepest.linalg.polar`); or
            "exact", a singular value decomposition, for tests.
        ns_dtype: The dtype of that iteration: "float32", "bfloat16", "float16" or "auto". "auto" is settled when the
            optimizer is made, and saved as such: float16 on GPUs with tensor cores; bfloat16 on CPUs that multiply it
            at least 1.5 times as fast as float32, which is measured once per process; otherwise float32. float16's
            errors are an eighth of bfloat16's, and matrices of which one side is at least 3 times the other are
            iterated on their Gram matrices, with fewer FLOPs. Name the dtype if two runs from scratch must agree bit by
            bit on different machines. On a CPU, matrices that gain nothing by bfloat16 (with a side shorter than 128,
            or one more than 4 times the other) stay in float32. float64 stays float64 everywhere.
        eps: The constant added to the norm by which the momentum is divided first; momenta with smaller norms give
            smaller updates.
        weight_decay_method: As for `SOAP`. "l2" adds ``wd·W`` to the gradient before the momentum averages it.
        moment_dtype: "int8" stores the momentum in 1.06 bytes an entry instead of 4, in blocks of 64 with a scale each
            (docs/memory.md). It can't change while there is state.
        options: `SharedOptions`.

    Raises:
        ValueError: If an option is unknown or out of range; the message names the option, its value and what is
            allowed.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = Muon([W], lr=0.1, scale="none", ns="exact")
        >>> W.grad = torch.tensor([[3.0, 5.0], [-1.0, 2.0]])
        >>> opt.step()
        >>> torch.linalg.svdvals(W.data)
        tensor([0.1000, 0.1000])
    """

    @sets_options("muon")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        nesterov: bool = True,
        scale: Scale = "match_rms_adamw",
        ns: Polar = "keller",
        ns_dtype: PolarDtype = "auto",
        eps: float = 1e-7,
        weight_decay_method: DecayMethod = "decoupled",
        moment_dtype: MomentDtype = "float32",
        merge_dims: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None: ...


@final
class NorMuon(Optimizer):
    """NorMuon is Muon with a second moment per row, which makes a matrix's rows equally long on average.

    Li et al., "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491, Algorithm 1. For a weight of m × n
    it keeps 4mn + 4m bytes.

    Args:
        params, lr, momentum, weight_decay, nesterov, scale, ns, ns_dtype, eps, weight_decay_method, moment_dtype,
            merge_dims: As for `Muon`. With the default ``scale`` an update has the paper's norm.
        beta2: The decay rate of the rows' second moments.
        axis: "rows" (a row belongs to one output neuron; the paper's) or "columns".
        options: `SharedOptions`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3, bias=False)
        >>> opt = NorMuon(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
        >>> opt.state[model.weight]["exp_avg_sq"].shape
        torch.Size([3, 1])
    """

    @sets_options("normuon")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.01,
        *,
        axis: Axis = "rows",
        nesterov: bool = True,
        scale: Scale = "match_rms_adamw",
        ns: Polar = "keller",
        ns_dtype: PolarDtype = "auto",
        eps: float = 1e-7,
        weight_decay_method: DecayMethod = "decoupled",
        moment_dtype: MomentDtype = "float32",
        merge_dims: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None: ...


@final
class AdaMuon(Optimizer):
    """AdaMuon orthogonalizes the signs of the momentum, and divides by a second moment per entry afterwards.

    Si et al., "AdaMuon: Adaptive Muon Optimizer", arXiv:2507.11005, Algorithm 1. For a weight of m × n it keeps 8mn
    bytes.

    Args:
        params, lr, weight_decay, nesterov, scale, ns, ns_dtype, eps, weight_decay_method, merge_dims: As for `Muon`.
            The default ``scale`` is the paper's. ``eps`` hardly matters, since matrices of signs have large norms.
        moment_dtype: "int8" stores the momentum and the second moments in 2.1 bytes an entry instead of 8.
        momentum: The decay rate of the momentum and of the second moments.
        sign: Whether the signs of the momentum are orthogonalized, as in the paper, or the momentum itself. On a small
            language model (d = 64, 200 steps, one seed) the signs cost much: the loss is 2.22 with them, 1.95 without,
            and 1.90 under Muon.
        options: `SharedOptions`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3, bias=False)
        >>> opt = AdaMuon(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
    """

    @sets_options("adamuon")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        sign: bool = True,
        nesterov: bool = True,
        scale: Scale = "match_rms_adamw",
        ns: Polar = "keller",
        ns_dtype: PolarDtype = "auto",
        eps: float = 1e-7,
        weight_decay_method: DecayMethod = "decoupled",
        moment_dtype: MomentDtype = "float32",
        merge_dims: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None: ...


@final
class Dion2(Optimizer):
    """Dion2 is Muon on the rows with the largest accumulated gradients, a fraction of them in each step.

    Ahn, Amsel and Langford, "Dion2: A Simple Method to Shrink Matrix in Muon", arXiv:2512.16928. Gradients add up; in
    each step the rows (columns, if the matrix is tall) with the largest L1 norm are orthogonalized, applied and decay.
    That is a fraction of Muon's work, and of what must be communicated. It keeps 4mn bytes.

    Args:
        params, lr, ns, ns_dtype, eps, weight_decay_method, moment_dtype, merge_dims: As for `Muon`.
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
        moment_dtype: MomentDtype = "float32",
        merge_dims: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None: ...


@final
class Dion(Optimizer):
    """Dion orthonormalizes the leading subspace of the momentum; the rest stays in the momentum.

    Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv:2504.05295, Algorithm 1. One power iteration per step
    tracks a subspace of rank r. It keeps 4(mn + min(m, n) r) bytes. `Dion2` is its authors' later and simpler method.

    Args:
        params, lr, weight_decay, weight_decay_method, moment_dtype, merge_dims: As for `Muon`; with "int8" the basis of
            the subspace stays in float32.
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
        moment_dtype: MomentDtype = "float32",
        merge_dims: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None: ...
