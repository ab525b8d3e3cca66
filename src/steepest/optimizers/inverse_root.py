"""The inverse-root formula that circulates under SOAP's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Unpack, final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.shared import Params, SharedOptions, sets_options
from steepest.rule.words import DecayMethod, Precision


@final
class InverseRootSOAP(Optimizer):
    """InverseRootSOAP multiplies Adam's direction by inverse roots of the gradient's two covariances.

    It computes ``W -= lr · L^(-1/root) Adam(G) R^(-1/root)``, a formula that circulates under SOAP's name and has no
    paper. It differs from `SOAP`: Adam already divides by the gradient's size, and the roots divide by it again, so
    gradients 100 times as large give updates 100 times as small (with ``root=4`` and no damping). ``graft="adam"``
    restores the norm of Adam's direction. Use it to reproduce results; to train, use `SOAP`. For a weight of m × n it
    keeps 8mn + 8(m² + n²) bytes. Defaults are those that circulate with the formula.

    Args:
        params, betas, eps, weight_decay, weight_decay_method, nesterov, correct_bias, correct_shampoo_beta_bias,
            max_update_rms, fp32_matmul_prec, merge_dims: As for `SOAP`.
        lr: The learning rate. Without grafting it has the unit of the gradient.
        precondition_frequency: The number of steps from one computation of the roots to the next, or a function from
            the step to that number.
        max_precond_dim: Sides longer than this have no root. The default 1024 leaves out most matrices of large models.
        preconditioner_decay: The decay rate of the covariances, also called ``shampoo_beta`` in parameter groups.
        precondition_1d: Whether vectors have a root too, of one n × n covariance.
        root: The root that is taken of each covariance.
        damping: The constant that is added to the covariances' eigenvalues.
        graft: "adam" gives each update the norm of Adam's direction; "none" doesn't.
        options: `SharedOptions`.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = InverseRootSOAP([W], lr=1.0, damping=0.0)
        >>> W.grad = torch.tensor([[16.0, 0.0], [0.0, 1.0]])
        >>> opt.step()    # Adam's direction is 1 for both entries; the roots divide by 16 and by 1
        >>> W.data
        tensor([[-0.0625,  0.0000],
                [ 0.0000, -1.0000]])
    """

    @sets_options("inverse_root")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        precondition_frequency: int | Callable[[int], int] = 10,
        max_precond_dim: int = 1024,
        preconditioner_decay: float = 0.95,
        merge_dims: bool = True,
        precondition_1d: bool = False,
        *,
        root: int = 4,
        damping: float = 1e-6,
        graft: Literal["none", "adam"] = "none",
        weight_decay_method: DecayMethod = "decoupled",
        nesterov: bool = False,
        correct_bias: bool = True,
        correct_shampoo_beta_bias: bool | None = None,
        max_update_rms: float = 0.0,
        fp32_matmul_prec: Precision = "highest",
        **options: Unpack[SharedOptions],
    ) -> None: ...
