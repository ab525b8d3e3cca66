"""QK-clip: after a step, heads whose attention logits have grown too large have their queries and keys scaled down.

    S_h = max q·k · scale                       of head h, over what was trained on since the last clip
    γ_h = min(1, τ / S_h)
    W_q, W_k of the head ← γ_h^½ W_q, γ_h^½ W_k       grouped queries: γ of the group's largest logit, for all of it
    latent attention (MLA): γ^½ for the parts without positions, γ for W_q's rotary part; the shared key stays

Moonshot AI, "Kimi K2", arXiv:2507.20534, Section 2.1 (MuonClip), with τ = 100.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steepest.curvature.layer import stores_inputs_first
from steepest.exchange.shards import is_dtensor
from steepest.routing.layout import ATTENTION, INTERLEAVED, KV, QKV
from steepest.rule import number

QUERY = re.compile(r"q|wq|w_q|q_?(proj|lin|linear)|to_q|query|q_b_proj", re.IGNORECASE)
KEY = re.compile(r"k|wk|w_k|k_?(proj|lin|linear)|to_k|key", re.IGNORECASE)
NORM = re.compile(r"(q|k|qk|query|key)_?(layer)?norm\w*|norm_?(q|k|query|key)", re.IGNORECASE)
HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "heads", "n_local_heads")
SCALES = ("scaling", "softmax_scale", "scale")
ROTARY = re.compile(r"rotary|rope", re.IGNORECASE)
BLOCK = 2**24
"""The most logits that are computed at once."""


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one weight that make queries or keys: of each head's ``stride`` rows from ``base``, some."""

    owner: nn.Module
    heads: int
    stride: int
    base: int = 0
    offset: int = 0
    size: int = 0
    weight: str = "weight"
    bias: str = "bias"

    def of(self, y: Tensor, dim: int = -1) -> Tensor:
        """Return the part of ``y [..., rows]``, as a view ``[..., heads, size]``."""
        dim %= y.dim()
        heads = torch.unflatten(y.narrow(dim, self.base, self.heads * self.stride), dim, (self.heads, self.stride))
        return heads.narrow(dim + 1, self.offset, self.size or self.stride)

    def scale(self, factors: Tensor) -> None:
        """Multiply the rows of each head, and their biases, by its factor, ``[heads]``, in place."""
        W, b = getattr(self.owner, self.weight), getattr(self.owner, self.bias, None)
        W = W.mT if stores_inputs_first(self.owner) else W
        self.of(W, 0).mul_(factors.to(W.device, W.dtype).view(-1, 1, 1))
        if b is not None:
            self.of(b, 0).mul_(factors.to(b.device, b.dtype).view(-1, 1))


@dataclass(eq=False)
class Attention:
    """An attention module, its parts, and the largest logits that were seen."""

    name: str
    scale: float
    parts: Mapping[str, Part]
    """"q" and "k", and with latent attention "q_rotary" and "k_rotary", whose logits are added."""
    exact: bool
    batch_first: bool = True
    seen: Tensor | None = None
    """``[heads]``."""
    waiting: dict[str, Tensor] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Return the number of query heads."""
        return self.parts["q"].heads

    def hear(self, role: str, y: Tensor) -> None:
        """Take in what a projection has made, ``[batch, tokens, rows]``, and look at the logits once all have."""
        y = y.detach() if self.batch_first or y.dim() < 3 else y.detach().transpose(0, 1)
        self.waiting[role] = self.parts[role].of(y.flatten(0, -3) if y.dim() > 2 else y[None]).movedim(-2, 1)
        if len(self.waiting) == len(self.parts):  # each [batch, heads, tokens, size]
            waiting, self.waiting = self.waiting, {}
            logits = _logits(waiting["q"], waiting["k"], self.exact)
            if "q_rotary" in waiting:  # a rotation keeps norms
                logits = logits + _logits(waiting["q_rotary"], waiting["k_rotary"], exact=False)
            self.report(logits * self.scale)

    def report(self, logits: Tensor) -> None:
        """Take in largest logits, ``[heads]``."""
        logits = logits.detach().float()
        self.seen = logits if self.seen is None else torch.maximum(self.seen, logits.to(self.seen.device))

    def clip(self, S: Tensor, tau: float) -> None:
        """Scale the heads whose largest logit ``S [heads]`` is above ``tau``; one that is not finite tells nothing."""
        γ = torch.where(S.isfinite() & (tau < S), tau / S, 1.0)
        groups = self.parts["k"].heads
        γ_k = γ.view(groups, -1).amin(dim=-1)
        γ_q = γ_k.repeat_interleave(self.heads // groups)
        self.parts["q"].scale(γ_q.sqrt())
        self.parts["k"].scale(γ_k.sqrt())
        if "q_rotary" in self.parts:
            self.parts["q_rotary"].scale(γ_q)


def _logits(q: Tensor, k: Tensor, exact: bool) -> Tensor:
    """Return the largest product of a query and a key of each head, ``[heads]``, or a bound by their norms."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if not exact:
        q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(dim=-1) for x in (q, k))
        bound: Tensor = (q_norm * k_norm).amax(dim=0)
        return bound
    (batch, heads, tokens, _), keys = q.shape, k.shape[2]
    rows = max(1, BLOCK // max(batch * heads * keys, 1))
    found = [(q[:, :, i : i + rows] @ k.mT).amax(dim=(0, 2, 3)) for i in range(0, tokens, rows)]
    largest: Tensor = torch.stack(found).amax(dim=0)
    return largest


class QKClip:
    """QK-clip for all attention of a model: keeps attention logits from growing, as Muon lets them in large models.

    Call `step` after each ``optimizer.step()``. In training passes, hooks on the projections of queries and keys note
    each head's largest logit; `step` scales the rows of heads that have exceeded ``tau``, and their biases. Nothing
    waits for a device. Between ranks the largest logit of all counts, so every rank must call `step`.

    Args:
        model: A model with `torch.nn.MultiheadAttention`, or modules that hold ``q_proj`` and ``k_proj``, a fused
            ``qkv``, or ``q_b_proj`` (or ``q_proj``) and ``kv_b_proj`` of latent attention, under one of their usual
            names. Key heads are shared by consecutive query heads.
        tau: The largest logit that is left alone. 100 (default) is Kimi K2's.
        logits: "products" computes q·k of all pairs of tokens, masked ones too, without positions. "norms" takes the
            bound ‖q‖ ‖k‖ instead: it costs next to nothing and holds with rotary positions, which keep norms, but
            clips earlier. "auto" (default) takes "norms" where the model has something rotary, else "products".
        heads: The number of query heads, where modules don't tell (as ``num_heads``, say).
        scale: What attention multiplies q·k by, where modules don't tell. 1/√(head dimension) by default.
        skip: Names of attention modules that are left out.

    Raises:
        ValueError: If the model has no attention, or some that isn't recognized or can't be scaled; with its name.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> clip = QKClip(attention, tau=1.0)
        >>> x = 10 * torch.ones(5, 1, 8)
        >>> _ = attention(x, x, x)
        >>> clip.step()
        >>> _ = attention(x, x, x)
        >>> all(logit <= 1.001 for logit in clip.largest()[""])
        True
        >>> clip.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        tau: float = 100.0,
        *,
        logits: str = "auto",
        heads: int | None = None,
        scale: float | None = None,
        skip: Collection[str] = (),
    ) -> None:
        if not number(tau) or not 0 < tau < float("inf"):
            raise ValueError(f"tau={tau!r}: must be a finite number > 0")
        if logits not in ("auto", "products", "norms"):
            raise ValueError(f"logits={logits!r}: must be one of auto, products, norms")
        rotates = any(ROTARY.search(f"{name} {type(m).__name__}") for name, m in model.named_modules())
        exact = logits == "products" or (logits == "auto" and not rotates)
        self.tau = float(tau)
        self.attention = {found.name: found for found in _find(model, exact, heads, scale, skip)}
        if not self.attention:
            raise ValueError(f"{type(model).__name__} has no attention that is recognized by its names, to be clipped")
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        for name, found in self.attention.items():
            if isinstance(module := modules[name], nn.MultiheadAttention):
                self._handles.append(module.register_forward_pre_hook(_Inputs(found, module), with_kwargs=True))
                continue
            for role, part in found.parts.items():
                self._handles.append(part.owner.register_forward_hook(_Outputs(found, role, part.owner)))

    @torch.no_grad()
    def step(self) -> None:
        """Scale the heads whose logits have exceeded ``tau`` since the last call, and forget what was seen."""
        found = list(self.attention.values())
        for attention in found:
            for part in attention.parts.values():
                if is_dtensor(getattr(part.owner, part.weight)):
                    raise ValueError(
                        f"{attention.name}: sharded weights (DTensor) can't be clipped yet: leave QK-clip out"
                    )
        device = next((a.seen.device for a in found if a.seen is not None), torch.device("cpu"))
        none = [torch.full((a.heads,), -torch.inf, device=device) for a in found]
        S = torch.cat([x if a.seen is None else a.seen.to(device) for a, x in zip(found, none, strict=True)])
        if dist.is_available() and dist.is_initialized():
            device = next(iter(found[0].parts["q"].owner.parameters())).device  # where ranks' backend communicates
            S = S.to(device)
            dist.all_reduce(S, dist.ReduceOp.MAX)
        for attention, logits in zip(found, torch.split(S, [a.heads for a in found]), strict=True):
            attention.clip(logits, self.tau)
            attention.seen = None
            attention.waiting.clear()

    def report(self, name: str, logits: Tensor) -> None:
        """Take in the largest logits of a module's heads, ``[heads]``, where its own kernel knows them."""
        self.attention[name].report(logits)

    def largest(self) -> dict[str, list[float]]:
        """Return the largest logits of each module's heads since the last `step`, for a log; waits for the device."""
        return {name: found.seen.tolist() for name, found in self.attention.items() if found.seen is not None}

    def detach(self) -> None:
        """Remove all hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def qk_clip(model: nn.Module, tau: float = 100.0, **options: Any) -> QKClip:
    """Return a `QKClip` of a model, whose ``step()`` follows each step of the optimizer.

    Args:
        model: as in `QKClip`.
        tau: likewise.
        options: its further arguments.

    Raises:
        ValueError: likewise.

    Example:
        >>> sorted(qk_clip(nn.TransformerEncoderLayer(8, 2)).attention)
        ['self_attn']
    """
    return QKClip(model, tau, **options)


# Hooks. Those of a copied or unpickled module do nothing.


class _Hook:
    def __init__(self, attention: Attention, owner: nn.Module) -> None:
        self.attention, self.owner = attention, owner

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()

    def hears(self, module: nn.Module) -> bool:
        return module is self.owner and module.training and torch.is_grad_enabled()


class _Nothing:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


class _Outputs(_Hook):
    def __init__(self, attention: Attention, role: str, owner: nn.Module) -> None:
        super().__init__(attention, owner)
        self.role = role

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.hears(module):
            with torch.no_grad():
                self.attention.hear(self.role, output)


class _Inputs(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        if self.hears(module):
            assert isinstance(module, nn.MultiheadAttention)
            x = dict(zip(("query", "key"), args[:2], strict=False)) | dict(kwargs)
            with torch.no_grad():
                rows, b = 2 * module.embed_dim, module.in_proj_bias  # those of values are left out
                makes = partial(
                    nn.functional.linear, weight=module.in_proj_weight[:rows], bias=b if b is None else b[:rows]
                )
                made = makes(x["query"])
                self.attention.hear("q", made)
                self.attention.hear("k", made if x["key"] is x["query"] else makes(x["key"]))


# Recognition.


def _find(
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
