"""SOAP and its relatives: REKLS, MOSO, and the inverse-root formula that circulates under SOAP's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Unpack, final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.shared import Params, SharedOptions, sets_options
from steepest.rule.words import BasisDtype, BasisTiming, DecayMethod, MomentDtype, MosoInner, Precision, Solver


class SOAPOptions(SharedOptions, total=False):
    """`SharedOptions`, and the single guards of `SOAP`, for papers and tests. Training needs ``guards`` only.

    Args:
        noise_floor: In the first update, entries of the projected gradient far below this fraction of its root mean
            square count as rounding errors, and vanish quadratically; after t updates the fraction is
            ``noise_floor / t^(3/2)``. 1e-2, also called "auto", by default; 0 turns it off. Without it a relative
            change of the first gradient by 1e-6 changes the first update by more than its own norm
            (docs/first-steps.md).
        momentum_floor: Whether Adam's second moment counts as no less than the squared first, so that no entry of an
            update exceeds 1, even right after the basis has turned. True by default.
        kl_floor: With ``use_kl_shampoo``, eigenvalues count as no less than this fraction of the largest one, and the
            first gradient is divided by its root mean square instead of being whitened. 1e-4 by default. 0 is the
            authors' absolute floor ``eps``, with which the covariances start 1e8 too large.
        match_columns: Whether second moments follow their eigenvectors when eigenvalues cross at a full decomposition.
            True by default; False leaves them in order of the eigenvalues, as public implementations do.
    """

    noise_floor: float | Literal["auto"]
    momentum_floor: bool
    kl_floor: float
    match_columns: bool


@final
class SOAP(Optimizer):
    """SOAP runs Adam in the eigenbasis of Shampoo's two covariances.

    Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321, Algorithm 3. For a weight of m
    rows and n columns it keeps Adam's two moments, an m × m and an n × n covariance, and their eigenvectors:
    8mn + 8(m² + n²) bytes. The learning rate has Adam's unit: the size of an entry's step.

    Parameters of any shape work. A convolution is taken as a matrix of output channels by the rest. Vectors, scalars
    and sides longer than ``max_precond_dim`` are not rotated; where neither side is rotated, SOAP equals AdamW.
    `steepest.for_model` sends embeddings, heads and norms to AdamW.

    Args:
        params: Tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: The learning rate; 3e-3, the paper's, by default. AdamW's is a safe start, and SOAP often trains well with 2
            to 4 times as much.
        betas: The decay rates of Adam's first and second moment.
        shampoo_beta: The decay rate of the covariances.
        eps: The constant that keeps Adam's division finite.
        weight_decay: The strength of the weight decay ``wd``.
        weight_decay_method: "decoupled": ``W *= 1 - lr·wd``. "independent": ``W *= 1 - wd``. "palm":
            ``W *= 1 - lr²·wd``. "cautious": as decoupled, only for entries that the step shrinks
            too (arXiv:2510.12402). "l2": ``wd·W`` is added to the gradient that Adam sees, not to the covariances.
        nesterov: Whether Adam uses Nesterov momentum.
        precondition_frequency: The number of steps from one refresh of the eigenvectors to the next, or a function from
            the step to that number (`steepest.schedules`). Per step, 1 is best, at nearly three times the cost of 5; 10
            saves little more and loses more (docs/soap.md).
        adam_warmup_steps: The number of AdamW steps before the first basis is computed.
        correct_bias: Whether the bias of Adam's moments, and of the covariances by default, is corrected.
        fp32_matmul_prec: The precision of float32 products: "highest", "high" (TF32) or "medium" (bfloat16). With the
            lower ones a spike of the gradient can corrupt KL-Shampoo's covariances.
        use_eigh: Whether each refresh is a full eigendecomposition; the same as ``solver="eigh"``.
        qr_fp32_matmul_prec: The precision of the products of a refresh.
        use_adaptive_criteria: Whether matrices whose basis still diagonalizes the covariances skip their refresh.
            Measuring that waits for the device.
        adaptive_update_tolerance: A basis Q counts as diagonalizing K if ``‖K‖ - ‖diag(QᵀKQ)‖ <= tolerance · ‖K‖``.
        power_iter_steps: The number of iterations in a refresh; "eigh" needs none.
        max_update_rms: The largest root mean square of a matrix's update; larger ones are scaled down. 0: no limit.
        use_kl_shampoo: Whether the covariances are KL-Shampoo's, of gradients whitened by the other side
            (arXiv:2509.03378). This is KL-SOAP.
        correct_shampoo_beta_bias: Whether the bias of the covariances is corrected; None: as ``correct_bias``.
        max_precond_dim: Sides longer than this are not rotated. 8192 includes every hidden matrix of most language
            models; with 1024, a model of width 4096 would be trained by AdamW.
        merge_dims: True: the trailing dimensions of a convolution merge into one. False: the leading dimensions are a
            batch of matrices, as in stacked experts ``[E, m, n]``.
        precondition_1d: Whether vectors are rotated too, by one n × n covariance.
        preconditioner_decay: Another name of ``shampoo_beta``.
        basis_timing: "before": the basis is refreshed with the current gradient before it projects that gradient.
            "after": the basis is refreshed after the step, as in the authors' code, and the first gradient moves
            nothing. They train alike (docs/soap.md).
        guards: Whether the guards of the first steps are on (docs/first-steps.md). False turns them off, for comparison
            with other implementations; `SOAPOptions` has them one by one.
        solver: How a refresh updates the basis. "qr": orthogonal iteration by Householder reflections, from the
            identity on. All others start with a full decomposition. Then "cholesky" iterates by Cholesky-QR;
            "first_order" corrects the basis by matrix products, which turn no two columns by more than 0.1 of each
            other and leave less off the diagonal; "eigh" decomposes again. "auto" is "first_order" on accelerators; on
            a CPU it goes on by "qr".
        refresh_async: Whether a refresh follows its step, on a GPU in a stream of its own beside the next forward and
            backward pass. All but the first then take effect one step later. Don't read ``state`` on the GPU between
            steps, except through `state_dict`.
        basis_dtype: "bfloat16" stores the bases in 4(m² + n²) bytes less, at a loss below the noise of our comparisons
            (docs/memory.md).
        moment_dtype: "int8" stores Adam's two moments in 2.1 bytes an entry instead of 8, in blocks of 64 with scales
            and stochastic rounding, likewise.
        options: `SOAPOptions`.

    Raises:
        ValueError: If an option is unknown, out of range or contradicts another; the message names the option, its
            value and what is allowed.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> opt = SOAP([W], lr=0.1, weight_decay=0.0)
        >>> W.grad = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> opt.step()    # the first step is the gradient's polar factor: every direction moves by lr
        >>> W.data
        tensor([[ 1.0000, -0.1000],
                [ 0.1000,  1.0000]])
    """

    @sets_options("soap")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: DecayMethod = "decoupled",
        nesterov: bool = False,
        precondition_frequency: int | Callable[[int], int] = 5,
        adam_warmup_steps: int = 0,
        correct_bias: bool = True,
        fp32_matmul_prec: Precision = "highest",
        use_eigh: bool = False,
        qr_fp32_matmul_prec: Precision = "high",
        use_adaptive_criteria: bool = False,
        adaptive_update_tolerance: float = 1e-7,
        power_iter_steps: int = 1,
        max_update_rms: float = 0.0,
        use_kl_shampoo: bool = False,
        correct_shampoo_beta_bias: bool | None = None,
        max_precond_dim: int = 8192,
        merge_dims: bool = True,
        precondition_1d: bool = False,
        preconditioner_decay: float | None = None,
        basis_timing: BasisTiming = "before",
        guards: bool = True,
        solver: Solver = "auto",
        refresh_async: bool = False,
        basis_dtype: BasisDtype = "float32",
        moment_dtype: MomentDtype = "float32",
        **options: Unpack[SOAPOptions],
    ) -> None:
        if "form" in options:
            raise ValueError("form: SOAP has one form; L^(-1/root) Adam(G) R^(-1/root) is steepest.InverseRootSOAP")


@final
class REKLS(Optimizer):
    """REKLS is KL-SOAP with a full eigendecomposition in every step ("realtime eigen KL SOAP").

    The current gradient is in the covariances before they are decomposed, hence "realtime". It equals `SOAP` with
    ``use_kl_shampoo=True, solver="eigh", precondition_frequency=1``.

    Args:
        params, lr, betas, shampoo_beta, eps, weight_decay, weight_decay_method: As for `SOAP`.
        options: `SOAPOptions`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = REKLS(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
    """

    @sets_options("kl_soap", solver="eigh", precondition_frequency=1)
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: DecayMethod = "decoupled",
        **options: Unpack[SOAPOptions],
    ) -> None: ...


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
        noise_floor: For "adam", as for `SOAP`. A gradient of low rank (few samples) is zero up to rounding in most
            directions of its own eigenbasis, and Adam would take steps of full size there.
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


@final
class InverseRootSOAP(Optimizer):
    """InverseRootSOAP multiplies Adam's direction by inverse roots of the gradient's two covariances.

    It computes ``W -= lr · L^(-1/root) Adam(G) R^(-1/root)``, a formula that circulates under SOAP's name and has no
    paper. It differs from `SOAP`: Adam already divides by the gradient's size, and the roots divide by it again, so
    gradients 100 times as large give updates 100 times as small (with ``root=4`` and no damping). ``graft="adam"``
    restores the norm of Adam's direction. Use it to reproduce results; to train, use `SOAP`. For a weight of m × n it
    keeps 8mn + 8(m² + n²) bytes. Defaults are those that circulate with the formula.

    Args:
        params, betas, eps, weight_decay, nesterov, correct_bias, correct_shampoo_beta_bias, max_update_rms,
            fp32_matmul_prec, merge_dims: As for `SOAP`.
        lr: The learning rate. Without grafting it has the unit of the gradient.
        weight_decay_method: As for `SOAP`, but with "l2" the covariances take ``wd·W`` in, too. Otherwise the roots
            would lift the decay by ``damping`` to the power of ``-2/root`` where the gradient is zero.
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
