"""Functions that the ranks run in tests of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import differing, inject, laid_out, optimizer, toy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from steepest import Optimizer

BEFORE, AFTER = 3, 2


def train(model: nn.Module, opt: Optimizer, first: int, last: int) -> None:
    """Take steps ``first`` to ``last - 1`` with made gradients."""
    for step in range(first, last):
        inject(model, step)
        opt.step()


def unbroken(rule: str, options: dict[str, Any]) -> nn.Module:
    """Return the model after all steps in one process."""
    model = toy()
    train(model, optimizer(model, rule, **options), 0, BEFORE + AFTER)
    return model


def save(layout: str, rule: str, options: dict[str, Any], path: str, flat: bool, in_background: bool = False) -> None:
    """Train, and save a distributed checkpoint."""
    model = laid_out(toy(), layout) if layout != "one" else toy()
    opt = optimizer(model, rule, **options)
    train(model, opt, 0, BEFORE)
    if in_background:
        own = dist.new_group(backend="gloo")  # the checkpoint's messages don't mix with the training's
        pending = dcp.async_save(_state(model, opt, flat), checkpoint_id=path, process_group=own)
        train(model, opt, BEFORE, BEFORE + AFTER)  # which the checkpoint must not see
        pending.result()
    else:
        dcp.save(_state(model, opt, flat), checkpoint_id=path)


def resume(layout: str, rule: str, options: dict[str, Any], path: str, flat: bool) -> list[str]:
    """Load a checkpoint into another layout, train on, and return the parameters that differ from an unbroken run."""
    model = toy()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model = laid_out(model, layout) if layout != "one" else model
    opt = optimizer(model, rule, **options)
    state = _state(model, opt, flat)
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(
        model, opt, state["optimizer"], options=StateDictOptions(flatten_optimizer_state_dict=flat)
    )
    train(model, opt, BEFORE, BEFORE + AFTER)
    return differing(model, unbroken(rule, options))


def _state(model: nn.Module, opt: Optimizer, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt, options=options)}


def consolidated(layout: str, rule: str) -> tuple[list[str], list[str]]:
    """Consolidate after some steps, load that into ranks and into one process, and return the differing parameters."""
    model = laid_out(toy(), layout)
    opt = optimizer(model, rule)
    train(model, opt, 0, BEFORE)
    whole = opt.consolidate()
    assert (whole is None) == (dist.get_rank() != 0)

    again = laid_out(toy(), layout)
    other = optimizer(again, rule)
    train(again, other, 0, BEFORE)
    for p in other.state:
        for x in other.state[p].values():
            (x.to_local() if hasattr(x, "to_local") else x).zero_()
    other.load_consolidated(whole)
    train(again, other, BEFORE, BEFORE + AFTER)

    shared = [whole]
    dist.broadcast_object_list(shared)
    one = toy()
    alone = optimizer(one, rule)
    train(one, alone, 0, BEFORE)
    alone.load_state_dict(shared[0])
    train(one, alone, BEFORE, BEFORE + AFTER)
    reference = unbroken(rule, {})
    return differing(again, reference), differing(one, reference)


def refused() -> list[str]:
    """Return the errors of attempts to save one rank's part for the whole."""
    import io

    model = laid_out(toy(), "fsdp")
    opt = optimizer(model, "soap")
    said = []
    for attempt in (
        lambda: get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True)),
        lambda: torch.save(opt.state_dict(), io.BytesIO()),
    ):
        try:
            attempt()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said
