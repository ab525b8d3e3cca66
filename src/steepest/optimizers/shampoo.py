"""Shampoo and KL-Shampoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Unpack, final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.shared import Params, SharedOptions, sets_options
from steepest.rule.words import DecayMethod, Graft, Precision


class ShampooOptions(SharedOptions, total=False):
    """`SharedOptions`, and the floor that `Shampoo` has with ``use_kl_shampoo``; `KLShampoo` documents it."""

    kl_floor: float


@final
class Shampoo(Optimizer):
    """Shampoo multiplies the momentum by inverse roots of the gradients' two covariances.

    Gupta et al., "Shampoo: Preconditioned Stochastic Tensor Optimization", arXiv:1802.09568, Algorithm 1; with averages
    and grafting as in Shi et al., arXiv:2309.06497. For a weight of m × n it keeps 4mn + 8(m² + n²) + 4(m + n) bytes,
    and 4mn more if grafting needs a second moment. Without grafting and eps, the first update is the gradient's polar
    factor, as Muon's is.

    Args:
        params, weight_decay, fp32_matmul_prec, merge_dims: As for `SOAP`.
        lr: The learning rate. With the default grafting it has AdamW's unit.
        betas: The decay rates of the momentum, and of the second moment that grafting uses.
        weight_decay_method: As for `SOAP`, but with "l2" the covariances take ``wd·W`` in, too, as the authors' do.
        shampoo_beta: The decay rate of the covariances, whose bias is corrected. 1 means sums instead of averages, as
            in the first paper: updates shrink as AdaGrad's do.
        eps: The constant that is added to the covariances' eigenvalues.
        exponent: The exponent of both covariances; None: ``-1/(2k)`` with k covariances, so -1/4, and -1/2 where one
            side is too long for a covariance. -1/2 whitens each side by itself; with grafting it was well ahead on a
            small language model (d = 64, 200 steps, lr 1e-2, one seed): loss 1.80 against 1.90.
        relative_eps: Whether ``eps`` is a fraction of each covariance's largest eigenvalue, so that the unit of the
            loss does not matter. Otherwise it has the unit of squared gradients.
        graft: Whose norm each matrix's update takes: that of "sgd", "adam" or "rmsprop" (Adam without bias correction)
            with the same momentum, or its own ("none").
        graft_eps: The constant that keeps grafting's division finite.
        use_kl_shampoo: Whether the covariances are those of gradients whitened by the other side; see `KLShampoo`.
        precondition_frequency: As for `SOAP`. Eigenvalues are updated in every step.
        solver: "qr": a full decomposition first, then orthogonal iteration. "eigh": a full decomposition in each
            refresh.
        power_iter_steps: The number of orthogonal iterations per refresh.
        max_precond_dim: Sides longer than this have no covariance.
        precondition_1d: Whether vectors have one n × n covariance. Otherwise they move by their momentum, grafted.
        options: `SharedOptions`, and with ``use_kl_shampoo`` the ``kl_floor`` of `KLShampoo`.

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

    @sets_options("shampoo")
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
        graft: Graft = "adam",
        graft_eps: float = 1e-8,
        use_kl_shampoo: bool = False,
        precondition_frequency: int | Callable[[int], int] = 1,
        solver: Literal["qr", "eigh"] = "qr",
        power_iter_steps: int = 1,
        fp32_matmul_prec: Precision = "highest",
        weight_decay_method: DecayMethod = "decoupled",
        max_precond_dim: int = 8192,
        precondition_1d: bool = False,
        merge_dims: bool = True,
        **options: Unpack[ShampooOptions],
    ) -> None: ...


@final
class KLShampoo(Optimizer):
    """KL-Shampoo is Shampoo whose covariances minimize a Kullback-Leibler divergence.

    Lin et al., arXiv:2509.03378. Each side's covariance is that of gradients whitened by the other side. It equals
    ``Shampoo(use_kl_shampoo=True, exponent=-0.5)``, which also takes the options that are not named here.

    Args:
        params, lr, betas, shampoo_beta, eps, weight_decay, weight_decay_method, graft, precondition_frequency:
            As for `Shampoo`.
        kl_floor: Eigenvalues count as no less than this fraction of the largest one, and the first gradient is not
            whitened. 0 is the authors' absolute floor ``eps``, with which the covariances start 1/eps too large.
        options: `SharedOptions`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = KLShampoo(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
    """

    @sets_options("kl_shampoo", exponent=-0.5)
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        graft: Graft = "adam",
        kl_floor: float = 1e-4,
        precondition_frequency: int | Callable[[int], int] = 1,
        weight_decay_method: DecayMethod = "decoupled",
        **options: Unpack[SharedOptions],
    ) -> None: ...
