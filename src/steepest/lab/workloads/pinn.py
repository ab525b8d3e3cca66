"""Differential equations as workloads: networks of two coordinates, trained until they satisfy an equation (PINNs)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from steepest.lab.workloads.problems import Problem, burgers, poisson
from steepest.lab.workloads.workload import Workload, scaled
from steepest.newton.residual import Residual


class Equation(Workload):
    """An equation, which a batch has whole: all its points, in each step. Weights are float64."""

    steps = 300
    suite_steps = 1200
    measure = "relative L2 error"
    define: ClassVar[Callable[[], Problem]]

    def __init__(self, *, scale: float = 1.0) -> None:
        problem = type(self).define()
        inputs, *hidden, outputs = problem.widths
        self.problem = replace(problem, widths=(inputs, *(scaled(width, scale) for width in hidden), outputs))

    @override
    def model(self) -> nn.Module:
        return self.problem.network()

    @override
    def batch(self, generator: torch.Generator) -> Any:
        return ()

    @override
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.problem.loss(model)

    @override
    def residuals(self, batch: Any) -> Sequence[Residual]:
        return self.problem.residuals

    @override
    def validation(self, model: nn.Module) -> float:
        return self.problem.error(model)

    @override
    def describe(self) -> dict[str, str]:
        count = sum(map(len, self.problem.residuals))
        numbers = [self.problem.points, self.problem.truth, *(data for r in self.problem.residuals for data in r.data)]
        rounded = torch.cat([(data * 1e9).round().flatten() for data in numbers])  # last bits differ between machines
        return {
            "equation": f"{count:,} points in each step; the error is taken at {len(self.problem.points):,} others",
            "sha256": hashlib.sha256(rounded.long().numpy().tobytes()).hexdigest(),
        }


class Poisson(Equation):
    """Poisson's equation on the unit square, 2-24-24-1: see `steepest.lab.workloads.problems`."""

    define = staticmethod(poisson)


class Burgers(Equation):
    """Burgers' equation with a steep front, 2-20-20-20-1: see `steepest.lab.workloads.problems`."""

    define = staticmethod(burgers)
