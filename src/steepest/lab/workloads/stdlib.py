"""The default workload: a character-level GPT on the source text of Python's own standard library."""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.fingerprints import code_hash, digest
from steepest.lab.workloads import gpt, text
from steepest.lab.workloads.workload import Workload

CONTEXT = 64
BATCH = 32
VALIDATION = (4, 128)  # fixed batches, windows in each

Windows = tuple[Tensor, Tensor]
"""Symbols ``[b, t]``, and for each the one that follows."""


class StandardLibrary(Workload):
    """115,008 parameters, 98,304 of them in hidden matrices; batches of 32 windows of 64 characters."""

    measure = "validation loss (nats per character)"

    def __init__(self) -> None:
        self.text = text.load()
        if not len(self.text.train) or not len(self.text.validation):
            raise BadInput("this Python comes without the source of its standard library: race on another workload")
        fixed = torch.Generator().manual_seed(0)
        batches, windows = VALIDATION
        self.held_out = [cut(self.text.validation, windows, fixed) for _ in range(batches)]

    @override
    def model(self) -> nn.Module:
        return gpt.GPT(len(text.ALPHABET), CONTEXT)

    @override
    def batch(self, generator: torch.Generator) -> Windows:
        return cut(self.text.train, BATCH, generator)

    @override
    def loss(self, model: nn.Module, batch: Windows) -> Tensor:
        symbols, following = batch
        return F.cross_entropy(model(symbols).flatten(0, 1), following.flatten())

    @override
    def validation(self, model: nn.Module) -> float:
        return sum(self.loss(model, batch).item() for batch in self.held_out) / len(self.held_out)

    @override
    def fingerprint(self) -> str:
        return digest([super().fingerprint(), code_hash(gpt.__file__), self.text.sha256])

    @override
    def describe(self) -> dict[str, str]:
        facts = {
            "text": f"source of the standard library of Python {platform.python_version()}",
            "characters": f"{len(self.text.train):,} to train on, {len(self.text.validation):,} held out",
            "sha256": self.text.sha256,
        }
        return facts | ({"modules not found": " ".join(self.text.missing)} if self.text.missing else {})


def cut(symbols: Tensor, count: int, generator: torch.Generator) -> Windows:
    """``count`` windows from random places."""
    start = torch.randint(len(symbols) - CONTEXT, (count, 1), generator=generator)
    windows = symbols[start + torch.arange(CONTEXT + 1)]  # [count, CONTEXT + 1]
    return windows[:, :-1], windows[:, 1:]
