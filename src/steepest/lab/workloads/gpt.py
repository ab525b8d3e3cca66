"""A small GPT: blocks with RMSNorm first, separate query, key, value and output matrices, and an untied head.

The matrices are separate because a matrix optimizer takes each parameter as one linear map.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Self-attention, then a perceptron four times as wide; both add to the residual stream ``x [b, t, d]``."""

    def __init__(self, d: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention, self.norm_mlp = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream ``[b, t, d]`` after the block."""
        x = x + self.attend(self.norm_attention(x))
        x = x + self.down(F.gelu(self.up(self.norm_mlp(x))))
        return x

    def attend(self, x: Tensor) -> Tensor:
        """Return the attention of each position to itself and those before it; to all if it is not causal."""
        q, k, v = (split(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for split in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [b, heads, t, d / heads]
        attended: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return attended


class GPT(nn.Module):
    """A transformer from symbols ``[b, t]`` to logits ``[b, t, vocabulary]``."""

    def __init__(self, vocabulary: int, context: int, d: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.position = nn.Embedding(context, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        for table in (self.embedding, self.position):  # torch's scale of 1 would outweigh the blocks at first
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return the logits of each next symbol."""
        x = self.embedding(symbols) + self.position.weight[: symbols.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
