"""A recurrent network on the text of `stdlib`, which tests gates: four matrices that torch keeps in one parameter."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from steepest.lab.workloads.text import ALPHABET, Characters, load_text
from steepest.lab.workloads.workload import at_least_one, scaled


class Recurrent(Characters):
    """An embedding of width 32, an LSTM of width 96, and a linear head; options are the LSTM's width and its layers."""

    suite_steps = 600
    batch_size = 16
    held_out_windows = (2, 128)

    def __init__(self, *, scale: float = 1.0, width: int = 96, depth: int = 1) -> None:
        at_least_one(width=width, depth=depth)
        self.width, self.depth = scaled(width, scale), depth
        self.text = load_text()
        super().__init__(self.text.train, self.text.validation)

    @override
    def model(self) -> nn.Module:
        return LSTM(len(ALPHABET), self.width, self.depth)

    @override
    def describe(self) -> dict[str, str]:
        return self.text.describe()


class LSTM(nn.Module):
    """A recurrent network from symbols ``[b, t]`` to logits ``[b, t, vocabulary]``."""

    def __init__(self, vocabulary: int, width: int, depth: int, embedded: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedded)
        self.lstm = nn.LSTM(embedded, width, num_layers=depth, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return the logits of each next symbol."""
        states, _ = self.lstm(self.embedding(symbols))  # [b, t, width]
        logits: Tensor = self.head(states)
        return logits
