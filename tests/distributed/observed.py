"""Functions that the ranks run in tests of diagnostics and of QK-clip."""

from __future__ import annotations

import torch
import torch.distributed as dist
from models import inject, laid_out, optimizer, toy
from torch import nn

from steepest import QKClip
from steepest.exchange.shards import local


def told(layout: str, rule: str) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Return what is told here and in one process, and the entries on this rank of each rule's parameters."""
    one, many = toy(), laid_out(toy(), layout)
    here, there = optimizer(one, rule, weight_decay=0.0), optimizer(many, rule, weight_decay=0.0)
    for step in range(4):
        for model, opt in ((one, here), (many, there)):
            inject(model, step)
            opt.step()
        here.diagnostics()
        if step != 1 or dist.get_rank() == 0:  # one rank may ask alone
            there.diagnostics()
    entries: dict[str, int] = {}
    for group in there.param_groups:
        count = sum(local(p).numel() for p in group["params"])
        entries[group["rule"]] = entries.get(group["rule"], 0) + count
    return there.diagnostics(), here.diagnostics(), entries


def clipped() -> tuple[list[torch.Tensor], float]:
    """Clip where one rank has seen nothing; return the weights, and the largest logit here after it."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2)
    clip = QKClip(attention, tau=0.1)
    torch.manual_seed(dist.get_rank())
    x = 3.0 * torch.randn(5, 2, 8)
    logits = []
    for _ in range(2):
        if dist.get_rank() > 0:
            attention(x, x, x)
        logits.append(max(clip.largest().get("", [-torch.inf])))
        clip.step()
    return [p.detach() for p in attention.parameters()], logits[1]
