"""Attention as rows of weights that make queries and keys: the largest logits of its heads, and their scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from steepest.curvature.layer import stores_inputs_first

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
