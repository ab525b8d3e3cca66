"""Trainings whose updates are compiled, recorded, or neither, on the same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fed
import torch
from torch import Tensor, nn

from steepest.rule import Refreshing, Rule
from steepest.rules import RULES
from steepest.stack import graphs

STACKED = [name for name, rule in RULES.items() if issubclass(rule, Rule)]
DECOMPOSING = ["dion", "moso"]
"""The rules that decompose matrices in each step, which can't be recorded."""
OF_KFAC = {"settle": 0, "statistics_frequency": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"precondition_frequency": 3} if issubclass(RULES[name], Refreshing) else {}) for name in STACKED},
    **{name: (name, {"precondition_frequency": 3} | OF_KFAC) for name in fed.CAPTURING},
    "soap kl": ("soap", {"precondition_frequency": 3, "use_kl_shampoo": True, "fp32_matmul_prec": "high"}),
    "soap after": ("soap", {"precondition_frequency": 4, "basis_timing": "after", "adam_warmup_steps": 3}),
    "soap async": ("soap", {"precondition_frequency": 3, "refresh_async": True, "stagger": True}),
    "soap short": ("soap", {"precondition_frequency": 3, "basis_dtype": "bfloat16", "moment_dtype": "int8"}),
    "soap l2": ("soap", {"precondition_frequency": 3, "weight_decay_method": "l2"}),
    "shampoo kl": ("shampoo", {"precondition_frequency": 3, "use_kl_shampoo": True}),
    "normuon l2": ("normuon", {"weight_decay_method": "l2"}),
}
RECORDED = [name for name, (rule, _) in VARIANTS.items() if rule not in DECOMPOSING]


class Training:
    """A training of two stacks, and of a matrix that thaws; gradients are the same for all trainings."""

    def __init__(self, name: str, device: str = "cpu", **options: Any) -> None:
        rule, own = VARIANTS[name]
        generator = torch.Generator().manual_seed(0)
        shapes = [(6, 4), (6, 4), (6, 4), (3, 5), (2, 7)]
        self.params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
        self.params[-1].requires_grad_(False)
        self.optimizer = fed.optimizer(self.params, rule, **{"lr": 0.1} | own | options)
        self.number = 0

    def step(self, bad: int | None = None, missing: int | None = None) -> None:
        generator = torch.Generator().manual_seed(self.number)
        for i, p in enumerate(self.params):
            grad = torch.randn(p.shape, generator=generator).to(p.device)
            p.grad = None if i == missing or not p.requires_grad else grad
        if bad is not None:
            self.params[bad].grad[0, 0] = math.nan
        self.optimizer.step()
        self.number += 1

    def eventful(self, number: int) -> None:
        """Take one of 30 steps in which options change, and gradients are missing or not finite."""
        group = self.optimizer.param_groups[0]
        momentum = "momentum" if "momentum" in group else "shampoo_beta"
        if number == 9:
            self.params[-1].requires_grad_(True)
        if number == 14:
            group[momentum] = 0.5
        if number == 19:
            group["weight_decay"] = 0.0  # with "l2", there is no penalty from here on
        if number == 24:
            group["weight_decay"] = 0.3
        self.step(bad={5: 0, 12: 3, 17: 1}.get(number), missing={7: 1, 16: 3}.get(number))

    def seen(self) -> list[Tensor]:
        states = self.optimizer.state_dict()["state"]
        kept = [x.clone() for i in sorted(states) for _, x in sorted(states[i].items())]
        return [p.detach().clone() for p in self.params] + kept

    def recordings(self) -> list[graphs.Recording]:
        found = [stack.recorder.recording for stack in self.optimizer._stacks]
        return [one for one in found if one is not None]

    def spoil(self) -> None:
        """Fill the memory of all recordings with NaN, so that reading an old result is noticed."""
        for one in self.recordings():
            for x in one.inputs.tensors:
                x.fill_(math.nan if x.is_floating_point() else 0)
            for x in graphs._tensors(one.output):
                x.fill_(math.nan)


def expect_same(ours: Training, theirs: Training) -> None:
    for x, y in zip(ours.seen(), theirs.seen(), strict=True):
        assert torch.equal(x, y), f"otherwise after step {ours.number}"


class Backend:
    """A backend that runs graphs operation by operation, and notes their number, runs, and precisions of products."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0
        self.precisions: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        multiplies = any(word in str(node.target) for node in graph.graph.nodes for word in ("matmul", "bmm"))

        def run(*args: Any) -> Any:
            self.runs += 1
            if multiplies:
                self.precisions.add(torch.get_float32_matmul_precision())
            return graph.forward(*args)

        return run
