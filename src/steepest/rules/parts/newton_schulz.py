"""What rules share that orthogonalize by Newton-Schulz iterations: by which table, and computed in what."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steepest.linalg.polar import TABLES, iteration_dtype, multiplies_float16, polar_factor
from steepest.linalg.stopwatch import bfloat16_pays
from steepest.rule import Rule, Step, at_least, check, one_of
from steepest.rule.words import Polar, PolarDtype


@dataclass(frozen=True, kw_only=True)
class NewtonSchulz(Rule, ABC):
    """The options of `steepest.linalg.polar.polar_factor`, and what a parameter group makes of them."""

    ns: Polar = one_of(Polar, "keller")
    ns_dtype: PolarDtype = one_of(PolarDtype, "auto")
    eps: float = at_least(0, 1e-7)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ns_dtype in ("bfloat16", "float16"):
            check(survives_half(self.ns), "ns_dtype", self.ns_dtype, f"'float32' or 'auto' with ns={self.ns!r}")

    @classmethod
    def settled(cls, group: Mapping[str, Any], agreed: Callable[[bool], bool]) -> dict[str, Any]:
        """``ns_dtype="auto"`` as one of the other words: what is measured goes into the group and every checkpoint.

        So a run that is resumed, here or elsewhere, computes as it did before, and ranks on unlike machines compute
        alike: in 16 bits only if that pays on all.
        """
        devices = {p.device for p in group["params"]}
        if group["ns_dtype"] != "auto" or any(device.type == "meta" for device in devices):
            return {}
        half = survives_half(group["ns"])
        if agreed(half and all(map(multiplies_float16, devices))):
            return {"ns_dtype": "float16"}
        return {"ns_dtype": "bfloat16" if agreed(half and all(map(bfloat16_pays, devices))) else "float32"}

    def polar(self, M: Tensor, step: Step, scale: float = 1.0) -> Tensor:
        """``scale`` times the polar factor of ``M [B, m, n]`` by the options' table; zero where "exact" finds none."""
        O = polar_factor(M, self.ns, eps=self.eps, dtype=iteration_dtype(M, self.ns_dtype), scale=scale)
        return step.found(O, 0.0) if self.ns == "exact" else O


def survives_half(method: str) -> bool:
    """Whether ``method`` may run in bfloat16 and float16.

    >>> survives_half("keller"), survives_half("cans"), survives_half("exact")
    (True, False, False)
    """
    return method in TABLES and TABLES[method].half
