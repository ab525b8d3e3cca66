"""One-sided SOAP on momentum."""

from __future__ import annotations

from typing import final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.spelling import Params, given


@final
class MOSO(Optimizer):
    """One-sided SOAP on Muon's momentum: momentum first, then Adam in the momentum's eigenbasis, on the smaller side.

    Khona, Emerging-Optimizers, 2025. For a weight of m <= n it keeps 12mn + 8m² bytes ("adam") or 8mn + 8m²
    ("rmsprop"), and costs little: the eigenvectors are those of the smaller side only.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: learning rate, as for Adam.
        momentum: decay of the momentum.
        betas: decay of the moments in the eigenbasis.
        shampoo_beta: decay of the momentum's covariance.
        eps: keeps the division finite.
        weight_decay: strength of the decay.
        inner: "adam": bias-corrected Adam on the projected momentum. "rmsprop": only divide by its root mean square;
            Adam on top of momentum damps twice.
        noise_floor: for "adam": entries far below this fraction of the root mean square vanish quadratically. A
            gradient of low rank (few samples) is zero up to rounding in most directions of its own eigenbasis, and Adam
            would take full-size steps there.
        weight_decay_method: "decoupled", "independent", "palm", "cautious" or "l2"; see `SOAP`.
        power_iter_steps: orthogonal iterations per step.
        max_update_rms: scale a matrix's update down to this root mean square; 0 never does.
        fp32_matmul_prec: precision of float32 products.
        qr_fp32_matmul_prec: precision of the products in a refresh.
        max_precond_dim: where the smaller side is longer, it gets the identity.
        merge_dims: see `SOAP`.
        compile: see `Muon`.
        cuda_graph: see `Muon`.
        nonfinite: see `SOAP`.
        stochastic_rounding: see `SOAP`.

    Raises:
        ValueError: for an option out of range. shampoo_beta = 1 is: its bias correction would be 0/0.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = MOSO(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
        >>> sorted(opt.state[model.weight])
        ['L', 'Q_L', 'clock', 'exp_avg', 'exp_avg_sq', 'momentum_buffer', 'step']
    """

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
        inner: str = "adam",
        noise_floor: float = 3e-4,
        weight_decay_method: str = "decoupled",
        power_iter_steps: int = 1,
        max_update_rms: float = 0.0,
        fp32_matmul_prec: str = "highest",
        qr_fp32_matmul_prec: str = "high",
        max_precond_dim: int = 8192,
        merge_dims: bool = True,
        compile: bool = False,
        cuda_graph: bool = False,
        nonfinite: str = "skip",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, "moso", **given(locals()))
