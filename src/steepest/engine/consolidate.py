"""The state that several ranks share as one plain dict: for small jobs, exports, and other programs.

Distributed checkpoints (torch.distributed.checkpoint) don't need this, and write in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.engine.checkpoint import detached
from steepest.exchange.peers import world
from steepest.exchange.shards import copy_into, is_dtensor, local

Read = Callable[[Tensor], Tensor]
"""Returns the values of a tensor of a state_dict, if they are elsewhere."""


@torch.no_grad()
def consolidated(state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Return the whole of a state_dict of which each rank has a part, on rank 0; None elsewhere."""
    if not _distributed():
        return detached(state_dict)
    # Rank 0 says which rank has what, for where a mesh has several rows, each of them has an owner of its own.
    message = [_owners(state_dict["state"])]
    dist.broadcast_object_list(message, 0, world().host_group)
    owners = iter(message[0])
    state = _over_tensors(state_dict["state"], lambda x: _on_rank_0(x, next(owners)))
    return detached(state_dict | {"state": state}) if dist.get_rank() == 0 else None


def distributed(
    state_dict: Mapping[str, Any] | None, check: Callable[[Mapping[str, Any]], object]
) -> tuple[dict[str, Any], Read]:
    """Distribute a consolidated state from rank 0.

    Args:
        state_dict: the state on rank 0.
        check: raises if the state doesn't fit.

    Returns:
        On every rank, a state_dict that may have no values, and the function that reads them. Every rank must read the
        same tensors in the same order.

    Raises:
        Exception: on all ranks, whatever ``check`` raises on rank 0.
    """
    if not _distributed():
        if state_dict is None:
            raise ValueError("state_dict=None: must be what consolidate() returned")
        return dict(state_dict), lambda x: x
    group, first = world().host_group, dist.get_rank() == 0
    message: list[Any] = [None]
    if first:
        try:
            if state_dict is None:
                raise ValueError("state_dict=None on rank 0: must be what consolidate() returned there")
            check(state_dict)
            message = [_without_values(state_dict)]
        except Exception as error:
            message = [error]
    dist.broadcast_object_list(message, 0, group)
    if isinstance(message[0], Exception):
        raise message[0]

    def read(x: Tensor) -> Tensor:
        x = x.detach().cpu().contiguous() if first else torch.empty(x.shape, dtype=x.dtype, device="cpu")
        dist.broadcast(x, 0, group)
        return x

    return dict(state_dict if first and state_dict is not None else message[0]), read


def move_into(here: Tensor, there: Tensor) -> None:
    """Copy state into its new place, also from another rank that had it; every rank that has a part must call it."""
    owners = [getattr(x, "owner", None) for x in (here, there)]
    if owners[0] == owners[1]:
        copy_into(here, there)
    elif None in owners:
        raise RuntimeError(
            "state that was on one rank would be on several now, or the other way round: save it with consolidate(), "
            "build the optimizer anew, and load it with load_consolidated()"
        )
    elif owners[1] == dist.get_rank():
        dist.send(local(there).cpu().contiguous(), owners[0], world().host_group)
    elif owners[0] == dist.get_rank():
        received = torch.empty(here.shape, dtype=there.dtype, device="cpu")
        dist.recv(received, owners[1], world().host_group)
        local(here).copy_(received)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _owners(state: Any) -> list[int | None]:
    """Return for each tensor of a state, in order, the rank that alone has it as this rank sees it, or None."""
    owners: list[int | None] = []

    def note(x: Tensor) -> Tensor:
        owners.append(getattr(x, "owner", None))
        return x

    _over_tensors(state, note)
    return owners


def _on_rank_0(x: Tensor, owner: int | None) -> Tensor:
    """Return the whole of ``x`` on rank 0, in the host's memory, and anything elsewhere. Every rank must call it.

    ``owner`` is the rank that alone has the tensor for rank 0.
    """
    if not is_dtensor(x):
        return x
    if owner is None:
        whole: Tensor = x.full_tensor()  # type: ignore[attr-defined]
        return whole.cpu()
    group, me = world().host_group, dist.get_rank()
    if me == owner == 0:
        return local(x).cpu()
    if me == owner:
        dist.send(local(x).cpu().contiguous(), 0, group)
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    if me == 0:
        dist.recv(out, owner, group)
    return out


def _without_values(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state_dict with tensors that have the same shapes and take no memory."""
    state = _over_tensors(state_dict["state"], lambda x: torch.zeros((), dtype=x.dtype, device="cpu").expand(x.shape))
    return {"state": state, "param_groups": state_dict["param_groups"]}


def _over_tensors(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a state with its tensors changed, in order; others may have put other things there."""
    if isinstance(state, Tensor):
        return change(state)
    return {k: _over_tensors(v, change) for k, v in state.items()} if isinstance(state, dict) else state
