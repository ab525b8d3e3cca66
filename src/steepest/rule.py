"""What a rule is: it turns a stack of gradients into a stack of directions, and changes its own state, nothing else.

A rule knows no parameter, no device, no rank and no learning rate. The engine (`steepest.optimizer`) gathers gradients
of one shape into a stack ``G [B, m, n]``, asks the rule for directions ``D [B, m, n]`` and moves the weights:
``W -= lr · D``, with weight decay around it. There are two kinds:

* `Rule`, for stacks of matrices: SOAP, Muon, Shampoo, ... One file each in `steepest.rules`.
* `Elementwise`, for lists of parameters of any shape, served by torch.optim's own fused functions.

Both are frozen dataclasses of plain options (numbers and strings), because options live in the optimizer's parameter
groups, where schedulers and people read and write them; the engine rebuilds the rule from its group at every step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from steepest.linalg.attempts import succeeded
from steepest.linalg.flops import Work
from steepest.storage import PLAIN, Storage

State = dict[str, Tensor]
"""A rule's memory of one stack: every tensor's leading dimension is the stack's ``B``."""

Solved = tuple[Tensor, ...]
"""What an `Errand` gives: a basis or a turn ``[b, d, d]``, which of the old columns each of its columns continues,
``[b, d]``, and perhaps more ``[b, d, d]``."""

Slots = slice | Tensor
"""Which matrices of a stack: a slice, or a tensor of indices."""

THE_END = 10**9
"""A clock at which every schedule of refreshes has arrived."""


# Options that know what they may be.


def beta(default: float) -> Any:
    """An option that is a decay coefficient in [0, 1); at 1 a bias correction would divide zero by zero."""
    return _option(default, lambda x: _number(x) and 0 <= x < 1, "a number in [0, 1)")


def betas(default: tuple[float, float]) -> Any:
    """An option that is a pair of decay coefficients."""
    return _option(
        default, lambda x: len(x) == 2 and all(_number(b) and 0 <= b < 1 for b in x), "two numbers in [0, 1)"
    )


def at_least(low: float, default: Any, meaning: str = "") -> Any:
    """An option that is a number from ``low`` up; an integer if its default is one."""
    kind = "an integer" if isinstance(default, int) else "a number"
    whole = isinstance(default, int)
    return _option(
        default,
        lambda x: _number(x) and x >= low and (isinstance(x, int) or not whole),
        f"{kind} >= {low}" + (f" ({meaning})" if meaning else ""),
    )


def frequency(default: int) -> Any:
    """An option that is a number of steps between refreshes, or a function from the step to that number."""
    return _option(
        default,
        lambda f: callable(f) or (_number(f) and f == int(f) >= 1),
        "an integer >= 1, or a function of the step",
    )


def one_of(choices: Sequence[str], default: str) -> Any:
    """An option that is one of a few words."""
    return _option(default, lambda x: x in choices, "one of " + ", ".join(map(repr, choices)))


def checked(default: Any, holds: Callable[[Any], bool], allowed: str) -> Any:
    """An option with a condition of its own; ``allowed`` completes the sentence "must be ..."."""
    return _option(default, holds, allowed)


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _option(default: Any, holds: Callable[[Any], bool], allowed: str) -> Any:
    return field(default=default, metadata={"allowed": (holds, allowed)})


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
    solved: Mapping[str, Solved] = field(default_factory=dict)
    """For `Rule.finish`: what has been computed elsewhere for the slots that are due, by the errand's name."""

    def found(self, new: Tensor, old: Tensor | float, slots: Slots = slice(None)) -> Tensor:
        """What a decomposition gave for these slots, ``[b, m, n]``, and ``old`` where that is NaN, which is counted."""
        good = succeeded(new)  # [b]
        if self.failures is not None:
            self.failures[slots] += ~good
        return torch.where(good.view(-1, 1, 1), new, old)


@dataclass(frozen=True)
class Errand:
    """A part of `Rule.finish` that may be computed elsewhere: from a few tensors of one side of the state."""

    needs: tuple[str, ...]
    """Their names; each is ``[B, d, d]``."""
    gives: int
    """How many tensors come back."""
    side: int
    """d."""
    work: Work
    """Of a step, on the average; it is among `Rule.work`."""


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


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that stand flat in a parameter group; checked whenever they are built."""

    name: ClassVar[str]
    """How the registry, parameter groups and the command line call it."""
    paper: ClassVar[str] = ""
    """Where it was published."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if "allowed" in f.metadata:
                holds, allowed = f.metadata["allowed"]
                check(holds(getattr(self, f.name)), f.name, getattr(self, f.name), allowed)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every option that has a default."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING}

    @classmethod
    def settled(cls, group: Mapping[str, Any], agreed: Callable[[bool], bool]) -> dict[str, Any]:
        """Options of a new parameter group that depend on its devices, as plain words; they are saved with it.

        ``agreed`` says of what this rank has found whether all ranks have that share the group's parameters.
        """
        return {}

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        """The rule that a parameter group describes."""
        return cls(**{f.name: group[f.name] for f in fields(cls)})


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

    @property
    def storage(self) -> Storage:
        """What its state is kept in between steps."""
        return PLAIN

    def lay_out(self, G: Tensor) -> State:
        """`init`, as it is kept between steps."""
        return self.storage.laid_out(self.init(G))

    def defers(self, step: Step) -> bool:
        """Whether ``update`` has left something of this step for `finish`."""
        return False

    def finish(self, state: State, step: Step) -> None:
        """Do what ``update`` has left, in place in ``state``, after the weights have moved.

        On an accelerator it runs beside whatever comes until the next step, on a stream of its own.
        """

    def errands(self, m: int, n: int) -> Mapping[str, Errand]:
        """By name, what of `finish` for m × n matrices another rank may do, which has less to do than this one."""
        return {}

    def solve(self, *needs: Tensor) -> Solved:
        """Do an errand: from what it needs, ``[b, d, d]`` each, what `finish` would compute itself, to the last bit.

        A rule whose `errands` are none is never asked.
        """
        raise NotImplementedError

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

    def work(self, m: int, n: int) -> Work:
        """FLOPs of one step of an m × n matrix, by kind; refreshes as `Work.every` so many steps.

        Products and decompositions as in `steepest.linalg.flops`, which says how they are counted; passes over entries
        count nothing. A refresh frequency that changes counts as it is in the end.
        """
        return Work()

    def flops(self, m: int, n: int) -> float:
        """All of `work`. Plans for many ranks balance by it, and by state where it is 0."""
        return self.work(m, n).total

    def rank(self, m: int, n: int) -> int:
        """The r of the `LowRank` directions of an m × n matrix; 0: they are whole."""
        return 0

    def sides(self, m: int, n: int) -> list[int]:
        """The lengths of those sides of an m × n matrix that have a factor, as `init` lays them out."""
        state = self.init(torch.empty(1, m, n, device="meta"))
        return [state[side].shape[-1] for side in ("L", "R") if side in state]


@dataclass(frozen=True, kw_only=True)
class Refreshing(Rule):
    """A rule with something slow, bases or roots of Kronecker factors, that is renewed every so many steps.

    A matrix counts in its own time, ``clock``, the updates that it has had; its first refresh comes at
    ``first_refresh`` (0 unless a rule warms up), whatever the frequency.
    """

    precondition_frequency: int | Callable[[int], int] = frequency(1)
    max_precond_dim: int = at_least(0, 8192)

    @property
    def first_refresh(self) -> int:
        """The clock at which a matrix gets its first basis."""
        return 0

    def stage(self, clock: int) -> str:
        """ "warmup" before the first refresh, "first" at it, "steady" from then on."""
        if clock == self.first_refresh:
            return "first"
        return "warmup" if clock < self.first_refresh else "steady"

    def period(self, clock: int) -> int:
        """The frequency at this clock."""
        every = self.precondition_frequency
        return every if isinstance(every, int) else every(clock)

    @property
    def last_period(self) -> int:
        """The period in the end."""
        return self.period(THE_END)

    def due(self, clock: int, phase: int) -> bool:
        """At the first refresh, and then when the clock is at the matrix's phase of the period."""
        if clock <= self.first_refresh:
            return clock == self.first_refresh
        return clock % self.period(clock) == phase

    def refresh_cost(self, m: int, n: int) -> float:
        """Cubic in each side that has a factor."""
        return float(sum(d**3 for d in (m, n) if d <= self.max_precond_dim))


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


def correction(beta: float, t: Tensor) -> Tensor:
    """``1 - beta^t``, what an exponential moving average from zero lacks after t updates.

    By way of ``expm1``: in float32, ``1 - beta**t`` loses four digits at beta = 0.999.

    >>> correction(0.9, torch.tensor([1.0, 2.0]))
    tensor([0.1000, 0.1900])
    """
    return -torch.expm1(t * math.log(beta)) if beta > 0 else torch.ones_like(t)


def corrected_beta(beta: float, t: Tensor) -> Tensor:
    """The decay ``1 - (1-β)/(1-β^t)`` that makes an average from zero unbiased at every step; 0 at t = 1.

    >>> corrected_beta(0.5, torch.tensor([1.0, 2.0]))
    tensor([0.0000, 0.3333])
    """
    return 1 - (1 - beta) / correction(beta, t)


def clip_rms(D: Tensor, limit: float) -> Tensor:
    """Each matrix of ``D [B, m, n]`` scaled down to a root mean square of at most ``limit``; 0 means no limit.

    >>> clip_rms(torch.full((1, 2, 2), 4.0), 1.0).amax()
    tensor(1.)
    """
    if limit <= 0:
        return D
    rms = D.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return D * (limit / (rms + 1e-7)).clamp(max=1.0)


def check(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise the ValueError that names an option, its value and what is allowed.

    >>> check(False, "eps", -1.0, "a number >= 0")
    Traceback (most recent call last):
    ValueError: eps=-1.0: must be a number >= 0
    """
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the ``choices``."""
    check(value in choices, name, value, "one of " + ", ".join(map(repr, choices)))
