"""Names for Megatron-LM and NeMo: importing this module registers optimizers in ``emerging_optimizers.registry``.

    import steepest.integrations.megatron  # before megatron.core, which reads the registry as it is imported

    config = OptimizerConfig(optimizer="steepest_soap", lr=3e-3, weight_decay=0.1)

Megatron gives such an optimizer the matrices of a model without its embeddings and its head, and the rest to its own
Adam. So each parameter here is a matrix, and nothing is routed. Megatron passes the options that its configuration has
attributes for, with the name in front ("steepest_soap_shampoo_beta") or without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from inspect import Parameter, Signature
from typing import Any

from steepest.engine.group import option_defaults
from steepest.engine.optimizer import Optimizer
from steepest.integrations.arguments import literals, takes
from steepest.optimizers import NAMES, group_options
from steepest.optimizers.shared import Params
from steepest.routing.captured import captures
from steepest.routing.classify import is_matrix_rule

try:
    from emerging_optimizers import registry
except ImportError as error:
    raise ImportError(
        "Megatron takes further optimizers from emerging_optimizers.registry: install the package emerging-optimizers"
    ) from error


def registrable(ours: str) -> Callable[..., Optimizer]:
    """Return the class that Megatron makes an optimizer of this package with.

    Its signature names each option, since Megatron looks there for what it may pass.
    """
    rule = NAMES[ours].rule

    def construct(self: Optimizer, params: Params, **options: Any) -> None:
        given = {key: value for key, value in options.items() if value is not None}  # Megatron's None is "not set"
        if not takes(rule, "betas"):
            given.pop("betas", None)  # Adam's, which Megatron passes to everybody
        given_params: list[Any] = list(params)
        refuse_parts(given_params)
        Optimizer.__init__(self, given_params, **group_options(ours, literals(given)))

    def init_group(self: Optimizer, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Do nothing: state is there from construction on, also of parameters without gradients."""

    first = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "params")]
    named = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=value)
        for name, value in option_defaults(rule).items()
        if name != "rule"
    ]
    construct.__signature__ = Signature([*first, *named])  # type: ignore[attr-defined]
    body = {"__module__": __name__, "__doc__": f"{ours}: {NAMES[ours].paper}.", "__init__": construct}
    return type(name_of(ours), (Optimizer,), {**body, "_init_group": init_group})


def refuse_parts(params: Iterable[Any]) -> None:
    """Raise a ValueError for parts of matrices: Megatron's tensor parallelism holds them as plain tensors."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized() or state.get_tensor_model_parallel_world_size() == 1:
        return
    tensors = [p for group in params for p in (group["params"] if isinstance(group, dict) else [group])]
    parts = [tuple(p.shape) for p in tensors if getattr(p, "tensor_model_parallel", False)]
    if parts:
        raise ValueError(
            f"{len(parts)} parameters, the first of shape {parts[0]}, are this rank's parts of matrices, split by "
            "tensor parallelism: a part is no matrix of its own. Train with --tensor-model-parallel-size 1, or with "
            "DTensors, as torchtitan does"
        )


def name_of(ours: str) -> str:
    """Return the name in the registry, which has optimizers called "soap" and "muon" already.

    >>> name_of("kl-soap")
    'steepest_kl_soap'
    """
    return f"steepest_{ours.replace('-', '_')}"


def register() -> dict[str, str]:
    """Register every optimizer of matrices that needs no model; return the names in the registry by ours."""
    ours = [name for name, entry in NAMES.items() if is_matrix_rule(entry.rule) and not captures(entry.rule)]
    for name in ours:
        globals()[name_of(name)] = registry.register_optimizer(name_of(name))(registrable(name))  # here for pickle
    return {name: name_of(name) for name in ours}


REGISTERED = register()
"""The names in the registry, by ours."""
