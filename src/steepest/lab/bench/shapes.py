"""Which matrices ``steepest bench`` steps: the hidden ones of a model, as shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from steepest.lab.plan.models import GPT2, PRESETS, Llama
from steepest.lab.shared.errors import BadInput


@dataclass(frozen=True)
class Moe:
    """Queries, keys and values in one projection, and experts of two layers each, every matrix by itself."""

    width: int = 512
    layers: int = 8
    experts: int = 16
    hidden: int = 1024
    """Of an expert."""

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Name, shape, and whether it is a hidden matrix."""
        d = self.width
        for i in range(self.layers):
            yield f"layers.{i}.attn", (3 * d, d), True
            yield f"layers.{i}.proj", (d, d), True
            for _ in range(self.experts):
                yield f"layers.{i}.expert_up", (self.hidden, d), True
                yield f"layers.{i}.expert_down", (d, self.hidden), True


MODELS: Mapping[str, tuple[str, GPT2 | Llama | Moe]] = {
    "gpt-tiny": ("two layers of a GPT of width 256", GPT2(width=256, layers=2)),
    "gpt2-124m": PRESETS["124m"],
    "llama-1b": PRESETS["1b"],
    "moe": ("16 experts in each of 8 layers, width 512", Moe()),
}
"""Sets by name: what they are, and the model."""


@dataclass(frozen=True)
class Shape:
    """Matrices of one role and shape."""

    name: str
    m: int
    n: int
    count: int


@dataclass(frozen=True)
class ShapeSet:
    """The hidden matrices of a model."""

    name: str
    about: str
    shapes: tuple[Shape, ...]
    layers: int
    """That are in it."""
    of_layers: int
    """That the model has."""

    def __str__(self) -> str:
        """For people.

        >>> print(shape_set("gpt2-124m", depth=2))
        gpt2-124m, 2 of 12 layers: 2 × 2304×768, 2 × 768×768, 2 × 3072×768, 2 × 768×3072; 14.2M entries
        """
        layers = f"{self.layers} of {self.of_layers}" if self.layers < self.of_layers else str(self.layers)
        parts = ", ".join(f"{shape.count} × {shape.m}×{shape.n}" for shape in self.shapes)
        return f"{self.name}, {layers} layers: {parts}; {self.entries / 1e6:.1f}M entries"

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Every one of them."""
        return [(shape.m, shape.n) for shape in self.shapes for _ in range(shape.count)]

    @property
    def entries(self) -> int:
        """Of all matrices."""
        return sum(m * n for m, n in self.matrices)


def shape_set(name: str, depth: int | None = None) -> ShapeSet:
    """A set by name, cut to ``depth`` layers if it has more.

    Raises:
        BadInput: if there is none of that name, or ``depth`` is no number of layers.

    >>> [(shape.name, shape.m, shape.n, shape.count) for shape in shape_set("gpt-tiny").shapes]
    [('attn', 768, 256, 2), ('proj', 256, 256, 2), ('fc', 1024, 256, 2), ('out', 256, 1024, 2)]
    """
    if name not in MODELS:
        raise BadInput(f"--shapes {name}: there are {', '.join(MODELS)}")
    if depth is not None and depth < 1:
        raise BadInput(f"--depth {depth}: must be at least 1, a number of layers")
    about, model = MODELS[name]
    layers = min(depth or model.layers, model.layers)
    roles: Counter[tuple[str, int, int]] = Counter()
    for full_name, shape, hidden in replace(model, layers=layers).shapes():
        if hidden:
            m, n = shape
            roles[full_name.rpartition(".")[2], m, n] += 1
    shapes = tuple(Shape(*role, count) for role, count in roles.items())
    return ShapeSet(name, about, shapes, layers, model.layers)
