"""A rule turns a stack of gradients into a stack of directions, and changes its own state and nothing else.

A rule knows no parameter, device, rank or learning rate. The engine (`steepest.engine.optimizer`) gathers gradients of
one shape into a stack ``G [B, m, n]``, asks the rule for directions ``D [B, m, n]`` and moves the weights,
``W -= lr · D``, with weight decay around it. There are two kinds of rules:

* `Rule` steps stacks of matrices: SOAP, Muon, Shampoo and their relatives, one file each in `steepest.rules`.
* `Elementwise` steps lists of parameters of any shape by torch.optim's own fused functions.

Both are frozen dataclasses of plain options (numbers and words). Options live in the optimizer's parameter groups,
where schedulers and people read and write them, so the engine takes the rule from its group at every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from steepest.linalg.attempts import succeeded
from steepest.rule.options import Options

State = dict[str, Tensor]
"""The state of one stack: every tensor's leading dimension is the stack's ``B``."""

Slots = slice | Tensor
"""Some matrices of a stack: a slice, or a tensor of indices."""


@dataclass(frozen=True)
class Statistics:
    """Second moments of what goes into layers and of the gradients that come back, which feed K-FAC's factors."""

    A: Tensor
    """Of inputs, ``E[ā āᵀ] [b, n, n]``."""
    B: Tensor
    """Of the gradients with respect to outputs, ``E[δ δᵀ] [b, m, m]``."""
    S: Tensor | None = None
    """Of the gradients' entries in the bases that there are, ``[b, m, n]``; None where none were taken."""
    slots: Slots = field(default_factory=lambda: slice(None))
    """The matrices of the stack that they belong to."""


@dataclass(frozen=True)
class Step:
    """The facts that the engine gives a rule about one step of one stack."""

    t: Tensor
    """The number of updates that each matrix has had, this one included, ``[B, 1, 1]``; for bias corrections. A matrix
    whose gradient was lost may count without it, where `Rule.keeps` says that nothing has to be undone."""
    stage: str = "steady"
    """The stage of the stack's matrices, as the rule's own `Rule.stage` names it; the same for all of them."""
    refresh: Slots | None = None
    """The matrices whose slow part (a basis, an inverse root) is due, or None."""
    penalty: Tensor | None = None
    """Weight decay as a gradient (method "l2"), ``[B, m, n]``. Moments take it in, and covariances but SOAP's."""
    failures: Tensor | None = None
    """A count for each matrix, ``[B]``, of decompositions that every solver failed at. The rule adds to it in place."""
    statistics: Statistics | None = None
    """What was captured since the last step, for the matrices that got something; see `Rule.captures`."""
    lost: Tensor | None = None
    """``[B, 1, 1]``, in t's dtype: 1 for the matrices whose gradient was not finite and counts as zero; 0 for others.
    None if there are none, or the host has taken them out of the step."""

    def rate(self, rate: float) -> float | Tensor:
        """The rate at which an average takes a gradient in; 0 for matrices whose gradient was lost."""
        return rate if self.lost is None else torch.rsub(self.lost, rate, alpha=rate)

    def decay(self, beta: float | Tensor) -> float | Tensor:
        """The decay of an average; 1 for matrices whose gradient was lost."""
        if self.lost is None:
            return beta
        return torch.maximum(self.lost, beta) if isinstance(beta, Tensor) else torch.clamp(self.lost, min=beta)

    def found(self, new: Tensor, old: Tensor | float, slots: Slots = slice(None)) -> Tensor:
        """The result of a decomposition for these slots, ``[b, m, n]``; ``old`` where it is NaN, which is counted."""
        return torch.where(self.solved(new, slots).view(-1, 1, 1), new, old)

    def solved(self, new: Tensor, slots: Slots = slice(None)) -> Tensor:
        """Whether each matrix of a decomposition for these slots succeeded, ``[b]``; those that did not are counted."""
        good = succeeded(new)
        if self.failures is not None:
            self.failures[slots] += ~good if self.lost is None else ~good & (self.lost.view(-1)[slots] == 0)
        return good


@dataclass(frozen=True)
class LowRank:
    """Directions of rank r as ``left rightᵀ``. Between ranks the factors travel where they are fewer bytes.

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
    """Directions ``[B, m, n]``, multiplied out if they come as factors."""
    return directions.product() if isinstance(directions, LowRank) else directions


class Rule(Options, ABC):
    """A rule for stacks of matrices. Subclasses are final, frozen and keyword-only dataclasses."""

    captures: ClassVar[bool] = False
    """Whether it is fed by `Statistics`, which are captured in a model's layers. Its vectors are the layers' biases."""

    @property
    def kl_clip(self) -> float:
        """The limit κ of ``Σ ⟨D, G⟩`` over all matrices, to which all directions are scaled down together; 0: none."""
        return 0.0

    def clip_gradient(self, G: Tensor, state: State, t: Tensor) -> Tensor:
        """The gradients ``[B, m, n]`` in that sum, after an update: those of the step, or an average that led to D."""
        return G

    averages: ClassVar[tuple[str, ...]] = ()
    """The entries of the state that `update` changes by `Step.rate` and `Step.decay` alone, so that a gradient that was
    lost leaves no trace in them; "failures", if only `Step.solved` counts there."""

    def keeps(self, name: str, step: Step) -> bool:
        """Whether `update` leaves an entry of the state as it is for matrices whose gradient was lost.

        The engine saves other entries before the update, and restores them afterwards, which moves their bytes 5 times.
        """
        return name in self.averages

    @abstractmethod
    def init(self, G: Tensor) -> State:
        """Return fresh state for a stack with the shape, dtype and device of ``G [B, m, n]``; meta is a device, too.

        Every tensor has leading dimension B. The names ``step`` and ``clock`` are the engine's.
        """

    @abstractmethod
    def update(self, G: Tensor, state: State, step: Step) -> Tensor | LowRank | None:
        """Take one step: change ``state`` in place, and return the directions ``[B, m, n]``, or None to stay.

        Directions are in memory of their own, which the engine may change.

        ``G [B, m, n]`` must not be changed. An update never waits for the device, asks for a tensor's value on an
        accelerator or on the meta device (where `steepest.rule.work` counts its FLOPs), or draws random numbers.
        """

    def defers(self, step: Step) -> bool:
        """Whether `update` has deferred a part of this step to `finish`."""
        return False

    def finish(self, state: State, step: Step) -> None:
        """Do the part that `update` has deferred, in place in ``state``, after the weights have moved.

        On an accelerator it runs on a stream of its own, beside the next forward and backward pass.
        """

    @property
    def decay_follows(self) -> bool:
        """Whether weights decay after the step, and not before it."""
        return False

    def stage(self, clock: int) -> str:
        """The stage of a matrix that has had ``clock`` updates. Matrices in different stages are updated apart."""
        return "steady"

    def due(self, clock: int, offset: float) -> bool:
        """Whether a matrix that has had ``clock`` updates refreshes now.

        ``offset``, a fraction of a period in [0, 1), staggers it.
        """
        return False

    def period(self, clock: int) -> int:
        """The number of steps from one refresh to the next, at this clock; 1 where a rule has no slow part."""
        return 1

    def refresh_cost(self, m: int, n: int) -> float:
        """The relative cost of a refresh of one m × n matrix, by which refreshes are staggered; 0 if there is none."""
        return 0.0

    def rank(self, m: int, n: int) -> int:
        """The rank of the `LowRank` directions of an m × n matrix; 0 if directions are whole."""
        return 0


class Elementwise(Options, ABC):
    """A rule for parameters of any shape, entry by entry. It moves the weights itself, by torch's fused functions."""

    @abstractmethod
    def init(self, p: Tensor) -> State:
        """Return fresh state for one parameter, in ``p``'s dtype and shape, with a ``step`` of its own."""

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

    def latest(self, state: State) -> Tensor | None:
        """The direction of a parameter's latest step, as its state tells it; None if the state doesn't tell."""
        return None
