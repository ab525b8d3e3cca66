"""The matrices that ``steepest bench`` steps: the hidden ones of a model, as shapes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial

from steepest.lab.plan.models import PRESETS, Architecture, Shapes, gpt2
from steepest.lab.shared.errors import BadInput


def moe(layers: int, d: int = 512, experts: int = 16, hidden: int = 1024) -> Shapes:
    """Yield a mixture of experts of two matrices each, with one projection for queries, keys and values."""
    for i in range(layers):
        yield f"layers.{i}.attn", (3 * d, d), True
        yield f"layers.{i}.proj", (d, d), True
        for _ in range(experts):
            yield f"layers.{i}.expert_up", (hidden, d), True
            yield f"layers.{i}.expert_down", (d, hidden), True


MODELS = {
    "gpt-tiny": Architecture("two layers of a GPT of width 256", 2, partial(gpt2, d=256)),
    "gpt2-124m": PRESETS["124m"],
    "llama-1b": PRESETS["1b"],
    "moe": Architecture("16 experts in each of 8 layers, width 512", 8, moe),
}
"""The models by name."""


@dataclass(frozen=True)
class ShapeSet:
    """The hidden matrices of a model, perhaps of some of its layers."""

    name: str
    about: str
    shapes: Counter[tuple[str, int, int]]
    """The number of matrices by role, rows and columns."""
    layers: int
    of_layers: int
    """The number of layers of the whole model."""

    def __str__(self) -> str:
        """Return the set in one line.

        >>> print(shape_set("gpt2-124m", depth=2))
        gpt2-124m, 2 of 12 layers: 2 × 2304×768, 2 × 768×768, 2 × 3072×768, 2 × 768×3072; 14.2M entries
        """
        layers = f"{self.layers} of {self.of_layers}" if self.layers < self.of_layers else str(self.layers)
        parts = ", ".join(f"{count} × {m}×{n}" for (_, m, n), count in self.shapes.items())
        return f"{self.name}, {layers} layers: {parts}; {self.entries / 1e6:.1f}M entries"

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The shape of every matrix."""
        return [(m, n) for _, m, n in self.shapes.elements()]

    @property
    def longest(self) -> int:
        """The longest side of any matrix."""
        return max(map(max, self.matrices))

    @property
    def entries(self) -> int:
        """The number of entries of all matrices."""
        return sum(m * n for m, n in self.matrices)


def shape_set(name: str, depth: int | None = None) -> ShapeSet:
    """Return the matrices of a model in `MODELS`, cut to ``depth`` layers if it has more.

    Raises:
        BadInput: if no model has that name, or ``depth`` is less than 1.

    >>> shape_set("gpt-tiny").shapes["attn", 768, 256]
    2
    """
    if name not in MODELS:
        raise BadInput(f"--shapes {name}: there are {', '.join(MODELS)}")
    if depth is not None and depth < 1:
        raise BadInput(f"--depth {depth}: must be at least 1, a number of layers")
    model = MODELS[name]
    layers = min(depth or model.layers, model.layers)
    roles: Counter[tuple[str, int, int]] = Counter()
    for path, shape, hidden in model.shapes(layers):
        if hidden:
            m, n = shape
            roles[path.rpartition(".")[2], m, n] += 1
    return ShapeSet(name, model.source, roles, layers, model.layers)
