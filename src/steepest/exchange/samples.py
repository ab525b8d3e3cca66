"""Whose samples a rank sees: what statistics of a model's layers need of the ranks that share the model.

Under DDP, FSDP2 and HSDP every rank computes whole layers for samples of its own, and captures these. Layouts in which
that is otherwise are refused here, with the remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch.distributed as dist
from torch import Tensor, nn

from steepest.curvature import Layer


def refuse_parallel(layers: Iterable[Layer], model: nn.Module, rule: str, fisher: str) -> None:
    """Raise if a rank sees a part of a layer's inputs or outputs only, or if ranks of one sample draw other targets.

    Args:
        layers: those that are captured.
        model: the model that they are in.
        rule: the name of their rule.
        fisher: "sampled" if each rank draws targets.

    Raises:
        ValueError: under tensor parallelism, for draws under DDP with ``static_graph=True``, and for EKFAC.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from steepest.exchange import dtensor

    layers = list(layers)
    shared = dtensor.held_by_others([layer.weight for layer in layers])
    cut = dtensor.tensor_parallel(model.parameters())
    for layer in layers:
        name = f"{layer.name}.weight" if layer.name else "weight"
        if rule == "ekfac" and layer.weight in shared:
            raise ValueError(
                f"{name} is on several ranks, and the second moments of {rule} need the owner's bases on all of them: "
                "take 'kfac', whose factors are averages, also with form='eigen'"
            )
        if layer.weight in cut:
            raise ValueError(
                f"{name} is cut by tensor parallelism: a rank sees a part of the layer's inputs or outputs, and "
                f"{rule} needs statistics of all: give it another rule, overrides={{'{name}': 'soap'}}"
            )
    if fisher != "sampled":
        return
    if cut:
        name = next(name for name, p in model.named_parameters() if p in cut)
        raise ValueError(
            f"fisher='sampled' with {name} under tensor parallelism: ranks that share a sample would draw different "
            "targets for it: take fisher='empirical'"
        )
    if not dtensor.static_graphs().isdisjoint(model.parameters()):
        raise ValueError(
            "fisher='sampled' with DistributedDataParallel(static_graph=True): it would take the backward pass of "
            "optimizer.sample for the training's, and never average gradients again: leave static_graph out, or take "
            "fisher='empirical'"
        )


def refuse_unshared(names: Mapping[Tensor, str], peers: Collection[Tensor]) -> None:
    """Raise if DDP replicates a parameter now, and did not when the optimizer was made.

    Every rank would precondition by the statistics of its own samples, and weights would drift apart.

    Args:
        names: the parameters under rules that capture, and their names.
        peers: the parameters that the optimizer knows other ranks to hold.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    from steepest.exchange import dtensor

    shared = dtensor.held_by_others(names)
    for p, name in names.items():
        if p in shared and p not in peers:
            raise RuntimeError(
                f"{name} was wrapped with DistributedDataParallel after the optimizer was made, so that each rank "
                "would step by the statistics of its own samples: wrap the model first, and make the optimizer from it"
            )
