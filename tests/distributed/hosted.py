"""Functions that the ranks run as Accelerate would: what it does to an optimizer, done by hand.

`Accelerator.prepare` is given a model and the optimizer that was made of it. Under FSDP2 it puts a stub into the place
of each parameter in the optimizer's groups, so that fully_shard can free the parameters, and afterwards the DTensor of
the same name. Then it loads the optimizer's state into the optimizer itself. Under DDP it wraps the model, and
`save_state` has the first rank write what `state_dict` returns; under FSDP2 each rank's part goes to a distributed
checkpoint. tests/integrations has the same with Accelerate itself, where it is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import differing, laid_out, toy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from steepest import Optimizer, for_model

STEPS, HALF = 6, 3
Prepared = tuple[nn.Module, Optimizer]


def plainly(layout: str, rule: str) -> Prepared:
    """Return a model that was laid out first, and its optimizer, as a plain script has them."""
    model = laid_out(toy(), layout)
    return model, _optimizer(model, rule)


def prepared(layout: str, rule: str, changed: float = 0.0) -> Prepared:
    """Return a model and its optimizer, which was made first, as Accelerate prepares them."""
    model = toy()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(changed)
    optimizer = _optimizer(model, rule)
    if layout == "fsdp":
        names = {p: name for name, p in model.named_parameters()}
        stubs: dict[Tensor, str] = {}
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                group["params"][i] = stub = torch.empty(1, dtype=p.dtype)
                stubs[stub] = names[p]
        model = laid_out(model, layout)
        shards = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [shards[stubs[stub]] for stub in group["params"]]
    else:
        model = laid_out(model, layout)
    optimizer.load_state_dict(optimizer.state_dict())
    return model, optimizer


def train(model: nn.Module, optimizer: Any, first: int, last: int, backward: Any = Tensor.backward) -> None:
    """Take steps on this rank's part of each batch, clipped."""
    for step in range(first, last):
        tokens = torch.randint(11, (16,), generator=torch.Generator().manual_seed(step))
        loss = model(tokens.chunk(dist.get_world_size())[dist.get_rank()]).square().mean()
        optimizer.zero_grad()
        backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def save(layout: str, model: nn.Module, optimizer: Optimizer, folder: str) -> None:
    """Save as Accelerate does."""
    if layout == "fsdp":
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save((model.state_dict(), optimizer.state_dict()), Path(folder) / "state.pt")
    dist.barrier()


def load(layout: str, model: nn.Module, optimizer: Optimizer, folder: str) -> None:
    """Load likewise."""
    if layout == "fsdp":
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        weights, saved = torch.load(Path(folder) / "state.pt", weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved)


def compared(layout: str, rule: str, folder: str) -> dict[str, list[str]]:
    """Return what differs in any bit from a plain script after six steps: unbroken, and saved and resumed at half."""
    plain = plainly(layout, rule)
    train(*plain, 0, STEPS)
    whole = prepared(layout, rule)
    train(*whole, 0, HALF)
    save(layout, *whole, folder)
    train(*whole, HALF, STEPS)
    resumed = prepared(layout, rule, changed=1.0)
    load(layout, *resumed, folder)
    train(*resumed, HALF, STEPS)
    return {"whole": unlike(whole, plain), "resumed": unlike(resumed, plain)}


def unlike(pair: Prepared, other: Prepared) -> list[str]:
    """Return the weights, and the entries of this rank's state, in which two trainings differ."""
    mine, theirs = _state(pair[1]), _state(other[1])
    assert mine.keys() == theirs.keys()
    held = [key for key, x in theirs.items() if x.numel()]  # under DDP this rank's matrices alone, in a plain script
    assert any(mine[key].any() for key in held)
    return differing(pair[0], other[0]) + [f"{key}" for key in held if not torch.equal(mine[key], theirs[key])]


def _optimizer(model: nn.Module, rule: str) -> Optimizer:
    frequency = {"precondition_frequency": 2} if rule == "soap" else {}
    return for_model(model, rule, lr=0.01, weight_decay=0.1, elementwise={"lr": 1e-3}, **frequency)


def _state(optimizer: Optimizer) -> dict[tuple[str, str], Tensor]:
    """Return this rank's state by the names of parameters and entries."""
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            for entry, x in optimizer.state[p].items():
                value = x.to_local() if hasattr(x, "to_local") else x
                if isinstance(value, Tensor):
                    found[name.removeprefix("module."), entry] = value.detach().clone()
    return found
