"""MOSO."""

from __future__ import annotations

from typing import Unpack, final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.shared import Params, SharedOptions, sets_options
from steepest.rule.words import DecayMethod, MosoInner, Precision


@final
class MOSO(Optimizer):
    """MOSO is one-sided SOAP on momentum: Adam in the eigenbasis of the momentum's covariance, on the smaller side.

    Khona, Emerging-Optimizers, 2025. For a weight of m <= n it keeps 12mn + 8m² bytes ("adam") or 8mn + 8m²
    ("rmsprop"). It is cheaper than SOAP, since only the smaller side has eigenvectors.

    Args:
        params, eps, weight_decay, weight_decay_method, max_update_rms, fp32_matmul_prec, qr_fp32_matmul_prec,
            merge_dims: As for `SOAP`.
        lr: The learning rate, in Adam's unit.
        momentum: The decay rate of the momentum.
        betas: The decay rates of the moments in the eigenbasis.
        shampoo_beta: The decay rate of the momentum's covariance. 1 is refused, since the bias correction would divide
            zero by zero.
        inner: "adam": bias-corrected Adam on the projected momentum. "rmsprop": the projected momentum divided by its
            root mean square, since Adam damps the momentum a second time.
        noise_floor: For "adam", the fraction of the root mean square far below which entries vanish quadratically. A
            gradient of low rank (few samples) is zero up to rounding in most directions of its own eigenbasis, and
            Adam would take steps of full size there.
        power_iter_steps: The number of orthogonal iterations per step.
        max_precond_dim: Matrices whose smaller side is longer than this are not rotated.
        options: `SharedOptions`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = MOSO(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
        >>> sorted(opt.state[model.weight])
        ['L', 'Q_L', 'clock', 'exp_avg', 'exp_avg_sq', 'momentum_buffer', 'step']
    """

    @sets_options("moso")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-4,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        inner: MosoInner = "adam",
        noise_floor: float = 3e-4,
        weight_decay_method: DecayMethod = "decoupled",
        power_iter_steps: int = 1,
        max_update_rms: float = 0.0,
        fp32_matmul_prec: Precision = "highest",
        qr_fp32_matmul_prec: Precision = "high",
        max_precond_dim: int = 8192,
        merge_dims: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None: ...
