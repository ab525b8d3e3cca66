"""SOAP and its variants: thin, final classes over the engine, with every argument in their signatures."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from steepest.engine.group import option_defaults
from steepest.engine.optimizer import Optimizer
from steepest.optimizers.spelling import Params, given
from steepest.rule import check_choice


@final
class SOAP(Optimizer):
    """Adam, run in the eigenbasis of Shampoo's two covariances.

    Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321, Algorithm 3. For a weight of m
    rows and n columns it keeps, beside Adam's two moments, an m × m and an n × n covariance and their eigenvectors:
    8mn + 8(m² + n²) bytes in all. A learning rate means what it means for Adam: the size of an entry's step.

    Any parameter works. Convolutions are taken as matrices of output channels by the rest; vectors, scalars and sides
    longer than ``max_precond_dim`` are not rotated, and where neither side is, SOAP is exactly AdamW. To send
    embeddings, heads and norms to AdamW by their role, see `steepest.for_model`.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: learning rate. Those of AdamW are a start; SOAP often bears 2 to 4 times as much. The paper uses 3e-3.
        betas: decay of Adam's first and second moment.
        shampoo_beta: decay of the covariances.
        eps: keeps Adam's division finite.
        weight_decay: strength of the decay.
        weight_decay_method: "decoupled" ``W *= 1 - lr·wd``; "independent" ``W *= 1 - wd``; "palm"
            ``W *= 1 - lr²·wd``; "cautious" as decoupled, where the step shrinks the weight too (arXiv:2510.12402); "l2"
            adds ``wd·W`` to the gradient that Adam sees, not to the covariances.
        nesterov: Nesterov momentum in Adam.
        precondition_frequency: steps from one refresh of the eigenvectors to the next, or a function from the step to
            that number (see `steepest.schedules`). 1 is best per step, at nearly three times the cost of 5; 10 saves
            little more, and loses more (docs/soap.md).
        adam_warmup_steps: plain AdamW for so many steps; the first basis comes exactly when they end.
        correct_bias: bias correction of Adam's moments (and of the covariances, see below).
        fp32_matmul_prec: precision of float32 products: "highest", "high" (TF32), "medium" (bfloat16). Lower ones let
            a gradient spike corrupt KL-Shampoo's covariances.
        use_eigh: refresh by full eigendecomposition; the same as ``refresh="eigh"``.
        qr_fp32_matmul_prec: precision of the products in a refresh.
        use_adaptive_criteria: skip the refresh of matrices whose basis still diagonalizes its covariance. Finding
            that out waits for the device.
        adaptive_update_tolerance: what still counts: ``‖K‖ - ‖diag(QᵀKQ)‖ <= tolerance · ‖K‖``.
        power_iter_steps: iterations per refresh; "eigh" needs none.
        max_update_rms: scale a matrix's update down to this root mean square; 0 never does.
        use_kl_shampoo: feed the covariances with gradients whitened by the other side (arXiv:2509.03378).
        correct_shampoo_beta_bias: bias correction of the covariances; None: as ``correct_bias``.
        basis_timing: "before": the current gradient is in the basis that projects it. "after": as the paper's authors
            run it: the first gradient only seeds the basis and moves nothing, and each refresh follows the step.
            The race shows no difference (docs/soap.md).
        noise_floor: entries of a projected gradient far below this fraction of its root mean square are rounding, and
            vanish quadratically. "auto" is 1e-2; 0 turns it off. It trains as well as none, and without it a relative
            change of the first gradient by 1e-6 moves the first update by more than itself (docs/first-steps.md).
        momentum_floor: Adam's second moment counts as no less than the squared first, so that no entry of an update
            exceeds 1, also right after a basis has turned.
        kl_floor: for ``use_kl_shampoo``: eigenvalues count as no less than this fraction of the largest, and the first
            feed is divided by the gradient's root mean square. 0: the authors' absolute ``eps``, which starts the
            covariances 1e8 too large.
        stagger: spread the refreshes of a group's matrices over the steps of a period, by cost: the step time is flat.
            A lone matrix behaves as if unstaggered.
        refresh: how a basis follows. "qr" is orthogonal iteration with Householder's reflections, from the identity on;
            all others start with a full decomposition: "auto" goes on as "qr" on a CPU and as "first_order" on
            accelerators, "cholesky" is "qr" by Cholesky-QR, "first_order" a correction by products, which turns no two
            columns by more than 0.1 of each other and leaves less off the diagonal; "eigh" decomposes each time.
        match_columns: with full decompositions, second moments follow their directions where eigenvalues cross. False
            leaves them by rank, as public implementations do.
        form: "eigenbasis" is SOAP. "inverse_root" is ``L^(-1/root) Adam(G) R^(-1/root)``, a formula that circulates
            under this name and preconditions twice: gradients 100 times as large give updates 100 times as small.
        root: for "inverse_root": which root.
        damping: for "inverse_root": added to the covariances' eigenvalues.
        graft: for "inverse_root": None, or "adam" to give each update the norm of Adam's own.
        max_precond_dim: longer sides get the identity. 8192 takes in every hidden matrix of most language models; at
            1024, a 4096-wide model would train by plain AdamW.
        merge_dims: True: trailing dimensions of a convolution merge into one. False: leading dimensions are a batch of
            matrices, as in stacked experts ``[E, m, n]``.
        precondition_1d: rotate vectors too: one covariance n × n.
        preconditioner_decay: another name for ``shampoo_beta``.
        refresh_async: refreshes follow the step that they are due in, and a GPU makes them beside the next forward and
            backward pass, on a stream of its own. All but the first then serve from the next step on, as with
            ``basis_timing="after"``. Until the next step, or `state_dict`, ``state`` may not be read on the GPU.
            Between ranks, those that have less to do may refresh for others (docs/many-gpus.md).
        basis_dtype: "bfloat16" keeps bases in half the bytes between steps: 4 (m² + n²) less. What it costs in quality
            is below the race's noise (docs/memory.md).
        moment_dtype: "int8" keeps Adam's two moments in 8 bits, in blocks of 64 with scales, rounded stochastically:
            2.1 bytes an entry for both, not 8; likewise.
        compile: updates without a refresh run as graphs of torch.compile, made anew when an option changes. That takes
            seconds for each shape of matrices, and saves launches (docs/kernels.md).
        cuda_graph: on a GPU, updates without a refresh are recorded once and replayed, one launch each
            (docs/kernels.md). Elsewhere it changes nothing.
        nonfinite: "skip": a matrix whose gradient is not finite is left out of the step, weights, state and clock
            untouched, and counted in ``skipped``. "raise": FloatingPointError before anything has changed.
        stochastic_rounding: bfloat16 weights are rounded up or down at random, so that small steps count on average;
            otherwise all below 1/512 of a weight are lost. Weights of other dtypes are not touched by it. The numbers
            come from the parameter's name and step and the group option ``rounding_seed`` (0), so they repeat.

    Raises:
        ValueError: for an option out of range; it names the option, its value and what is allowed.

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

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(
            params, "soap", lr=lr, betas=betas, shampoo_beta=shampoo_beta, eps=eps, weight_decay=weight_decay, **options
        )


REKLS_OPTIONS: dict[str, Any] = {"solver": "eigh", "use_kl_shampoo": True, "precondition_frequency": 1}


@final
class REKLS(Optimizer):
    """SOAP with KL-Shampoo's covariances and a full eigendecomposition every step ("realtime eigen KL SOAP").

    "Realtime", because the current gradient is in the covariances before they are decomposed. It is `SOAP` with
    ``use_eigh=True, use_kl_shampoo=True, precondition_frequency=1``; see there for the arguments and further options.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: learning rate, as for Adam.
        betas: decay of Adam's two moments.
        shampoo_beta: decay of the covariances.
        eps: keeps Adam's division finite.
        weight_decay: strength of the decay.
        weight_decay_method: "decoupled", "independent", "palm", "cautious" or "l2"; see `SOAP`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = REKLS(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: str = "decoupled",
    ) -> None:
        super().__init__(params, "soap", **given(locals()), **REKLS_OPTIONS)


def soap_options(options: dict[str, Any]) -> dict[str, Any]:
    """SOAP's arguments as a parameter group spells them: ``form`` chooses the rule, aliases take their targets' names.

    >>> soap_options({"lr": 1e-3, "use_eigh": True, "preconditioner_decay": 0.9})
    {'rule': 'soap', 'lr': 0.001, 'shampoo_beta': 0.9, 'refresh': 'eigh'}
    """
    options = dict(options)
    form = options.pop("form", "eigenbasis")
    check_choice("form", form, ("eigenbasis", "inverse_root"))
    decay = options.pop("preconditioner_decay", None)
    if decay is not None:
        options["shampoo_beta"] = decay
    if options.pop("use_eigh", False):
        options["refresh"] = "eigh"
    if form == "inverse_root":
        options["graft"] = options.get("graft") or "none"
        known = option_defaults("inverse_root")  # the eigenbasis has options that mean nothing here
        return {"rule": "inverse_root"} | {name: value for name, value in options.items() if name in known}
    return {"rule": "soap"} | {k: v for k, v in options.items() if k not in ("root", "damping", "graft")}
