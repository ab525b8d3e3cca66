"""Which modules of a model are attention, by types and names of projections, and which rows make which heads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from steepest.clipping.attention import Attention, Part
from steepest.curvature.layer import stores_inputs_first
from steepest.routing.layout import ATTENTION, INTERLEAVED, KV, QKV
from steepest.rule import number

QUERY = re.compile(r"q|wq|w_q|q_?(proj|lin|linear)|to_q|query|q_b_proj", re.IGNORECASE)
KEY = re.compile(r"k|wk|w_k|k_?(proj|lin|linear)|to_k|key", re.IGNORECASE)
NORM = re.compile(r"(q|k|qk|query|key)_?(layer)?norm\w*|norm_?(q|k|query|key)", re.IGNORECASE)
HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "heads", "n_local_heads")
SCALES = ("scaling", "softmax_scale", "scale")


def find(
    model: nn.Module, exact: bool, heads: int | None, scale: float | None, skip: Collection[str]
) -> Iterator[Attention]:
    """Yield the attention of a model; raise a ValueError with the name of what can't be clipped."""
    for name, module in model.named_modules():
        if name in skip:
            continue
        parts = _parts(name, module, heads)
        if parts is None:
            layers = [child for child in module.children() if isinstance(child, nn.Linear)]
            if len(layers) > 1 and ATTENTION.search(f"{name.rpartition('.')[2]} {type(module).__name__}"):
                raise ValueError(
                    f"{name}: {type(module).__name__} has no projections q and k by their names: {_skip(name)}"
                )
            continue
        for local, child in module.named_children():
            if NORM.fullmatch(local) and not isinstance(child, nn.Identity):
                raise ValueError(
                    f"{name}.{local} normalizes queries or keys, so scaling them has no effect: {_skip(name)}"
                )
        size = sum(part.size or part.stride for role, part in parts.items() if role[0] == "q")
        told = [float(x) for known in SCALES if number(x := getattr(module, known, None)) and x is not None]
        of_module = told[0] if told else size**-0.5
        batch_first = bool(getattr(module, "batch_first", True))
        yield Attention(name, of_module if scale is None else scale, parts, exact, batch_first)


def _parts(name: str, module: nn.Module, heads: int | None) -> dict[str, Part] | None:
    """Return the parts of an attention module, or None if it isn't one."""
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None:
            raise ValueError(f"{name}: bias_k is a key that no weight makes: {_skip(name)}")
        H, d = module.num_heads, module.head_dim
        if module.in_proj_weight is None:
            raise ValueError(f"{name}: kdim and vdim of its own, so weights and biases are apart: {_skip(name)}")
        return {
            role: Part(module, H, d, base, weight="in_proj_weight", bias="in_proj_bias")
            for role, base in (("q", 0), ("k", H * d))
        }
    children = dict(module.named_children())
    if "kv_b_proj" in children and hasattr(module, "qk_nope_head_dim"):
        return _latent(name, module, children, heads)
    query, key = ([c for n, c in children.items() if kind.fullmatch(n)] for kind in (QUERY, KEY))
    fused, shared = ([c for n, c in children.items() if kind.fullmatch(n)] for kind in (QKV, KV))
    if any(INTERLEAVED.fullmatch(n) for n in children):
        raise ValueError(f"{name}: q, k and v are interleaved by head, which isn't supported: {_skip(name)}")
    if not (query and (key or shared)) and not fused:
        return None
    owner = query[0] if query else fused[0]
    H = _heads(name, module, heads)
    rows, columns = _shape(name, owner)
    d = rows // H if query else int(getattr(module, "head_dim", columns // H))
    if query:
        other = key[0] if key else shared[0]
        k_rows = _shape(name, other)[0] // (1 if key else 2)
        base = 0
    else:
        other, k_rows, base = owner, (rows - H * d) // 2, H * d
    if d < 1 or H * d + 2 * k_rows * (not query) != rows or k_rows % d or k_rows < d or H % (k_rows // d):
        raise ValueError(
            f"{name}: {rows} rows of queries and {k_rows} of keys aren't {H} heads: give heads=, or {_skip(name)}"
        )
    return {"q": Part(owner, H, d), "k": Part(other, k_rows // d, d, base)}


def _latent(name: str, module: nn.Module, children: Mapping[str, nn.Module], heads: int | None) -> dict[str, Part]:
    """Return the parts of latent attention, as DeepSeek names them."""
    H = _heads(name, module, heads)
    sizes = (getattr(module, n) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    nope, rope, value, rank = (int(size) for size in sizes)
    q = children.get("q_b_proj", children.get("q_proj"))
    known = q is not None and "kv_a_proj_with_mqa" in children
    expected = {"q": H * (nope + rope), "kv_b_proj": H * (nope + value), "kv_a_proj_with_mqa": rank + rope}
    owners = {"q": q, **children}
    if not known or any(_shape(name, owner)[0] != rows for n, rows in expected.items() if (owner := owners[n])):
        raise ValueError(f"{name}: latent attention without the projections that are known: {_skip(name)}")
    assert q is not None
    return {
        "q": Part(q, H, nope + rope, size=nope),
        "k": Part(children["kv_b_proj"], H, nope + value, size=nope),
        "q_rotary": Part(q, H, nope + rope, offset=nope, size=rope),
        "k_rotary": Part(children["kv_a_proj_with_mqa"], 1, rope, base=rank),
    }


def _shape(name: str, owner: nn.Module) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a projection."""
    W = owner._parameters.get("weight")
    if W is None or W.dim() != 2:
        raise ValueError(
            f"{name}: {type(owner).__name__} holds no weight of its own (LoRA, a parametrization): {_skip(name)}"
        )
    return (W.shape[1], W.shape[0]) if stores_inputs_first(owner) else (W.shape[0], W.shape[1])


def _heads(name: str, module: nn.Module, heads: int | None) -> int:
    """Return the number of query heads."""
    if heads is not None:
        return heads
    for holder in (module, getattr(module, "config", None)):
        for known in HEADS:
            if isinstance(count := getattr(holder, known, None), int):
                return count
    raise ValueError(f"{name}: {type(module).__name__} doesn't tell its number of heads: give heads=")


def _skip(name: str) -> str:
    return f"leave it out by skip=[{name!r}]"
