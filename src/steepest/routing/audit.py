"""What looks wrong in a model or its routing: the errors that no exception reports and only a loss curve shows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from steepest.routing.reasons import UNKNOWN, is_tied_head
from steepest.routing.survey import CONVOLUTIONS, Leaf
from steepest.routing.table import Row

LOPSIDED, HEAVY = 64, 2**24
"""A state this many times as large as its parameter, and of this many bytes, deserves a word."""


@dataclass(frozen=True)
class Routed:
    """A routing under audit."""

    leaves: Sequence[Leaf]
    rows: Sequence[Row]
    heads: Collection[int]
    said: Collection[int]
    """The ids of overridden parameters."""
    rule: str
    elementwise: str

    def row(self, leaf: Leaf) -> Row | None:
        """What was decided about a leaf; None for frozen ones."""
        return next((row for row in self.rows if row.param is leaf.param), None)


def refuse(leaf: Leaf) -> None:
    """Raise for a parameter that no rule takes, and name the remedy."""
    param = leaf.param
    if is_lazy(param):
        raise ValueError(f"{leaf.name} has no shape yet: run a batch through the lazy modules first")
    if param.is_complex():
        raise ValueError(
            f"{leaf.name} is {param.dtype}: no rule takes complex parameters; hold it as a real one "
            "(torch.view_as_real) or freeze it (requires_grad_(False))"
        )
    if not param.is_floating_point():
        raise ValueError(f"{leaf.name} is {param.dtype}: only floating-point parameters can be optimized; freeze it")


def warnings(routed: Routed) -> tuple[str, ...]:
    """Everything that looks wrong, in words."""
    return tuple(text for check in CHECKS for text in check(routed))


def tied_to_a_matrix_rule(routed: Routed) -> Iterator[str]:
    """A tied embedding that an override sends to a matrix rule."""
    for leaf in filter(is_tied_head, routed.leaves):
        row, head = routed.row(leaf), leaf.tied_head
        if row and head and row.view is not None:
            yield (
                f"{leaf.name} is an embedding and, as {head.name}, the output head; by override it goes to {row.rule}: "
                f"matrix rules are known to do harm there"
            )


def placeholders(routed: Routed) -> Iterator[str]:
    """Weights without their shape: ZeRO-3 partitions, FSDP's flat parameters."""
    holders = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
    hollow = [
        leaf.name
        for leaf in routed.leaves
        if type(leaf.param).__name__ == "FlatParameter"
        or (leaf.place.local == "weight" and isinstance(leaf.place.owner, holders) and leaf.param.ndim < 2)
        or (leaf.param.numel() == 0 and leaf.param.requires_grad)
    ]
    if hollow:
        yield (
            f"{_some(hollow)} stand without their shape (shards of ZeRO-3 or FSDP1?), so no matrices are seen; "
            "shard with FSDP2 (fully_shard), which keeps shapes"
        )


def nothing_hidden(routed: Routed) -> Iterator[str]:
    """A model whose whole body runs entry by entry."""
    if routed.rows and routed.rule != routed.elementwise and not any(row.view is not None for row in routed.rows):
        yield f"no parameter goes to {routed.rule}: the whole model runs entry by entry ({routed.elementwise})"


def no_head(routed: Routed) -> Iterator[str]:
    """A model whose outputs come from nowhere that position or ties would show."""
    named = any(row.view is None and id(row.param) in routed.said for row in routed.rows)
    if not (routed.heads or named) and any(row.view is not None for row in routed.rows):
        yield (
            "no output head was recognised; if one of the matrices produces the outputs, say so: "
            f'overrides={{"its.name": "{routed.elementwise}"}}'
        )


def unknown_matrices(routed: Routed) -> Iterator[str]:
    """Bare parameters of two and more dimensions that nothing explains."""
    unknown = [row.name for row in routed.rows if row.why == UNKNOWN]
    if unknown:
        yield f"{_some(unknown)} may or may not be matrices and run entry by entry; an override settles it"


def shared_storage(routed: Routed) -> Iterator[str]:
    """Two parameters over one memory: it would be stepped twice."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for leaf in routed.leaves:
        if type(leaf.param) is not nn.Parameter or leaf.param.is_meta or leaf.param.numel() == 0:
            continue  # of other tensor types the address says nothing
        key = (leaf.param.data_ptr(), tuple(leaf.param.shape))
        if key in seen and leaf.param.requires_grad:
            yield f"{seen[key]} and {leaf.name} are two parameters over one memory; tie the parameter, not its data"
        seen.setdefault(key, leaf.name)


def frozen_with_gradients(routed: Routed) -> Iterator[str]:
    """Parameters that don't require a gradient and hold one."""
    stale = [leaf.name for leaf in routed.leaves if not leaf.param.requires_grad and leaf.param.grad is not None]
    if stale:
        yield f"{_some(stale)} have gradients although frozen: they are not optimized"


def on_meta(routed: Routed) -> Iterator[str]:
    """Parameters without memory."""
    hollow = [row.name for row in routed.rows if row.param.is_meta]
    if hollow:
        yield f"{_some(hollow)} are on the meta device: materialise the model before building its optimizer"


def lopsided(routed: Routed) -> Iterator[str]:
    """Thin matrices whose state dwarfs them: a basis of the long side costs its square."""
    heavy = [
        row for row in routed.rows if row.view is not None and row.state_bytes > max(HEAVY, LOPSIDED * row.param.nbytes)
    ]
    if heavy:
        worst = max(heavy, key=lambda row: row.state_bytes)
        times = worst.state_bytes // worst.param.nbytes
        yield (
            f"{_some([row.name for row in heavy])}: so thin that {worst.rule} keeps up to {times} times their memory; "
            f"a smaller max_precond_dim or {routed.elementwise} keeps less"
        )


CHECKS = (
    tied_to_a_matrix_rule,
    placeholders,
    nothing_hidden,
    no_head,
    unknown_matrices,
    shared_storage,
    frozen_with_gradients,
    on_meta,
    lopsided,
)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
