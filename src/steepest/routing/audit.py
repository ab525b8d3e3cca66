"""An audit of a model and its routing: errors that no exception reports, and that show only in the loss."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from steepest.curvature.layer import CONVOLUTIONS
from steepest.routing.captured import captures
from steepest.routing.classify import UNKNOWN
from steepest.routing.heads import Heads
from steepest.routing.survey import Leaf
from steepest.routing.table import Row

LARGE_RATIO, LARGE_STATE = 64, 2**24
"""A warning is given for state of at least this many bytes that is at least this many times as large as its weight."""


def refuse(leaf: Leaf) -> None:
    """Raise a ValueError that names the remedy if no rule can optimize a parameter."""
    param = leaf.param
    if is_lazy(param):
        raise ValueError(f"{leaf.name} has no shape yet: run a batch through the lazy modules first")
    if param.is_complex():
        raise ValueError(
            f"{leaf.name} is {param.dtype}: no rule takes complex parameters; hold it as a real one "
            "(torch.view_as_real) or freeze it (requires_grad_(False))"
        )
    if any(place.is_embedding and getattr(place.owner, "sparse", False) for place in leaf.places):
        raise ValueError(
            f"{leaf.name} is an embedding with sparse=True: only dense gradients can be optimized; build it with "
            "sparse=False"
        )
    if not param.is_floating_point():
        raise ValueError(f"{leaf.name} is {param.dtype}: only floating-point parameters can be optimized; freeze it")


def warnings(
    leaves: Sequence[Leaf],
    rows: Sequence[Row],
    heads: Heads,
    overridden: Collection[int],
    rule: str,
    elementwise: str,
) -> Iterator[str]:
    """Yield a warning for everything that looks wrong; ``overridden`` are ids of parameters."""
    matrices = [row for row in rows if row.view is not None]
    by_id = {id(row.param): row for row in rows}
    for leaf in leaves:
        row, head = by_id.get(id(leaf.param)), leaf.tied_head
        if row and head and row.view is not None:
            yield (
                f"{leaf.name} is an embedding and, as {head.name}, the output head; by override it goes to {row.rule}: "
                f"matrix rules are known to do harm there"
            )
    hollow = [leaf.name for leaf in leaves if _has_lost_its_shape(leaf)]
    if hollow and rule != elementwise:
        yield (
            f"{_some(hollow)} stand without their shape (shards of ZeRO-3 or FSDP1?), so no matrices are seen; "
            "shard with FSDP2 (fully_shard), which keeps shapes"
        )
    if rows and rule != elementwise and not matrices:
        yield f"no parameter goes to {rule}: the whole model runs entry by entry ({elementwise})"
    head_by_override = any(row.view is None and id(row.param) in overridden for row in rows)
    if matrices and not heads.why and not head_by_override and not captures(rule):
        yield (
            "no output head was recognised; if one of the matrices produces the outputs, say so: "
            f'overrides={{"its.name": "{elementwise}"}}'
        )
    if rule != elementwise and not captures(rule):
        yield from _doubts(rows, heads, overridden, rule, elementwise)
    if unknown := [row.name for row in rows if row.why == UNKNOWN]:
        yield f"{_some(unknown)} may or may not be matrices and run entry by entry; an override settles it"
    yield from _shared_memory(leaves)
    if stale := [leaf.name for leaf in leaves if not leaf.param.requires_grad and leaf.param.grad is not None]:
        yield f"{_some(stale)} have gradients although frozen: they are not optimized"
    if on_meta := [row.name for row in rows if row.param.is_meta]:
        yield f"{_some(on_meta)} are on the meta device: materialise the model before building its optimizer"
    if thin := [row for row in matrices if row.state_bytes > max(LARGE_STATE, LARGE_RATIO * row.param.nbytes)]:
        largest = max(thin, key=lambda row: row.state_bytes)
        yield (
            f"{_some([row.name for row in thin])}: so thin that {largest.rule} keeps up to "
            f"{largest.state_bytes // largest.param.nbytes} times their memory; a smaller max_precond_dim or "
            f"{elementwise} keeps less"
        )


def _doubts(
    rows: Sequence[Row], heads: Heads, overridden: Collection[int], rule: str, elementwise: str
) -> Iterator[str]:
    """Yield a warning for each projection that may or may not be a head, with the override that says the opposite."""
    for row in rows:
        if id(row.param) in heads.doubts and id(row.param) not in overridden:
            other = rule if row.view is None else elementwise
            yield f'{row.name} {heads.doubts[id(row.param)]}; if it isn\'t one, overrides={{"{row.name}": "{other}"}}'


def _has_lost_its_shape(leaf: Leaf) -> bool:
    """Return whether a parameter is a part or a placeholder of what it should be."""
    weight = leaf.local == "weight" and isinstance(leaf.owner, (nn.Linear, nn.Embedding, *CONVOLUTIONS))
    return (weight and leaf.param.ndim < 2) or (leaf.param.numel() == 0 and leaf.param.requires_grad)


def _shared_memory(leaves: Sequence[Leaf]) -> Iterator[str]:
    """Yield a warning for two parameters that share memory, which would be stepped twice."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for leaf in leaves:
        if type(leaf.param) is not nn.Parameter or leaf.param.is_meta or leaf.param.numel() == 0:
            continue  # the address of other tensor types says nothing
        key = (leaf.param.data_ptr(), tuple(leaf.param.shape))
        if key in seen and leaf.param.requires_grad:
            yield f"{seen[key]} and {leaf.name} are two parameters over one memory; tie the parameter, not its data"
        seen.setdefault(key, leaf.name)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
