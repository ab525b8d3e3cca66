"""Optimizers that break clauses on state and groups that others edit: they remember what was there."""

from __future__ import annotations

from typing import Any

import torch
from mutants import Mutants
from torch import Tensor

MUTANTS = Mutants()
breaks = MUTANTS.breaks


class Remembers(torch.optim.SGD):
    """SGD that compares its state and groups with those after its last step, and does something about it."""

    def __init__(self, params: Any, **options: Any) -> None:
        self.forget()
        super().__init__(params, **{"lr": 1e-2, "momentum": 0.9} | options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget()

    def forget(self) -> None:
        self.known: dict[Tensor, dict[str, Any]] = {}
        self.order: list[Tensor] = []
        self.groups: dict[Tensor, int] = {}

    def step(self, closure: Any = None) -> Any:
        self.before()
        loss = super().step(closure)
        self.known = {p: dict(named) for p, named in self.state.items() if isinstance(p, Tensor)}
        self.order = list(self.param_groups[0]["params"])
        self.groups = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}
        return loss

    def before(self) -> None: ...


@breaks("copied_state")
class DistrustsStrangers(Remembers):
    def before(self) -> None:
        for p, named in self.known.items():
            if any(self.state[p].get(name, x) is not x for name, x in named.items()):
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)


@breaks("replaced_state")
class HasItsOwn(Remembers):
    def before(self) -> None:
        for p, named in self.known.items():
            self.state[p].update({name: x for name, x in named.items() if name in self.state[p]})


@breaks("cleared_state")
class PutsItBack(Remembers):
    def before(self) -> None:
        for p, named in self.known.items():
            self.state[p] = named | self.state[p]


@breaks("reordered_parameters")
class PairsByPlace(Remembers):
    def before(self) -> None:
        order = self.param_groups[0]["params"]
        if set(order) == set(self.order):
            self.state.update(dict(zip(order, [self.state[p] for p in self.order], strict=True)))


@breaks("moved_parameter")
class BeginsAnewInEachGroup(Remembers):
    def before(self) -> None:
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if self.groups.get(p, number) != number:
                    self.state[p].clear()


@breaks("foreign_entries")
class WantsItsOwnOnly(Remembers):
    def before(self) -> None:
        assert all(set(named) <= {"momentum_buffer"} for named in self.state.values()), "unknown state"


@breaks("foreign_entries")
class LoadsItsOwnOnly(Remembers):
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for named in self.state.values():
            for name in set(named) - {"momentum_buffer"} if isinstance(named, dict) else ():
                del named[name]
