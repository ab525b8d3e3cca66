"""The layout of a weight: the matrices that it consists of, as its module and its names tell.

Blocks that a module fuses for speed (query, key and value; the gates of an LSTM; experts) are matrices of their own.
They share no output, and one direction computed for all of them would mix them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor, nn

from steepest.curvature.layer import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, stores_inputs_first
from steepest.routing.survey import (
    Place,
    around,
    is_own,
    routes,
)
from steepest.view import View

GATES = (((nn.LSTM, nn.LSTMCell), "i, f, g, o"), ((nn.GRU, nn.GRUCell), "r, z, n"), ((nn.RNN, nn.RNNCell), ""))
"""The names of the gates that recurrent layers stack; a plain one has none."""
QKV = re.compile(r"qkv|qkv_proj|to_qkv|in_proj_qkv|wqkv|w_pack|c_attn|in_proj_weight", re.IGNORECASE)
KV = re.compile(r"kv|to_kv", re.IGNORECASE)
# GPT-NeoX, Bloom and Megatron store q, k and v head by head: contiguous thirds would be no projections.
INTERLEAVED = re.compile(r"query_key_value|linear_qkv", re.IGNORECASE)
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
GATE_UP = re.compile(r"gate_up(_proj)?", re.IGNORECASE)
FUSED = "fused, one matrix each"
WEIGHT_NAMES = re.compile(r"weight|kernel|(\w+_)?(proj|w\d*)|w_\w+|w[qkvo]", re.IGNORECASE)
# Tables of learnt vectors are added or looked up; nothing is multiplied by them.
TABLE_NAMES = re.compile(
    r"(^|_)(pos|position\w*|rel|relative|cls|class|tokens?|mask|quer(y|ies)|prompts?|registers?|latents?|anchors?"
    r"|\w*embed\w*|table|scale|gamma)(_|\d|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Layout:
    """The layout of a weight is a view, the reason for it, and words to print it with.

    >>> print(Layout(View((48, 32), split=(32, 8, 8)), blocks="q, k, v"))
    32×32 + 2 × 8×32 (q, k, v)
    >>> print(Layout(View((8, 128, 512), merge_dims=False, transpose=True), members="experts"))
    8 experts of 512×128 (transposed)
    >>> print(Layout(View((48, 32), split=(32, 8, 8), heads=(8, 2, 2)), blocks="q, k, v"))
    8 × 4×32 + 2 × 2 × 4×32 (q, k, v)
    """

    view: View
    why: str = ""
    blocks: str = ""
    """The names of the split's blocks: "q, k, v"."""
    members: str = ""
    """The name of the batch's members: "experts"."""

    def __str__(self) -> str:
        view = self.view
        if not view.pieces:
            return "empty"
        batches = {b for b, _, _ in view.pieces}
        batch = batches.pop() if len(batches) == 1 else 0  # 0: of heads, that each block has a number of its own of
        sizes = [f"{b} × " * (not batch) + _size(view, m, n) for b, m, n in view.pieces]
        runs = [(size, len(list(equal))) for size, equal in groupby(sizes)]
        text = " + ".join(size if count == 1 else f"{count} × {size}" for size, count in runs)
        if batch > 1:
            text = f"{batch} {self.members} of {text}" if self.members else f"{batch} × {text}"
        notes = [note for note in (self.blocks if view.split else "", "transposed" if view.transpose else "") if note]
        return f"{text} ({'; '.join(notes)})" if notes else text


def find_layout(place: Place) -> Layout | None:
    """Return the layout of the parameter at a place, or None if nothing tells that it consists of matrices.

    >>> from steepest.routing.survey import survey
    >>> for leaf in survey(nn.Sequential(nn.Conv2d(3, 64, 7), nn.LSTM(64, 32), nn.MultiheadAttention(32, 4))):
    ...     if layout := find_layout(leaf):
    ...         print(f"{layout}: {layout.why}")
    64×(3·7·7): convolution, flattened
    4 × 32×64 (i, f, g, o): gates, one matrix each
    4 × 32×32 (i, f, g, o): gates, one matrix each
    3 × 32×32 (q, k, v): fused, one matrix each
    32×32: weight of Linear
    """
    if place.param.ndim < 2 or place.param.numel() == 0 or "bias" in place.local:
        return None
    return next((layout for detect in DETECTORS if (layout := detect(place))), None)


def _size(view: View, m: int, n: int) -> str:
    if len(view.shape) < 3 or not view.merge_dims or math.prod(view.shape[2:]) == 1:
        return f"{m}×{n}"
    merged = "(" + "·".join(map(str, view.shape[1:])) + ")"
    return f"{merged}×{n}" if view.transpose else f"{m}×{merged}"


def _lora(place: Place) -> Layout | None:
    if not place.is_lora or getattr(place.owner, "groups", 1) > 1:
        return None
    view = _view(place)
    return Layout(view, f"LoRA factor of rank {min(view.pieces[0][1:])}")


def _gates(place: Place) -> Layout | None:
    blocks = next((names for kinds, names in GATES if isinstance(place.owner, kinds)), None)
    if blocks is None or not place.local.startswith("weight"):
        return None
    count = len(blocks.split(", "))
    if count == 1 or place.local.startswith("weight_hr"):  # an LSTM's output projection has no gates
        return Layout(_view(place), f"weight of {place.kind}")
    return Layout(_view(place, (place.param.shape[0] // count,) * count), "gates, one matrix each", blocks)


def _attention(place: Place) -> Layout | None:
    """Recognize the projections that `nn.MultiheadAttention` holds as bare parameters."""
    if not isinstance(place.owner, nn.MultiheadAttention) or not place.local.endswith("proj_weight"):
        return None
    return _query_key_value(place) or Layout(_view(place), "projection of MultiheadAttention")


def _experts(place: Place) -> Layout | None:
    if place.param.ndim != 3 or not is_own(place.owner) or place.param.shape[0] < 2:
        return None
    words = f"{place.name} {place.kind}".lower()
    if not ("expert" in words or "moe" in words or any(routes(*gate, place.param) for gate in around(place))):
        return None
    view = View(tuple(place.param.shape), merge_dims=False, transpose=_experts_transposed(place))
    rows = view.pieces[0][1]
    if not GATE_UP.fullmatch(place.local) or rows % 2:
        return Layout(view, "stacked experts", members="experts")
    if not getattr(place.owner, "is_concatenated", True):
        return Layout(view, "stacked experts, gate and up interleaved", members="experts")
    return Layout(replace(view, split=(rows // 2, rows // 2)), "stacked experts, fused", "gate, up", "experts")


def _experts_transposed(place: Place) -> bool:
    """Return whether experts are stored [E, in, out]: the module declares it, or its two projections' shapes tell."""
    declared = getattr(place.owner, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    up, down = (getattr(place.owner, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 3):
        return False
    _, inner, hidden = down.shape
    return tuple(up.shape[1:]) == (hidden, 2 * inner)


def _convolution(place: Place) -> Layout | None:
    owner = place.owner
    if not isinstance(owner, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS) or place.local != "weight":
        return None
    shape = tuple(place.param.shape)
    if owner.groups > 1:  # the rows of a transposed one are inputs; only so are its groups separate rows
        return Layout(View(shape, heads=owner.groups), "grouped convolution, one matrix per group", members="groups")
    if fused := _query_key_value(place) if _named(QKV, place) and place.widths[1] == owner.in_channels else None:
        return fused
    if isinstance(owner, TRANSPOSED_CONVOLUTIONS):
        return Layout(View(shape, transpose=True), "transposed convolution, flattened")
    if owner.kernel_size == owner.stride and math.prod(owner.kernel_size) > 1:
        return Layout(View(shape), "patches: a Linear over flattened pixels")
    return Layout(View(shape), "convolution, flattened")


def _interleaved(place: Place) -> Layout | None:
    if not _is_flat(place) or not _named(INTERLEAVED, place):
        return None
    return Layout(_view(place), "fused q, k, v, interleaved by head: kept whole")


def _query_key_value(place: Place) -> Layout | None:
    """Recognize q, k and v in one weight: by name, or by shape inside an attention module."""
    if not _is_flat(place):
        return None
    _, rows, columns = _view(place).pieces[0]
    attention = ATTENTION.search(f"{place.name} {type(place.parent).__name__}")
    if not _named(QKV, place) and not (attention and rows == 3 * columns):
        return None
    if getattr(place.parent, "is_cross_attention", False):  # GPT-2 in transformers fuses only k and v there
        return Layout(_view(place, (rows // 2,) * 2), FUSED, "k, v")
    grouped = any(re.search(r"kv_?(head|group)|key_value|multi_query", name) for name in vars(place.parent))
    split = _qkv_rows(rows, columns, grouped)
    return Layout(_view(place, split), FUSED if split else "fused q, k, v of unknown sizes: kept whole", "q, k, v")


def _qkv_rows(rows: int, columns: int, grouped: bool) -> tuple[int, ...]:
    """Return equal thirds, or for grouped-query attention a full query and two smaller blocks; () if neither fits.

    >>> _qkv_rows(96, 32, False), _qkv_rows(64, 32, True), _qkv_rows(80, 32, True)
    ((32, 32, 32), (32, 16, 16), ())
    """
    shared = (rows - columns) // 2
    fits = 0 < shared <= columns and columns + 2 * shared == rows and columns % shared == 0
    if fits and (grouped or rows % 3):
        return (columns, shared, shared)
    return () if grouped or rows % 3 else (rows // 3,) * 3


def _halves(place: Place) -> Layout | None:
    blocks = "k, v" if _named(KV, place) else "gate, up" if _named(GATE_UP, place) else ""
    if place.param.ndim != 2 or not blocks or (rows := _view(place).pieces[0][1]) % 2:
        return None
    return Layout(_view(place, (rows // 2,) * 2), FUSED, blocks)


def _gated(place: Place) -> Layout | None:
    """Recognize two blocks in one weight by the layers beside it: one reads half of the outputs, and none reads all.

    So it is with inputs and gates in one product (ModernBERT's feed-forward layers, Mamba's two branches).
    """
    if not isinstance(place.owner, nn.Linear) or place.owner is place.parent or place.local != "weight":
        return None
    rows, columns = place.param.shape
    beside = [layer for layer in place.parent.children() if layer is not place.owner]
    reads = {getattr(layer, name, 0) for layer in beside for name in ("in_features", "in_channels", "input_size")}
    back = [(2 * layer.in_features, layer.out_features) for layer in beside if isinstance(layer, nn.Linear)]
    # In attention it may as well be a query and two smaller blocks.
    if (rows, columns) not in back or rows in reads or ATTENTION.search(f"{place.name} {type(place.parent).__name__}"):
        return None
    return Layout(_view(place, (rows // 2,) * 2), FUSED)


def _weight(place: Place) -> Layout | None:
    if not place.is_projection or place.param.ndim != 2:
        return None
    return Layout(_view(place), f"weight of {place.kind}")


def _bare(place: Place) -> Layout | None:
    """Recognize a parameter of a user's own module by its name."""
    if place.param.ndim != 2 or not is_own(place.owner):
        return None
    if not WEIGHT_NAMES.fullmatch(place.local) or TABLE_NAMES.search(place.local):
        return None
    return Layout(_view(place), f"matrix by its name in {place.kind}")


DETECTORS = (
    _lora,
    _gates,
    _attention,
    _experts,
    _convolution,
    _interleaved,
    _halves,
    _query_key_value,
    _gated,
    _weight,
    _bare,
)
"""The detectors of layouts, from the most specific to the least. The first that recognizes a parameter is right."""


def _view(place: Place, split: tuple[int, ...] = ()) -> View:
    return View(tuple(place.param.shape), transpose=stores_inputs_first(place.owner), split=split)


def _is_flat(place: Place) -> bool:
    """Return whether a weight is one matrix: of two dimensions, or that of a convolution of single pixels."""
    return place.param.ndim >= 2 and math.prod(place.param.shape[2:]) == 1


def _named(pattern: re.Pattern[str], place: Place) -> bool:
    return any(pattern.fullmatch(name) for name in place.last_names)
