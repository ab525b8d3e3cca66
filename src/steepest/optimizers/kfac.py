"""K-FAC and EKFAC, which hold the model: what feeds them is captured in its layers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Unpack, final

from torch import Tensor

from steepest.curvature.capture import LossTerms
from steepest.engine.capturing import CapturingOptimizer
from steepest.optimizers import group_options
from steepest.optimizers.shared import GroupOptions, Init, passes_on
from steepest.recipes import unfold_elementwise
from steepest.routing.classify import Overrides
from steepest.routing.deciding import Model, decide
from steepest.routing.survey import joined
from steepest.rule.words import (
    ClipWith,
    CurvatureForm,
    DampingForm,
    DecayMethod,
    Fisher,
    Precision,
    Sharing,
    Solver,
    SpectrumDamping,
)
from steepest.rules.aliases import OF_KFAC

CAPTURE = ("fisher", "sharing", "loss_terms", "grad_scaler")
"""The arguments that go to the capture of statistics."""
ROUTING = ("elementwise", "overrides", "decay_1d")
"""Those that decide which parameters go where."""


class KFACOptions(GroupOptions, total=False):
    """Further options of `KFAC` and `EKFAC`.

    Args:
        nonfinite, stochastic_rounding, rounding_seed, stagger, compile, cuda_graph, block_size: As in
            `steepest.optimizers.shared.SharedOptions`.
        max_precond_dim: Layers with a longer side go to ``elementwise``; 8192 by default.
        fp32_matmul_prec: The precision of float32 products: "highest" (default), "high" (TF32) or "medium".
        solver: How eigenbases follow their factors, as for `SOAP`.
        decay_1d: Whether weight decay acts on biases and other vectors too. False by default.
        factor_update_steps, T1: Other names of ``statistics_frequency``.
        inv_update_steps, T2: Other names of ``precondition_frequency``.
        factor_decay: Another name of ``factor_beta``.
    """

    stagger: bool
    compile: bool
    cuda_graph: bool
    block_size: int
    max_precond_dim: int
    fp32_matmul_prec: Precision
    solver: Solver
    decay_1d: bool
    factor_update_steps: int
    T1: int
    inv_update_steps: int
    T2: int
    factor_decay: float


def routes_model(rule: str) -> Callable[[Init], Init]:
    """Return a decorator that makes ``__init__(self, model, ...)`` lay out groups of a model, and pass options on."""
    decorator: Callable[[Init], Init] = passes_on("model", OF_KFAC.values(), functools.partial(_lay_out, rule))
    return decorator


def _lay_out(rule: str, optimizer: CapturingOptimizer, model: Model, arguments: dict[str, Any]) -> None:
    """Route a model's parameters, and initialize the optimizer with their groups."""
    model = joined(model)
    capture = {name: arguments.pop(name) for name in CAPTURE if name in arguments}
    elementwise, overrides, decay_1d = (arguments.pop(name, None) for name in ROUTING)
    settings = group_options(rule, arguments)
    del settings["rule"]
    entrywise = unfold_elementwise("", elementwise or {})
    entrywise = group_options(entrywise.pop("rule", "adamw"), {"lr": 1e-3} | entrywise)
    routing = decide(model, rule, entrywise.pop("rule"), overrides, settings.get("max_precond_dim"))
    if not routing.rows:
        raise ValueError("the model has no trainable parameters: thaw those to be trained (requires_grad_(True)) first")
    for text in routing.warnings:
        warnings.warn(text, stacklevel=4)
    groups = routing.groups(settings, entrywise, decay_1d=bool(decay_1d))
    CapturingOptimizer.__init__(optimizer, model, groups, rule, capture, **settings)


@final
class KFAC(CapturingOptimizer):
    """K-FAC preconditions the gradient of each layer by two Kronecker factors of its Fisher matrix.

    Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", arXiv:1503.05671;
    convolutions as in Grosse and Martens, arXiv:1602.01407. One factor is of the layer's inputs, one of the gradients
    at its outputs; both are captured by hooks on the model's linear layers and convolutions. A layer's weight and bias
    are one matrix. All other parameters are in the same object, under ``elementwise``; ``print(steepest.route(model,
    "kfac"))`` shows which, and why. For a layer of m outputs and n inputs it keeps 4mn + 8(m² + n²) bytes.

    Args:
        model: A module, or a list or dict of modules. Frozen parameters are left out; so is a bias that is frozen while
            its weight is trained. One that freezes later stays in its layer's matrix, and is not moved.
        lr: The learning rate. 1 with ``kl_clip`` is a good start, with a decay to 0 over training.
        momentum: The decay rate of the average of gradients that is preconditioned.
        weight_decay: The strength of the weight decay; biases don't decay.
        damping: Each factor gets ``sqrt(damping)`` of its mean eigenvalue added.
        damping_form: "relative", as described; "absolute": ``damping`` is added to the Fisher matrix itself, split
            between the factors by their traces (section 6.3 of the paper).
        kl_clip: All directions D are scaled by one factor, so that ``Σ ⟨D, M⟩`` is at most this, at a learning rate of
            1. 0: they are not.
        clip_with: What M in it is: "momentum", the average of gradients that D is made of, so that every term of the
            sum is positive; "gradient", that of the step, as others have it. With the latter, terms may cancel, and an
            unbounded step follow: two of two runs on scikit-learn's digits diverged, which the first one brings to
            an end, and on a deep autoencoder the first one ends lower (benchmarks/autoencoder.py).
        factor_beta: The decay rate of the factors.
        statistics_frequency: The number of steps from one capture of statistics to the next. In between, hooks return
            at once.
        precondition_frequency: The number of steps from one inversion of the factors to the next, or a function from
            the step to that number.
        settle: The number of first steps in which both frequencies are 1.
        form: "inverse": the inverses of the damped factors. "eigen": their eigenbases, in which the damping of the
            product is exact, ``λ_B λ_A + damping``.
        sharing: What is done with positions that share a weight (tokens, pixels): "expand" takes each for a sample,
            "reduce" sums gradients and averages inputs over them (arXiv:2311.00636).
        fisher: "empirical": of the gradients of the training loss, by the backward pass that is made anyway.
            "sampled": of gradients for targets drawn from the model, which trains better; the training loop calls
            `sample`.
        loss_terms: For ``fisher="empirical"``, how many terms the training loss is the mean of: "rows", all dimensions
            of the model's outputs but the last; "batch", the first; a number, or a function that returns one. "sum":
            the loss is no mean.
        grad_scaler: The `torch.amp.GradScaler` that scales the loss, if there is one.
        elementwise: Options of all other parameters, such as ``{"lr": 3e-4}``; ``rule`` may name another rule than
            AdamW. The learning rate is 1e-3 by default.
        overrides: As for `steepest.for_model`: from a pattern of names, or a type of module, to a rule or options.
        options: `KFACOptions`.

    Raises:
        ValueError: If an option is unknown, out of range or contradicts another.
        TypeError: If ``model`` is no module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> opt = KFAC(model, fisher="sampled")
        >>> logits = model(x)
        >>> opt.sample(logits, "categorical")    # does nothing unless statistics are due
        >>> nn.functional.cross_entropy(logits, y).backward()
        >>> opt.step()
        >>> sorted(opt.state[model[0].weight])
        ['A', 'B', 'P_A', 'P_B', 'clock', 'exp_avg', 'statistics', 'step']
    """

    @routes_model("kfac")
    def __init__(
        self,
        model: Model,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        damping: float = 1e-2,
        damping_form: DampingForm = "relative",
        kl_clip: float = 1e-2,
        clip_with: ClipWith = "momentum",
        factor_beta: float = 0.95,
        statistics_frequency: int = 5,
        precondition_frequency: int | Callable[[int], int] = 20,
        settle: int = 50,
        form: CurvatureForm = "inverse",
        sharing: Sharing = "expand",
        fisher: Fisher = "empirical",
        loss_terms: LossTerms = "rows",
        grad_scaler: Any = None,
        weight_decay_method: DecayMethod = "decoupled",
        elementwise: Mapping[str, Any] | None = None,
        overrides: Overrides | None = None,
        **options: Unpack[KFACOptions],
    ) -> None: ...


@final
class EKFAC(CapturingOptimizer):
    """EKFAC divides by the second moments of gradients in the eigenbases of K-FAC's factors.

    George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", arXiv:1806.03884. It
    is to `KFAC` what `SOAP` is to `Shampoo`. Second moments are captured along with the factors, and start at the
    products of their eigenvalues at each refresh.

    Args:
        model, lr, momentum, weight_decay, kl_clip, clip_with, factor_beta, statistics_frequency,
            precondition_frequency, settle, sharing, fisher, loss_terms, grad_scaler, weight_decay_method, elementwise,
            overrides: As for `KFAC`.
        damping: d, which is added to the second moments S in one of these forms.
        damping_form: "factored", as K-FAC's: ``√d (mean of the row + mean of the column) + d · mean S``. "relative":
            ``d · mean S``; on a deep autoencoder (benchmarks/autoencoder.py) small d made it unsteady where the
            factored form was not. "absolute": d itself, as the authors have it.
        options: `KFACOptions`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> opt = EKFAC(model)
        >>> nn.functional.mse_loss(model(torch.randn(8, 1, 4, 4)), torch.randn(8, 2)).backward()
        >>> opt.step()
        >>> sorted(opt.state[model[0].weight])
        ['A', 'B', 'Q_A', 'Q_B', 'S', 'clock', 'exp_avg', 'statistics', 'step']
    """

    @routes_model("ekfac")
    def __init__(
        self,
        model: Model,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        damping: float = 1e-2,
        damping_form: SpectrumDamping = "factored",
        kl_clip: float = 1e-2,
        clip_with: ClipWith = "momentum",
        factor_beta: float = 0.95,
        statistics_frequency: int = 5,
        precondition_frequency: int | Callable[[int], int] = 20,
        settle: int = 50,
        sharing: Sharing = "expand",
        fisher: Fisher = "empirical",
        loss_terms: LossTerms = "rows",
        grad_scaler: Any = None,
        weight_decay_method: DecayMethod = "decoupled",
        elementwise: Mapping[str, Any] | None = None,
        overrides: Overrides | None = None,
        **options: Unpack[KFACOptions],
    ) -> None: ...


def build(name: str, model: Model, **arguments: Any) -> CapturingOptimizer:
    """Build the optimizer of a rule that captures, for `steepest.for_model`."""
    kind: Callable[..., CapturingOptimizer] = {"kfac": KFAC, "ekfac": EKFAC}[group_options(name, {})["rule"]]
    return kind(model, **arguments)
