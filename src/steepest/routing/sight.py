"""Seeing a weight as matrices: which module it belongs to says how it is laid out.

Blocks that a module fuses for speed (query, key and value; the gates of an LSTM; experts) are matrices of their own:
they share no output, so a direction computed for all of them at once would mix what the network keeps apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from steepest.routing.survey import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, Place, stores_inputs_first
from steepest.view import View

GATES: dict[type[nn.Module], str] = {
    nn.LSTM: "i, f, g, o",
    nn.LSTMCell: "i, f, g, o",
    nn.GRU: "r, z, n",
    nn.GRUCell: "r, z, n",
    nn.RNN: "",
    nn.RNNCell: "",
}
QKV = re.compile(r"qkv|qkv_proj|to_qkv|in_proj_qkv|wqkv|w_pack|c_attn|in_proj_weight", re.IGNORECASE)
KV = re.compile(r"kv|to_kv", re.IGNORECASE)
# GPT-NeoX, Bloom and Megatron keep q, k and v of each head together: contiguous thirds would be no projections at all.
INTERLEAVED = re.compile(r"query_key_value|linear_qkv", re.IGNORECASE)
GATE_UP = re.compile(r"gate_up(_proj)?", re.IGNORECASE)
FUSED = "fused, one matrix each"
WEIGHT_LIKE = re.compile(r"weight|kernel|(\w+_)?(proj|w\d*)|w_\w+|w[qkvo]", re.IGNORECASE)
# Tables of learnt vectors: they are added or looked up, nothing is multiplied by them.
TABLE_LIKE = re.compile(
    r"(^|_)(pos|position\w*|rel|relative|cls|class|tokens?|mask|quer(y|ies)|prompts?|registers?|latents?|anchors?"
    r"|\w*embed\w*|table|scale|gamma)(_|\d|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sight:
    """A view, why it is the right one, and the words for printing it."""

    view: View
    why: str
    blocks: str = ""
    """What the split's blocks are: "q, k, v"."""
    members: str = ""
    """What the batch's members are: "experts"."""

    def __str__(self) -> str:
        return describe(self.view, self.blocks, self.members)


def see(place: Place) -> Sight | None:
    """How the parameter at this place is laid out as matrices, or None if nothing says that it is any.

    >>> from steepest.routing.survey import survey
    >>> for leaf in survey(nn.Sequential(nn.Conv2d(3, 64, 7), nn.LSTM(64, 32), nn.MultiheadAttention(32, 4))):
    ...     if sight := see(leaf.place):
    ...         print(f"{sight}: {sight.why}")
    64×(3·7·7): convolution, flattened
    4 × 32×64 (i, f, g, o): gates, one matrix each
    4 × 32×32 (i, f, g, o): gates, one matrix each
    3 × 32×32 (q, k, v): fused, one matrix each
    32×32: weight of Linear
    """
    if place.param.ndim < 2 or place.param.numel() == 0 or "bias" in place.local:
        return None
    return next((sight for look in LOOKS if (sight := look(place))), None)


def describe(view: View, blocks: str = "", members: str = "") -> str:
    """A view in words: ``768×256``, ``3 × 256×256 (q, k, v)``, ``8 experts of 512×128``, ``64×(16·3·3)``.

    >>> describe(View((48, 32), split=(32, 8, 8)), "q, k, v")
    '32×32 + 2 × 8×32 (q, k, v)'
    >>> describe(View((8, 128, 512), merge_dims=False, transpose=True), members="experts")
    '8 experts of 512×128 (transposed)'
    """
    if not view.pieces:
        return "empty"
    batch = view.pieces[0][0]
    runs: list[tuple[int, str]] = []
    for _, m, n in view.pieces:
        size = _size(view, m, n)
        if runs and runs[-1][1] == size:
            runs[-1] = (runs[-1][0] + 1, size)
        else:
            runs.append((1, size))
    text = " + ".join(size if count == 1 else f"{count} × {size}" for count, size in runs)
    if batch > 1:
        text = f"{batch} {members} of {text}" if members else f"{batch} × {text}"
    notes = [note for note in (blocks if view.split else "", "transposed" if view.transpose else "") if note]
    return f"{text} ({'; '.join(notes)})" if notes else text


def _size(view: View, m: int, n: int) -> str:
    merged = (
        view.shape[1:] if view.merge_dims and len(view.shape) > 2 and math.prod(view.shape[1:]) > view.shape[1] else ()
    )
    kernel = "(" + "·".join(map(str, merged)) + ")"
    rows, columns = (kernel, str(n)) if view.transpose else (str(m), kernel)
    return f"{rows}×{columns}" if merged else f"{m}×{n}"


def _lora(place: Place) -> Sight | None:
    if not place.is_lora or place.param.ndim != 2:
        return None
    return Sight(_plain(place), f"LoRA factor of rank {min(place.param.shape)}")


def _gates(place: Place) -> Sight | None:
    blocks = next((names for kind, names in GATES.items() if isinstance(place.owner, kind)), None)
    if blocks is None or not place.local.startswith("weight"):
        return None
    count = len(blocks.split(", "))
    if count == 1 or place.local.startswith("weight_hr"):  # an LSTM's output projection has no gates
        return Sight(_plain(place), f"weight of {place.kind}")
    return Sight(_equal(place, count), "gates, one matrix each", blocks)


def _attention(place: Place) -> Sight | None:
    """Projections that `nn.MultiheadAttention` keeps as bare parameters."""
    if not isinstance(place.owner, nn.MultiheadAttention) or not place.local.endswith("proj_weight"):
        return None
    return _query_key_value(place) or Sight(_plain(place), "projection of MultiheadAttention")


def _experts(place: Place) -> Sight | None:
    words = f"{place.name} {place.kind}".lower()
    if place.param.ndim != 3 or not ("expert" in words or "moe" in words) or place.param.shape[0] < 2:
        return None
    transpose = _experts_transposed(place)
    view = View(tuple(place.param.shape), merge_dims=False, transpose=transpose)
    rows = view.pieces[0][1]
    if not GATE_UP.fullmatch(place.local) or rows % 2:
        return Sight(view, "stacked experts", members="experts")
    if not getattr(place.owner, "is_concatenated", True):
        return Sight(view, "stacked experts, gate and up interleaved", members="experts")
    halves = replace(view, split=(rows // 2, rows // 2))
    return Sight(halves, "stacked experts, fused", "gate, up", "experts")


def _experts_transposed(place: Place) -> bool:
    """Whether experts are stored [E, in, out]. The module says so, or the shapes of its two projections do."""
    declared = getattr(place.owner, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    up, down = (getattr(place.owner, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 3):
        return False
    _, inner, hidden = down.shape
    return tuple(up.shape[1:]) == (hidden, 2 * inner)


def _convolution(place: Place) -> Sight | None:
    owner = place.owner
    if not isinstance(owner, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS) or place.local != "weight":
        return None
    shape = tuple(place.param.shape)
    if owner.groups > 1:  # rows of a transposed one are inputs, which is how its groups can be told apart
        view = View(shape, heads=owner.groups)
        return Sight(view, "grouped convolution, one matrix per group", members="groups")
    if isinstance(owner, TRANSPOSED_CONVOLUTIONS):
        return Sight(View(shape, transpose=True), "transposed convolution, flattened")
    if owner.kernel_size == owner.stride and math.prod(owner.kernel_size) > 1:
        return Sight(View(shape), "patches: a Linear over flattened pixels")
    return Sight(View(shape), "convolution, flattened")


def _interleaved(place: Place) -> Sight | None:
    if place.param.ndim != 2 or not _called(INTERLEAVED, place):
        return None
    return Sight(_plain(place), "fused q, k, v, interleaved by head: kept whole")


def _query_key_value(place: Place) -> Sight | None:
    """q, k and v in one weight: by name, or by shape inside an attention module."""
    if place.param.ndim != 2:
        return None
    _, rows, columns = _plain(place).pieces[0]
    attention = re.search(r"attn|attention", f"{place.name} {type(place.parent).__name__}".lower())
    if not _called(QKV, place) and not (attention and rows == 3 * columns):
        return None
    if getattr(place.parent, "is_cross_attention", False):  # GPT-2 in transformers: only k and v are fused there
        return Sight(_plain(place, (rows // 2,) * 2), FUSED, "k, v")
    grouped = any(re.search(r"kv_?(head|group)|key_value|multi_query", name) for name in vars(place.parent))
    split = _qkv_rows(rows, columns, grouped)
    return Sight(_plain(place, split), FUSED if split else "fused q, k, v of unknown sizes: kept whole", "q, k, v")


def _qkv_rows(rows: int, columns: int, grouped: bool) -> tuple[int, ...]:
    """Equal thirds, or in grouped-query attention a full query and two smaller blocks; () if neither fits.

    >>> _qkv_rows(96, 32, False), _qkv_rows(64, 32, True), _qkv_rows(80, 32, True)
    ((32, 32, 32), (32, 16, 16), ())
    """
    shared = (rows - columns) // 2
    fits = 0 < shared <= columns and columns + 2 * shared == rows and columns % shared == 0
    if fits and (grouped or rows % 3):
        return (columns, shared, shared)
    return () if grouped or rows % 3 else (rows // 3,) * 3


def _halves(place: Place) -> Sight | None:
    blocks = "k, v" if _called(KV, place) else "gate, up" if _called(GATE_UP, place) else ""
    if place.param.ndim != 2 or not blocks or (rows := _plain(place).pieces[0][1]) % 2:
        return None
    return Sight(_plain(place, (rows // 2,) * 2), FUSED, blocks)


def _weight(place: Place) -> Sight | None:
    if not place.is_projection or place.param.ndim != 2:
        return None
    return Sight(_plain(place), f"weight of {place.kind}")


def _bare(place: Place) -> Sight | None:
    """A parameter that a module of the user's own holds: a matrix if it is called like one."""
    if place.param.ndim != 2 or type(place.owner).__module__.startswith("torch.nn"):
        return None
    if not WEIGHT_LIKE.fullmatch(place.local) or TABLE_LIKE.search(place.local):
        return None
    return Sight(_plain(place), f"matrix by its name in {place.kind}")


LOOKS: tuple[Callable[[Place], Sight | None], ...] = (
    _lora,
    _gates,
    _attention,
    _experts,
    _convolution,
    _interleaved,
    _halves,
    _query_key_value,
    _weight,
    _bare,
)
"""From the most to the least particular; the first that recognises a parameter is right."""


def _plain(place: Place, split: tuple[int, ...] = ()) -> View:
    return View(tuple(place.param.shape), transpose=stores_inputs_first(place.owner), split=split)


def _equal(place: Place, count: int) -> View:
    return _plain(place, (place.param.shape[0] // count,) * count)


def _called(pattern: re.Pattern[str], place: Place) -> bool:
    return any(pattern.fullmatch(name) for name in place.call_names)
