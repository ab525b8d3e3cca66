"""What a rule is: it turns a stack of gradients into a stack of directions, and changes its own state, nothing else.

A rule knows no parameter, no device, no rank and no learning rate. The engine (`steepest.engine.optimizer`) gathers
gradients of one shape into a stack ``G [B, m, n]``, asks the rule for directions ``D [B, m, n]`` and moves the weights:
``W -= lr · D``, with weight decay around it. There are two kinds:

* `Rule`, for stacks of matrices: SOAP, Muon, Shampoo, ... One file each in `steepest.rules`.
* `Elementwise`, for lists of parameters of any shape, served by torch.optim's own fused functions.

Both are frozen dataclasses of plain options (numbers and strings), because options live in the optimizer's parameter
groups, where schedulers and people read and write them; the engine rebuilds the rule from its group at every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.linalg.attempts import succeeded
from steepest.rule.options import Options

"""A rule's memory of one stack: every tensor's leading dimension is the stack's ``B``."""

State = dict[str, Tensor]
"""A rule's memory of one stack: every tensor's leading dimension is the stack's ``B``."""

Slots = slice | Tensor
"""Which matrices of a stack: a slice, or a tensor of indices."""


@dataclass(frozen=True)
class Step:
    """What the engine tells a rule about one step of one stack."""

    t: Tensor
    """``[B, 1, 1]``: how many updates each matrix has had, this one included; for bias corrections."""
    stage: str = "steady"
    """Where in its life the stack is, in the words of the rule's own `Rule.stage`; the same for all its slots."""
    refresh: Slots | None = None
    """The slots whose slow part (a basis, an inverse root) is due, or None."""
    penalty: Tensor | None = None
    """``[B, m, n]``: weight decay as a gradient (method "l2"), which moments see and covariances don't."""
    failures: Tensor | None = None
    """``[B]``: counts, matrix by matrix, decompositions that every solver failed at; the rule adds to it in place."""

    def found(self, new: Tensor, old: Tensor | float, slots: Slots = slice(None)) -> Tensor:
        """What a decomposition gave for these slots, ``[b, m, n]``, and ``old`` where that is NaN, which is counted."""
        good = succeeded(new)  # [b]
        if self.failures is not None:
            self.failures[slots] += ~good
        return torch.where(good.view(-1, 1, 1), new, old)


@dataclass(frozen=True)
class LowRank:
    """Directions of rank r as ``left rightᵀ``. Where they travel, the factors go instead wherever they are fewer bytes.

    >>> LowRank(torch.ones(1, 2, 1), torch.tensor([[[1.0], [2.0]]])).product()
    tensor([[[1., 2.],
             [1., 2.]]])
    """

    left: Tensor
    """``[B, m, r]``."""
    right: Tensor
    """``[B, n, r]``."""

    def product(self) -> Tensor:
        """The directions, ``[B, m, n]``."""
        return self.left @ self.right.mT


def whole(directions: Tensor | LowRank) -> Tensor:
    """Directions ``[B, m, n]``, multiplied out if they come in factors."""
    return directions.product() if isinstance(directions, LowRank) else directions


class Rule(Options, ABC):
    """A rule for stacks of matrices. Subclasses are final, frozen and keyword-only dataclasses."""

    @abstractmethod
    def init(self, G: Tensor) -> State:
        """Fresh state for a stack shaped and typed like ``G [B, m, n]``; it may stand on the meta device.

        Every tensor has leading dimension B. ``step`` and ``clock`` are the engine's, not the rule's.
        """

    @abstractmethod
    def update(self, G: Tensor, state: State, step: Step) -> Tensor | LowRank | None:
        """Learn from ``G [B, m, n]``, in place in ``state``; return the directions ``[B, m, n]``, or None to stay.

        ``G`` is the rule's to read, not to write. Nothing here waits for the device or draws random numbers.
        """

    def defers(self, step: Step) -> bool:
        """Whether ``update`` has left something of this step for `finish`."""
        return False

    def finish(self, state: State, step: Step) -> None:
        """Do what ``update`` has left, in place in ``state``, after the weights have moved.

        On an accelerator it runs beside whatever comes until the next step, on a stream of its own.
        """

    @property
    def decay_follows(self) -> bool:
        """Whether weights decay after the step, not before it."""
        return False

    def stage(self, clock: int) -> str:
        """The stage of a matrix that has had ``clock`` updates. Slots in different stages are updated apart."""
        return "steady"

    def due(self, clock: int, phase: int) -> bool:
        """Whether a matrix that has had ``clock`` updates refreshes now; ``phase`` in [0, period) staggers it."""
        return False

    def period(self, clock: int) -> int:
        """Steps from one refresh to the next, at this clock; 1 where a rule has no slow part."""
        return 1

    def refresh_cost(self, m: int, n: int) -> float:
        """Relative cost of refreshing one m × n matrix, by which refreshes are spread; 0: nothing to spread."""
        return 0.0

    def rank(self, m: int, n: int) -> int:
        """The r of the `LowRank` directions of an m × n matrix; 0: they are whole."""
        return 0


class Elementwise(Options, ABC):
    """A rule for parameters of any shape, entry by entry. It takes the step itself, so torch's fused kernels serve."""

    @abstractmethod
    def init(self, p: Tensor) -> State:
        """Fresh state for one parameter, in ``p``'s dtype and shape, with a ``step`` of its own."""

    @abstractmethod
    def apply(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        lr: float | Tensor,
        decay: float,
    ) -> None:
        """Step and decay the parameters in place. All are of one dtype and device."""
