"""The orthogonalized family at full rank."""

from __future__ import annotations

from typing import final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.spelling import Params, given


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
        ns_dtype: what Newton-Schulz iterates in: "float32", "bfloat16" or "auto". "auto" becomes one of the others when
            the optimizer is made, and is saved as such: bfloat16 on GPUs that have it and on CPUs that multiply it at
            least 1.5 times as fast, which is measured once per process; otherwise float32. Name it where two runs
            from scratch must agree bit by bit on different CPUs. On a CPU, matrices that gain nothing by bfloat16 (a
            side shorter than 128, or one more than 4 times the other) stay in float32, and float64 ones in float64.
        eps: added to the norm by which the momentum is divided before; matrices with less than that move less.
        weight_decay_method: "decoupled" ``W *= 1 - lr·wd``; "independent" ``W *= 1 - wd``; "palm"
            ``W *= 1 - lr²·wd``; "cautious" as decoupled, where the step shrinks the weight too; "l2" adds ``wd·W`` to
            the gradient.
        split: row counts of blocks that are matrices of their own, as in a fused query-key-value projection.
        heads: each block's rows are that many matrices.
        merge_dims: True: trailing dimensions of a convolution merge into one. False: leading dimensions are a batch of
            matrices, as in stacked experts ``[E, m, n]``.
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
        ns_dtype: str = "auto",
        eps: float = 1e-7,
        weight_decay_method: str = "decoupled",
        split: tuple[int, ...] = (),
        heads: int = 1,
        merge_dims: bool = True,
        compile: bool = False,
        cuda_graph: bool = False,
        nonfinite: str = "skip",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, "muon", **given(locals()))


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
        ns_dtype: see `Muon`.
        eps: see `Muon`.
        weight_decay_method: see `Muon`.
        split: see `Muon`.
        heads: see `Muon`.
        merge_dims: see `Muon`.
        compile: see `Muon`.
        cuda_graph: see `Muon`.
        nonfinite: see `Muon`.
        stochastic_rounding: see `Muon`.

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
        ns_dtype: str = "auto",
        eps: float = 1e-7,
        weight_decay_method: str = "decoupled",
        split: tuple[int, ...] = (),
        heads: int = 1,
        merge_dims: bool = True,
        compile: bool = False,
        cuda_graph: bool = False,
        nonfinite: str = "skip",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, "normuon", **given(locals()))


@final
class AdaMuon(Optimizer):
    """Muon on the signs of the momentum, with a second moment per entry after it.

    Si et al., "AdaMuon: Adaptive Muon Optimizer", arXiv:2507.11005. It keeps 8mn bytes for a weight of m × n.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: see `Muon`.
        momentum: decay of the momentum and of the second moments.
        weight_decay: strength of the decay.
        sign: orthogonalize the signs of the momentum, as the paper has it. On a small language model (d = 64, 200
            steps, one seed) that cost much: loss 2.22 against 1.95 without, and 1.90 for Muon.
        nesterov: see `Muon`.
        scale: see `Muon`; the default is the paper's.
        ns: see `Muon`.
        ns_dtype: see `Muon`.
        eps: see `Muon`; here the norm is that of a matrix of signs, so it hardly matters.
        weight_decay_method: see `Muon`.
        split: see `Muon`.
        heads: see `Muon`.
        merge_dims: see `Muon`.
        compile: see `Muon`.
        cuda_graph: see `Muon`.
        nonfinite: see `Muon`.
        stochastic_rounding: see `Muon`.

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
        sign: bool = True,
        nesterov: bool = True,
        scale: str = "match_rms_adamw",
        ns: str = "keller",
        ns_dtype: str = "auto",
        eps: float = 1e-7,
        weight_decay_method: str = "decoupled",
        split: tuple[int, ...] = (),
        heads: int = 1,
        merge_dims: bool = True,
        compile: bool = False,
        cuda_graph: bool = False,
        nonfinite: str = "skip",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, "adamuon", **given(locals()))
