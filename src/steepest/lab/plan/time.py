"""Predict how long an optimizer's step takes on a device, beside the model's own part of a training step.

A matrix takes the time of its products and decompositions (`steepest.rule.work`), each at the device's speed for
its kind and size, and that of moving bytes, once each: state read and written, the gradient read and gathered, the
direction written and read, the weight read and written. A stack takes the time of its launches. All of these come one
after the other. Left out are communication between ranks; Cholesky-QR's second and third pass where
``solver="cholesky"``; the conversion of state that is kept in fewer bytes; and on a GPU without Triton the copies of
state by which a step can be undone. The step of the first refresh has decompositions in float64, and a time of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from steepest.lab.plan.devices import Device
from steepest.linalg.solvers import choose
from steepest.linalg.stopwatch import bfloat16_pays
from steepest.rule import THE_END, Elementwise, Rule
from steepest.rule.work import Work, first_work, work
from steepest.rules.parts.newton_schulz import NewtonSchulz, survives_half
from steepest.rules.soap import AdamInBasis
from steepest.stack.storage import BLOCK, laid_out

MFU = 0.4
"""Share of the peak at which a model is trained; large ones reached 38% to 43% on H100s (arXiv:2407.21783, 3.3.2)."""
MOMENTS = ("exp_avg", "momentum_buffer")
"""How names of state begin that has an entry for each of the matrix; other state belongs to products."""
FLOAT = 4
"""Bytes of an entry of a gathered gradient, and of a direction."""

Matrix = tuple[int, int, int]
"""Rows, columns, and the step of the period in which it refreshes if staggered."""


@dataclass
class Load:
    """What a rank steps, and what it holds."""

    matrices: Counter[Matrix] = field(default_factory=Counter)
    stacks: set[tuple[int, int, int]] = field(default_factory=set)
    """By bucket, rows and columns."""
    entries: float = 0.0
    """Entries of the elementwise rule's parameters."""
    elementwise: float = 0.0
    """Bytes of that rule's state."""
    parameters: float = 0.0
    """Entries of weights, as of gradients."""
    state: float = 0.0
    """Bytes of optimizer state."""
    flops: float = 0.0
    """FLOPs of a step, refreshes on the average."""


@dataclass(frozen=True)
class Forecast:
    """Predicted seconds and bytes of the rank that has most of each."""

    device: str
    step: float
    """Seconds of the optimizer's step, on the average over a period."""
    worst: float
    """Seconds of its longest step, in which all matrices refresh."""
    staggered: float
    """Seconds of its longest step with ``stagger=True``."""
    first: float
    """Seconds of the step in which all matrices have their first refresh."""
    training: float
    """Seconds of the model's forward and backward pass: 6 FLOPs per parameter and token."""
    held: float
    """Bytes of weights, gradients and state, without activations and a step's own memory."""
    memory: float
    """Bytes of the device's memory."""

    @property
    def share(self) -> float:
        """The share of the optimizer's step in a training step."""
        return self.step / (self.step + self.training)

    @property
    def fits(self) -> bool:
        """Whether the device's memory holds weights, gradients and state."""
        return self.held <= self.memory


def forecast(
    rules: tuple[Rule | Elementwise, Elementwise],
    loads: Sequence[Load],
    training_flops: float,
    device: Device,
    itemsize: int,
    mfu: float = MFU,
) -> Forecast:
    """Predict the step of the busiest rank of a device.

    ``rules`` are those of matrices and of all other parameters, ``loads`` those of every rank, ``training_flops`` those
    of the model's forward and backward pass on a rank, which runs at the share ``mfu`` of the device's ``training``
    speed. Weights and gradients have ``itemsize`` bytes an entry.
    """
    alike = {(frozenset(one.matrices.items()), len(one.stacks), one.entries): one for one in loads}
    times = [step_times(rules, load, device, itemsize) for load in alike.values()]
    step, worst, staggered, first = (max(column) for column in zip(*times, strict=True))
    held = max(2 * itemsize * load.parameters + load.state for load in loads)
    training = training_flops / (device.training * mfu)
    return Forecast(device.name, step, worst, staggered, first, training, held, device.memory)


def settled(rule: Rule | Elementwise, kind: str) -> Rule | Elementwise:
    """Return the rule with the options "auto" as a kind of device decides them.

    >>> from steepest.rules.muon import Muon
    >>> from steepest.rules.soap import Soap
    >>> settled(Soap(), "cuda").solver, settled(Soap(), "cpu").solver, settled(Muon(), "cuda").ns_dtype
    ('first_order', 'qr', 'float16')
    """
    if isinstance(rule, AdamInBasis) and rule.solver == "auto":
        return replace(rule, solver=choose(kind))
    if isinstance(rule, NewtonSchulz) and rule.ns_dtype == "auto":
        if not survives_half(rule.ns):
            return replace(rule, ns_dtype="float32")
        if kind == "cuda":
            return replace(rule, ns_dtype="float16")
        return replace(rule, ns_dtype="bfloat16" if bfloat16_pays(torch.device(kind)) else "float32")
    return rule


def starting(rule: Rule | Elementwise, kind: str) -> Rule | Elementwise:
    """Return the rule as `settled` does, but for its first refresh, where "auto" decomposes and "qr" does not.

    >>> from steepest.rules.soap import Soap
    >>> starting(Soap(), "cpu").solver
    'auto'
    """
    return rule if isinstance(rule, AdamInBasis) else settled(rule, kind)


def period_of(rule: Rule | Elementwise) -> int:
    """Return the number of steps from one refresh to the next, in the end."""
    return rule.period(THE_END) if isinstance(rule, Rule) else 1


def step_times(
    rules: tuple[Rule | Elementwise, Elementwise], load: Load, device: Device, itemsize: int
) -> tuple[float, float, float, float]:
    """Return the seconds of a rank's step: the mean, the longest, the longest if staggered, and the first refresh's."""
    rule, starts = settled(rules[0], device.kind), starting(rules[0], device.kind)
    rest = load.entries * (entry_bytes(rules[1]) * 2 + 3 * itemsize) / device.entrywise
    if not isinstance(rule, Rule) or not isinstance(starts, Rule) or not load.matrices:
        return rest, rest, rest, rest
    rest += device.per_stack * len(load.stacks)
    rest += device.per_matrix * max(load.matrices.total() - len(load.stacks), 0)
    mean = steady = first = 0.0
    refreshes: dict[int, float] = {}
    for (m, n, offset), count in load.matrices.items():
        counted, moments, factors = matrix_cost(rule, m, n)
        passed = (2 * moments + (3 * itemsize + 3 * FLOAT) * m * n) / device.passes
        passed += 2 * factors / device.bandwidth
        always, now = device.seconds(counted.always()), device.seconds(counted.now())
        mean += count * (passed + device.seconds(counted))
        steady += count * (passed + always)
        first += count * (passed + device.seconds(first_work(starts, m, n)))
        refreshes[offset] = refreshes.get(offset, 0.0) + count * (now - always)
    worst, staggered = (steady + refreshing for refreshing in (math.fsum(refreshes.values()), max(refreshes.values())))
    return rest + mean, rest + worst, rest + staggered, rest + first


@cache
def matrix_cost(rule: Rule, m: int, n: int) -> tuple[Work, int, int]:
    """Return a matrix's work, the bytes of its moments, and the bytes of its other state."""
    state = laid_out(rule, torch.empty(1, m, n, device="meta"))
    moments = sum(x.nbytes for name, x in state.items() if name.startswith(MOMENTS))
    return work(rule, m, n), moments, sum(x.nbytes for x in state.values()) - moments


@cache
def entry_bytes(rule: Elementwise, shape: tuple[int, ...] = (1, BLOCK)) -> float:
    """Return the bytes of an elementwise rule's state per entry of a parameter of a shape, without its clock."""
    like = torch.empty(shape, device="meta")
    return sum(x.nbytes for name, x in laid_out(rule, like).items() if name != "step") / max(like.numel(), 1)
