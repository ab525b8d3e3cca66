"""A trial, one contender's run, and the record that it leaves."""

from __future__ import annotations

import ast
import math
from dataclasses import asdict, dataclass, field
from statistics import fmean
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
    """Share of gradients that get entries that are not finite."""

    def __str__(self) -> str:
        poisoned = f", {self.poison:g} poisoned" if self.poison else ""
        return f"{self.contender}, {self.steps} steps, seed {self.seed}{poisoned}"

    def literal(self) -> str:
        """As a Python literal, which keeps tuples apart from lists."""
        return repr(asdict(self))

    @classmethod
    def from_literal(cls, text: str) -> Trial:
        """The trial that `literal` wrote down."""
        values = ast.literal_eval(text)
        return cls(**values | {"contender": Contender(**values["contender"])})


@dataclass
class Record:
    """What happened in a trial. Sampled series hold the step (from 1) first, then what was seen after it."""

    status: Literal["finished", "diverged"] = "finished"
    train_loss: list[float] = field(default_factory=list)
    """Each step's loss, on its own batch, before the step."""
    rate: list[float] = field(default_factory=list)
    """Each step's learning rate of the hidden matrices."""
    model_seconds: list[float] = field(default_factory=list)
    """Each step's time for batch, forward and backward."""
    optimizer_seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    update_rms: list[tuple[int, float, float]] = field(default_factory=list)
    """Root mean square of the hidden matrices' updates, divided by the learning rate: their median, their largest."""
    weight_spread: list[tuple[int, float]] = field(default_factory=list)
    """Largest over median singular value of the hidden matrices, in the median."""
    factor_condition: list[tuple[int, float]] = field(default_factory=list)
    """Median condition number of the optimizer's covariances, if it keeps any."""
    parameters: int = 0
    state_bytes: int = 0
    peak_memory: int = 0
    """Most memory that the process had resident, in bytes."""
    wall_seconds: float = 0.0
    poisoned: int = 0
    """How many gradients were given bad entries."""
    skipped: int | None = None
    """How many updates the optimizer says that bad gradients have cost; None if it doesn't say."""
    clock: str = ""
    """What the seconds of model and optimizer are: CPU time or, on an accelerator, elapsed time."""

    @property
    def final(self) -> float:
        """The last validation loss; infinite if the run diverged."""
        return self.validation[-1][1] if self.status == "finished" else math.inf

    @property
    def step_seconds(self) -> float:
        """Mean time of a step, model and optimizer."""
        return fmean(self.model_seconds) + fmean(self.optimizer_seconds)

    def as_json(self) -> dict[str, Any]:
        """Plain values, to six digits: more is noise."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Run:
    """A trial that was run."""

    trial: Trial
    record: Record


def _rounded(value: Any) -> Any:
    """Floats to six significant digits, inside lists too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
