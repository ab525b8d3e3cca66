"""The default workload: a character-level GPT on text that every Python has, the source of its standard library."""

from __future__ import annotations

from torch import nn
from typing_extensions import override

from steepest.lab.workloads.gpt import GPT
from steepest.lab.workloads.text import ALPHABET, CONTEXT, Characters, load_text
from steepest.lab.workloads.workload import at_least_one, scaled


class StandardLibrary(Characters):
    """A GPT of 115,008 parameters, 98,304 of them in hidden matrices; batches are 32 windows of 64 characters.

    Its options are the width of the residual stream, the number of blocks, and the number of heads in each.
    """

    suite_steps = 120

    def __init__(self, *, scale: float = 1.0, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        at_least_one(width=width, depth=depth, heads=heads)
        self.width, self.depth, self.heads = scaled(width, scale, multiple=heads), depth, heads
        self.text = load_text()
        super().__init__(self.text.train, self.text.validation)

    @override
    def model(self) -> nn.Module:
        return GPT(len(ALPHABET), CONTEXT, self.width, self.heads, self.depth)

    @override
    def describe(self) -> dict[str, str]:
        return self.text.describe()
