"""Everything that steepest knows of torch.distributed's private parts, in one file.

Four facts: which box of a parameter a rank holds (`boxes`), which parameters DDP keeps equal (`replicated`), how a
tensor that lives on one rank is shown to distributed checkpoints (`Owned`), and a mesh of that one rank.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor as DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part of a tensor starts, and its shape."""

REMEDY = (
    "use torch.distributed.checkpoint (dcp.save with get_optimizer_state_dict): it writes every rank's part, and "
    "loads on any number of ranks; or optimizer.consolidate(), which every rank calls: rank 0 gets all of it"
)


def boxes(x: DTensor, ranks: Sequence[int]) -> list[Box]:
    """The part of ``x`` that each of the ranks holds; also with FSDP2 and tensor parallel on one dimension."""
    mesh = x.device_mesh.mesh
    at = {int(rank): index for index, rank in enumerate(mesh.flatten().tolist())}
    found = []
    for rank in ranks:
        coordinate = [int(i) for i in torch.unravel_index(torch.tensor(at[rank]), mesh.shape)]
        shape, start = _compute_local_shape_and_global_offset(x.shape, mesh.shape, coordinate, x.placements)
        found.append((tuple(start), tuple(shape)))
    return found


def box(x: Tensor) -> Box:
    """The part of the DTensor ``x`` that this rank holds."""
    assert isinstance(x, DTensor)
    return boxes(x, [dist.get_rank()])[0]


def replicated() -> dict[Tensor, dist.ProcessGroup]:
    """The parameters that a `DistributedDataParallel` module keeps equal on all ranks of a group, with that group.

    DDP leaves no mark on a parameter, so the modules themselves are looked up among all live objects. An optimizer that
    is made before its model is wrapped finds nothing, and then steps every matrix on every rank: slower, and as right.
    So does one that is made after `gc.freeze`, which hides what there is from this search.
    """
    found: dict[Tensor, dist.ProcessGroup] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel):
            found |= dict.fromkeys(thing.parameters(), thing.process_group)
    return found


class Owned(DTensor):
    """A tensor that lies whole on one rank, and on the others as an empty part of it.

    Distributed checkpoints write it once and read it wherever its owner then is. What would take this rank's part for
    the whole raises: pickling (``torch.save``), and gathering by ``full_state_dict=True``, which would lose entries.
    """

    @classmethod
    def wrap(cls, x: Tensor | None, owner: int, like: Tensor, device: str) -> Owned:
        """``x`` on the rank ``owner`` of the world, None elsewhere; ``like`` has the shape and dtype of the whole."""
        mesh = _mesh_of(device, owner)
        meta = torch.empty(like.shape, dtype=like.dtype, device="meta")
        spec = DTensorSpec(mesh, (Replicate(),), tensor_meta=TensorMeta(meta.shape, meta.stride(), like.dtype))
        local = torch.zeros(0, dtype=like.dtype, device=device) if x is None else x
        return cls(local, spec, requires_grad=False)

    @property
    def owner(self) -> int:
        """The rank, in the world, that has it."""
        return int(self.device_mesh.mesh.item())

    @property
    def here(self) -> bool:
        """Whether this rank has it."""
        return self.owner == dist.get_rank()

    def clone(self, *, memory_format: torch.memory_format = torch.preserve_format) -> Owned:  # type: ignore[override]
        """A copy, on the same rank."""
        local = self._local_tensor
        mine = local.clone(memory_format=memory_format) if self.here else None
        return Owned.wrap(mine, self.owner, self, local.device.type)

    def __deepcopy__(self, memo: dict[int, Any]) -> Owned:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(f"this process has only its part of the optimizer's state and can't save it alone: {REMEDY}")

    def redistribute(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        raise RuntimeError(f"full_state_dict=True would lose the state that other ranks have: {REMEDY}")

    def full_tensor(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self.redistribute()


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """``x``, which has a row for each that this rank holds of ``p``, as its part of a DTensor laid out like ``p``."""
    assert isinstance(p, DTensor)
    mesh = p.device_mesh
    if x.device.type != mesh.device_type:
        mesh = DeviceMesh(x.device.type, mesh.mesh, _init_backend=False)
    whole = torch.empty(p.shape[0], *x.shape[1:], device="meta")
    shards: Tensor = DTensor.from_local(
        x, mesh, p.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return shards


@cache
def _mesh_of(device_type: str, rank: int) -> DeviceMesh:
    """The mesh of one rank; making one costs about a millisecond."""
    return DeviceMesh(device_type, [rank], _init_backend=False)
