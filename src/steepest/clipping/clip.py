"""QK-clip for a model: `QKClip` listens to its attention, and scales heads after a step."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steepest.clipping.finding import find
from steepest.clipping.hooks import listen
from steepest.exchange.shards import is_dtensor
from steepest.rule import number

ROTARY = re.compile(r"rotary|rope", re.IGNORECASE)


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
        self.attention = {found.name: found for found in find(model, exact, heads, scale, skip)}
        if not self.attention:
            raise ValueError(f"{type(model).__name__} has no attention that is recognized by its names, to be clipped")
        modules = dict(model.named_modules())
        self._handles = [handle for found in self.attention.values() for handle in listen(found, modules[found.name])]

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
