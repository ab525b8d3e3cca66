"""The state of an optimizer that several ranks share, in one plain dict: for small jobs, exports, and other programs.

Distributed checkpoints (torch.distributed.checkpoint) need none of this, and write in parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.engine import checkpoint
from steepest.exchange.placement import is_shared

if TYPE_CHECKING:
    from steepest.engine.optimizer import Optimizer


@torch.no_grad()
def consolidate(optimizer: Optimizer) -> dict[str, Any] | None:
    """See `steepest.Optimizer.consolidate`."""
    if not _has_company():
        return optimizer.state_dict()
    packed = torch.optim.Optimizer.state_dict(optimizer)
    state = {key: {name: _on_first(x) for name, x in named.items()} for key, named in packed["state"].items()}
    return checkpoint.detached(packed | {"state": state}) if dist.get_rank() == 0 else None


@torch.no_grad()
def load_consolidated(optimizer: Optimizer, state_dict: Mapping[str, Any] | None) -> None:
    """See `steepest.Optimizer.load_consolidated`."""
    if not _has_company():
        if state_dict is None:
            raise ValueError("state_dict=None: must be what consolidate() returned")
        optimizer.load_state_dict(dict(state_dict))
        return
    from steepest.exchange.domain import world

    group = world().host_group
    parcel: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            if state_dict is None:
                raise ValueError("state_dict=None on rank 0: must be what consolidate() returned there")
            checkpoint.check(optimizer, state_dict)
            parcel = [_without_values(state_dict)]
        except Exception as error:
            parcel = [error]
    dist.broadcast_object_list(parcel, 0, group)
    if isinstance(parcel[0], Exception):
        raise parcel[0]

    def read(x: Tensor) -> Tensor:
        x = x.detach().cpu().contiguous() if dist.get_rank() == 0 else torch.empty(x.shape, dtype=x.dtype)
        dist.broadcast(x, 0, group)
        return x

    checkpoint.load(optimizer, dict(parcel[0] if state_dict is None or dist.get_rank() else state_dict), read)


def _has_company() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _on_first(x: Tensor) -> Tensor:
    """The whole of ``x`` on rank 0, in the host's memory; elsewhere whatever is at hand. Every rank must ask."""
    from steepest.exchange.compat import Owned
    from steepest.exchange.domain import world

    if not is_shared(x):
        return x
    if not isinstance(x, Owned):
        whole: Tensor = x.full_tensor()  # type: ignore[attr-defined]
        return whole.cpu()
    group = world().host_group
    if x.owner == dist.get_rank() == 0:
        return x.to_local().cpu()
    if x.owner == dist.get_rank():
        dist.send(x.to_local().cpu().contiguous(), 0, group)
    out = torch.empty(x.shape, dtype=x.dtype)
    if dist.get_rank() == 0:
        dist.recv(out, x.owner, group)
    return out


def _without_values(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors of the same shapes that take no room, to be checked where the values are not yet."""
    state = {
        key: {name: torch.zeros((), dtype=x.dtype).expand(x.shape) for name, x in named.items()}
        for key, named in state_dict["state"].items()
    }
    return {"state": state, "param_groups": state_dict["param_groups"]}
