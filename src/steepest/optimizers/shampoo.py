"""Shampoo and KL-Shampoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.spelling import Params, given


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
            long for one. -1/2 whitens each side for itself; with grafting it was well ahead on a small language model
            (d = 64, 200 steps, lr 1e-2, one seed): loss 1.80 against 1.90.
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
        block_size: cut matrices into blocks of at most so many rows and columns, each with covariances of its own:
            cheaper roots, less memory, and less seen; 0 cuts none. Distributed Shampoo's name for it is the same.
        precondition_1d: one covariance n × n for vectors. Otherwise they move by their momentum, grafted.
        stagger: spread the refreshes of a group's matrices over the steps of a period.
        merge_dims: see `Muon`.
        compile: see `Muon`.
        cuda_graph: see `Muon`.
        nonfinite: see `Muon`.
        stochastic_rounding: see `Muon`.

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
        block_size: int = 0,
        precondition_1d: bool = False,
        stagger: bool = False,
        merge_dims: bool = True,
        compile: bool = False,
        cuda_graph: bool = False,
        nonfinite: str = "skip",
        stochastic_rounding: bool = False,
    ) -> None:
        options = given(locals())
        if not use_kl_shampoo:
            del options["kl_floor"]
        super().__init__(params, "shampoo", **options)


KL_SHAMPOO_OPTIONS: dict[str, Any] = {"use_kl_shampoo": True, "exponent": -0.5}


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
        super().__init__(params, "shampoo", **given(locals()), **KL_SHAMPOO_OPTIONS)
