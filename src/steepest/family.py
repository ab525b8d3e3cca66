"""The rest of the family by name: thin, final classes over the engine, with every argument in their signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

from torch import Tensor

from steepest.optimizer import Optimizer

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

KL_SHAMPOO_OPTIONS: dict[str, Any] = {"use_kl_shampoo": True, "exponent": -0.5}


@final
class Muon(Optimizer):
    """Momentum, orthogonalized: every singular value of a step is the same.

    K. Jordan et al., https://kellerjordan.github.io/posts/muon (2024). For a weight of m rows and n columns it keeps
    4mn bytes, less than any other here. It is made for the weight matrices of hidden layers. Embeddings, heads, norms
    and biases train better under AdamW: `steepest.for_model` sends them there, in the same optimizer. A vector that
    comes here all the same moves by its normalized momentum.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: learning rate; the size of an entry's step (root mean square) is ``0.2 · lr`` with the default ``scale``,
            so those of AdamW are right. With "original" it is the spectral norm of a step, and 0.02 is usual.
        momentum: decay of the momentum.
        weight_decay: strength of the decay.
        nesterov: look one step ahead; the author found it always better.
        scale: by what the polar factor of an m × n matrix is multiplied. "match_rms_adamw" ``0.2 sqrt(max(m, n))``:
            entries of root mean square 0.2, as AdamW's, so that both share learning rate and decay (arXiv:2502.16982).
            "original" ``sqrt(max(1, m/n))``; "mup" ``sqrt(m/n)``; "none" 1. The names that other libraries use mean
            the same here: "shape_scaling", "rms_norm", "spectral_norm", "unit_rms_norm".
        ns: how it is orthogonalized: a table of Newton-Schulz coefficients, "keller" (its author's), "quintic_you",
            "polar_express_5", "polar_express_dion", "cans", "cubic5" or "deepseekv4", see `steepest.linalg.polar`; or
            "exact", by singular value decomposition, for tests.
        eps: added to the norm by which the momentum is divided before; matrices with less than that move less.
        weight_decay_method: "decoupled" ``W *= 1 - lr·wd``; "independent" ``W *= 1 - wd``; "palm"
            ``W *= 1 - lr²·wd``; "l2" adds ``wd·W`` to the gradient.
        split: row counts of blocks that are matrices of their own, as in a fused query-key-value projection.
        heads: each block's rows are that many matrices.
        merge_dims: True: trailing dimensions of a convolution merge into one. False: leading dimensions are a batch of
            matrices, as in stacked experts ``[E, m, n]``.
        nonfinite: "skip": a matrix whose gradient is not finite is left out of the step, weights, state and clock
            untouched, and counted in ``skipped``. "raise": FloatingPointError before anything has changed.

    Raises:
        ValueError: for an option out of range; it names the option, its value and what is allowed.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = Muon([W], lr=0.1, scale="none", ns="exact")
        >>> W.grad = torch.tensor([[3.0, 5.0], [-1.0, 2.0]])
        >>> opt.step()
        >>> torch.linalg.svdvals(W.data)
        tensor([0.1000, 0.1000])
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        nesterov: bool = True,
        scale: str = "match_rms_adamw",
        ns: str = "keller",
        eps: float = 1e-7,
        weight_decay_method: str = "decoupled",
        split: tuple[int, ...] = (),
        heads: int = 1,
        merge_dims: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(params, "muon", **_given(locals()))


@final
class NorMuon(Optimizer):
    """Muon, with its rows made equally long in the long run.

    Li et al., "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491. A second moment per row is all the
    memory that it adds to Muon.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: see `Muon`.
        momentum: see `Muon`.
        beta2: decay of the rows' second moments.
        weight_decay: strength of the decay.
        axis: "rows" (a row belongs to one output neuron; the paper's) or "columns".
        nesterov: see `Muon`.
        scale: see `Muon`; with the default, a step has the paper's norm.
        ns: see `Muon`.
        eps: see `Muon`.
        weight_decay_method: see `Muon`.
        split: see `Muon`.
        heads: see `Muon`.
        merge_dims: see `Muon`.
        nonfinite: see `Muon`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3, bias=False)
        >>> opt = NorMuon(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
        >>> opt.state[model.weight]["exp_avg_sq"].shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.01,
        *,
        axis: str = "rows",
        nesterov: bool = True,
        scale: str = "match_rms_adamw",
        ns: str = "keller",
        eps: float = 1e-7,
        weight_decay_method: str = "decoupled",
        split: tuple[int, ...] = (),
        heads: int = 1,
        merge_dims: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(params, "normuon", **_given(locals()))


@final
class AdaMuon(Optimizer):
    """Muon on the signs of the momentum, with a second moment per entry after it.

    Si et al., "AdaMuon: Adaptive Muon Optimizer", arXiv:2507.11005. It keeps 8mn bytes for a weight of m × n.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: see `Muon`.
        momentum: decay of the momentum and of the second moments.
        weight_decay: strength of the decay.
        nesterov: see `Muon`.
        scale: see `Muon`; the default is the paper's.
        ns: see `Muon`.
        eps: see `Muon`; here the norm is that of a matrix of signs, so it hardly matters.
        weight_decay_method: see `Muon`.
        split: see `Muon`.
        heads: see `Muon`.
        merge_dims: see `Muon`.
        nonfinite: see `Muon`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3, bias=False)
        >>> opt = AdaMuon(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        nesterov: bool = True,
        scale: str = "match_rms_adamw",
        ns: str = "keller",
        eps: float = 1e-7,
        weight_decay_method: str = "decoupled",
        split: tuple[int, ...] = (),
        heads: int = 1,
        merge_dims: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(params, "adamuon", **_given(locals()))


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
        eps: see `Muon`.
        weight_decay_method: see `Muon`.
        merge_dims: see `Muon`.
        nonfinite: see `Muon`.

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
        eps: float = 1e-7,
        weight_decay_method: str = "decoupled",
        merge_dims: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(params, "dion2", **_given(locals()))


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
        nonfinite: see `Muon`.

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
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(params, "dion", **_given(locals()))


@final
class Shampoo(Optimizer):
    """The momentum between inverse roots of the gradients' two covariances.

    Gupta et al., "Shampoo: Preconditioned Stochastic Tensor Optimization", arXiv:1802.09568; with averages and grafting
    as in Shi et al., arXiv:2309.06497. For a weight of m × n it keeps 4mn + 8(m² + n²) bytes, and 4mn more where
    grafting needs a second moment. Without grafting and eps, the first step is the gradient's polar factor, as Muon's.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: learning rate; with the default grafting AdamW's, whose step's norm each matrix takes.
        betas: decay of the momentum, and of the second moment that grafting uses.
        shampoo_beta: decay of the covariances; their averages are unbiased at every step. 1 means sums, as in the
            first paper: steps shrink as in AdaGrad.
        eps: added to the covariances' eigenvalues.
        weight_decay: strength of the decay.
        exponent: of both covariances; None: ``-1/(2k)`` with k covariances, so -1/4, and -1/2 where one side is too
            long for one. -1/2 whitens each side for itself.
        relative_eps: ``eps`` is a fraction of each covariance's largest eigenvalue, so that the unit of the loss does
            not matter. Otherwise it has the unit of squared gradients.
        graft: give each matrix the norm of the step that "sgd", "adam" or "rmsprop" (Adam without bias correction)
            would take with the same momentum, or "none".
        graft_eps: keeps grafting's division finite.
        use_kl_shampoo: feed the covariances with gradients whitened by the other side; see `KLShampoo`.
        kl_floor: for ``use_kl_shampoo``: eigenvalues count as no less than this fraction of the largest, and the first
            feed is not whitened. 0: ``eps`` as an absolute floor, which starts the covariances 1/eps too large.
        precondition_frequency: steps from one refresh of the eigenvectors to the next, or a function from the step to
            that number. Eigenvalues are fresh at every step.
        refresh: "qr": one decomposition, then orthogonal iteration; "eigh": a decomposition each time.
        power_iter_steps: orthogonal iterations per refresh.
        fp32_matmul_prec: precision of float32 products: "highest", "high" (TF32), "medium" (bfloat16).
        weight_decay_method: see `Muon`.
        max_precond_dim: longer sides get no covariance.
        precondition_1d: one covariance n × n for vectors. Otherwise they move by their momentum, grafted.
        stagger: spread the refreshes of a group's matrices over the steps of a period.
        merge_dims: see `Muon`.
        nonfinite: see `Muon`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = Shampoo([W], lr=0.1, graft="none", eps=0.0)
        >>> W.grad = torch.tensor([[0.0, 5.0], [-1.0, 0.0]])
        >>> opt.step()
        >>> W.data
        tensor([[ 0.0000, -0.1000],
                [ 0.1000,  0.0000]])
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        exponent: float | None = None,
        relative_eps: bool = True,
        graft: str = "adam",
        graft_eps: float = 1e-8,
        use_kl_shampoo: bool = False,
        kl_floor: float = 1e-4,
        precondition_frequency: int | Callable[[int], int] = 1,
        refresh: str = "qr",
        power_iter_steps: int = 1,
        fp32_matmul_prec: str = "highest",
        weight_decay_method: str = "decoupled",
        max_precond_dim: int = 8192,
        precondition_1d: bool = False,
        stagger: bool = False,
        merge_dims: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(params, "shampoo", **_given(locals()))


@final
class KLShampoo(Optimizer):
    """Shampoo whose covariances minimize a Kullback-Leibler divergence: each side sees what the other has whitened.

    Lin et al., arXiv:2509.03378. It is ``Shampoo(use_kl_shampoo=True, exponent=-0.5)``; see `Shampoo` for the
    arguments, and for options beyond these use it.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: see `Shampoo`.
        betas: see `Shampoo`.
        shampoo_beta: see `Shampoo`.
        eps: see `Shampoo`.
        weight_decay: strength of the decay.
        graft: see `Shampoo`.
        kl_floor: see `Shampoo`.
        precondition_frequency: see `Shampoo`.
        weight_decay_method: see `Muon`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = KLShampoo(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        graft: str = "adam",
        kl_floor: float = 1e-4,
        precondition_frequency: int | Callable[[int], int] = 1,
        weight_decay_method: str = "decoupled",
    ) -> None:
        super().__init__(params, "shampoo", **_given(locals()), **KL_SHAMPOO_OPTIONS)


@final
class Lion(Optimizer):
    """The sign of a momentum that looks one step ahead.

    Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675. For parameters of any shape, with
    half of Adam's memory: 4 bytes an entry.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: learning rate: what every entry moves by. The paper advises a third to a tenth of AdamW's.
        betas: the momentum's share in the step, and its decay.
        weight_decay: strength of the decay, decoupled; as steps are smaller than AdamW's, the paper takes 3 to 10
            times as much.
        nonfinite: see `Muon`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(3))
        >>> opt = Lion([W], lr=0.1)
        >>> W.grad = torch.tensor([5.0, -0.01, 0.0])
        >>> opt.step()
        >>> W.data
        tensor([-0.1000,  0.1000,  0.0000])
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        *,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(params, "lion", **_given(locals()))


def _given(scope: dict[str, Any]) -> dict[str, Any]:
    """The options among a constructor's local variables."""
    return {name: value for name, value in scope.items() if name not in ("self", "params", "__class__")}
