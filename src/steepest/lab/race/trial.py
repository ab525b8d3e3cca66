"""A trial, which is one run of one contender, and the record that it leaves."""

from __future__ import annotations

import ast
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from steepest.lab.shared.contenders import Contender


@dataclass(frozen=True)
class Trial:
    """One contender on one workload, for some steps, with one seed for initial weights and order of data."""

    workload: str
    contender: Contender
    steps: int
    seed: int
    poison: float = 0.0
    """Share of gradients that get NaN or infinite entries."""
    seconds: float = 0.0
    """Time of model and optimizer after which the trial ends; 0 where ``steps`` says when, which is 0 otherwise."""

    def __str__(self) -> str:
        poisoned = f", {self.poison:g} poisoned" if self.poison else ""
        return f"{self.contender}, {distance(self.steps, self.seconds)}, seed {self.seed}{poisoned}"

    @property
    def length(self) -> float:
        """The steps of the trial, or its seconds."""
        return self.seconds or self.steps

    def literal(self) -> str:
        """Return the trial as a Python literal, which unlike JSON distinguishes tuples from lists."""
        return repr(asdict(self))

    @classmethod
    def from_literal(cls, text: str) -> Trial:
        """Return the trial that `literal` has written."""
        values = ast.literal_eval(text)
        return cls(**values | {"contender": Contender(**values["contender"])})


@dataclass
class Record:
    """What happened in a trial. Each sample of a series is the step, counted from 1, and the values measured there."""

    status: Literal["finished", "diverged"] = "finished"
    train_loss: list[float] = field(default_factory=list)
    """Loss of each step on its own batch, before the update."""
    model_seconds: list[float] = field(default_factory=list)
    """Time of each step for batch, forward and backward; for the batch alone where the optimizer evaluates the loss."""
    optimizer_seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    parameters: int = 0
    state_bytes: int = 0
    peak_memory: int = 0
    """Bytes of the tensors that the optimizer holds at once: in its first step, or as its state at the end."""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """CPU time of the process of the trial, with all that it loads."""
    poisoned: int = 0
    """How many gradients were poisoned."""
    skipped: int | None = None
    """How many updates the optimizer has skipped because of bad gradients; None if it does not count them."""
    clock: str = ""
    """What the seconds of model and optimizer are: CPU time or, on an accelerator, elapsed time."""
    own_passes: bool = False
    """Whether the optimizer works during the model's passes or makes some itself, so that both times are its own."""

    @property
    def final(self) -> float:
        """The last validation loss; infinite if the run diverged."""
        return self.validation[-1][1] if self.status == "finished" else math.inf

    def as_json(self) -> dict[str, Any]:
        """Return plain values, rounded to six digits."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Run:
    """A trial that was run, with its record."""

    trial: Trial
    record: Record


def _rounded(value: Any) -> Any:
    """Round floats to six significant digits, inside lists too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def distance(steps: int, seconds: float) -> str:
    """Return the length of a trial in words.

    >>> distance(300, 0.0), distance(1, 0.0), distance(0, 12.0)
    ('300 steps', '1 step', '12 s')
    """
    return f"{seconds:g} s" if seconds else f"{steps} step{'' if steps == 1 else 's'}"


def loss(value: float) -> str:
    """Format a loss with four digits.

    >>> loss(1.62), loss(0.0012344), loss(1234.4)
    ('1.620', '0.001234', '1234')
    """
    return f"{value:#.4g}".rstrip(".")
