"""A training run: parameters, their optimizer, and steps in which nothing is left to chance."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.testing.draws import seed
from steepest.testing.evidence import Snapshot, expect_moved, snapshot
from steepest.testing.sources import Batch, Source


class Run:
    """Some parameters, their optimizer, and steps with gradients that depend on step and name only."""

    def __init__(self, params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, source: Source) -> None:
        self.params, self.optimizer, self.source = dict(params), optimizer, source
        self.dtype = next(iter(self.params.values())).dtype
        self.batch = Batch()
        """What the present gradients were made from."""

    def set_gradients(
        self,
        k: int,
        missing: Collection[str] = (),
        scale: float = 1.0,
        poison: Mapping[str, float] | None = None,
        convert: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Give every parameter the gradient of step ``k``, and None to those whose gradient is missing.

        ``poison`` maps parameters to a bad number that one entry of their gradient gets; ``convert`` is done to each.
        """
        self.batch = Batch(k, missing, scale, poison or {}, convert)
        self.source.set_gradients(self.params, self.batch, self.optimizer)

    def act(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call ``optimizer.step()`` with the gradients as they are, or with a closure if it requires one."""
        step: Any = self.optimizer.step
        closure = closure or self.closure
        return step() if closure is None else step(closure)

    @property
    def closure(self) -> Callable[[], Any] | None:
        """The closure that a step with the present gradients gets, if it requires one."""
        return self.source.closure(self.params, self.batch)

    def loss(self) -> float:
        """Return the loss of the present batch."""
        return float(self.source.loss(self.params, self.batch).detach())

    def step(
        self, k: int, missing: Collection[str] = (), poison: Mapping[str, float] | None = None, scale: float = 1.0
    ) -> None:
        """Take step ``k``."""
        self.set_gradients(k, missing, scale, poison)
        seed(k)  # so that runs compare even if steps draw random numbers, which another clause is about
        self.act()

    def steps(self, ks: Iterable[int]) -> None:
        """Take some steps. In step 1 the second matrix has no gradient, so that step counts differ from then on."""
        for k in ks:
            self.step(k, missing=["second.weight"] if k == 1 else [])

    def expect_training(self, ks: Iterable[int], promise: str) -> None:
        """Take some steps, and raise `Broken` unless every parameter moves, to finite values."""
        before = self.weights()
        self.steps(ks)
        expect_moved(self.weights(), before, promise)

    def set(self, option: str, value: Any) -> None:
        """Write an option into every group that has it, as a scheduler would."""
        for group in self.optimizer.param_groups:
            if isinstance(group.get(option), Tensor):
                group[option].fill_(value)
            elif option in group:
                group[option] = value

    def weights(self, *names: str) -> Snapshot:
        """Return a copy of the parameters of these names, by default of all."""
        return snapshot({name: self.params[name] for name in names or self.params})

    def everything(self, *names: str) -> Snapshot:
        """Return a copy of the weights and state of these parameters, by default of all."""
        state = {name: self.optimizer.state.get(self.params[name], {}) for name in names or self.params}
        return snapshot({"weight of": self.weights(*names), "state of": state})
