"""Predicted: how long an optimizer's step takes on a device, beside the model's own part of a training step.

A matrix takes the time of its products and decompositions (`steepest.rule.work`), each at the device's speed for
its kind and size, and that of moving bytes, once each: state read and written, the gradient read and gathered, the
direction written and read, the weight read and written. A stack takes the time of its launches. One thing comes after
the other. Left out: what travels between ranks, and waiting for it; Cholesky-QR's second and third pass where
``solver="cholesky"``; what converting state kept in fewer bytes takes; copies of state on a GPU without Triton, by
which a step can be undone; the first step, whose full decompositions are computed in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from steepest.lab.plan.devices import Device
from steepest.linalg.solvers import choose
from steepest.linalg.stopwatch import bfloat16_pays
from steepest.rule import THE_END, Elementwise, Rule
from steepest.rule.work import Work, work
from steepest.rules.parts.newton_schulz import NewtonSchulz, survives_bfloat16
from steepest.rules.soap import AdamInBasis
from steepest.stack.stagger import stagger_offsets
from steepest.stack.storage import laid_out

MFU = 0.4
"""Share of the peak at which a model is trained; large ones reached 38% to 43% on H100s (arXiv:2407.21783, 3.3.2)."""
MOMENTS = ("exp_avg", "momentum_buffer")
"""How state begins that has an entry for each of the matrix; the rest belongs to products."""
FLOAT = 4
"""Bytes of an entry of a gathered gradient, and of a direction."""

Matrix = tuple[int, int, int]
"""Rows, columns, and when in its period it refreshes if staggered."""


@dataclass(frozen=True)
class Load:
    """What a rank steps, and what it holds."""

    matrices: Mapping[Matrix, float]
    """How many there are."""
    stacks: int
    entries: float
    """That go entry by entry."""
    parameters: float
    """Entries of weights, as of gradients, that lie on it."""
    state: float
    """Bytes."""


@dataclass(frozen=True)
class Forecast:
    """Predicted seconds and bytes, of the rank that has most of each."""

    device: str
    step: float
    """The optimizer's step, on the average over a period."""
    worst: float
    """Its longest: all refreshes at once."""
    staggered: float
    """Its longest with ``stagger=True``."""
    training: float
    """The model's forward and backward pass on a rank: 6 FLOPs per parameter and token."""
    held: float
    """Bytes of weights, gradients and state; activations and the step's own memory come on top."""
    memory: float
    """Bytes that the device has."""

    @property
    def share(self) -> float:
        """Of the step's average in a training step."""
        return self.step / (self.step + self.training)

    @property
    def fits(self) -> bool:
        """Whether there is room for what is held."""
        return self.held <= self.memory


def forecast(
    rules: tuple[Rule | Elementwise, Elementwise],
    loads: Iterable[Load],
    training_flops: float,
    device: Device,
    itemsize: int,
    mfu: float = MFU,
) -> Forecast:
    """Predict for the busiest of ranks.

    Args:
        rules: of matrices, and of the rest.
        loads: of every rank; as often as there are such ranks, or once.
        training_flops: of the model's forward and backward pass, by rank.
        device: what every rank runs on.
        itemsize: bytes of an entry of weights and gradients.
        mfu: share of the device's ``training`` speed.
    """
    alike = list({_facts(load): load for load in loads}.values())
    times = [_times(rules, load, device, itemsize) for load in alike]
    step, worst, staggered = (max(column) for column in zip(*times, strict=True))
    held = max(2 * itemsize * load.parameters + load.state for load in alike)
    return Forecast(device.name, step, worst, staggered, training_flops / (device.training * mfu), held, device.memory)


def settled(rule: Rule | Elementwise, kind: str) -> Rule | Elementwise:
    """The rule with words that depend on the device, "auto", as that kind of device understands them.

    >>> from steepest.rules.muon import Muon
    >>> from steepest.rules.soap import Soap
    >>> settled(Soap(), "cuda").solver, settled(Soap(), "cpu").solver, settled(Muon(), "cuda").ns_dtype
    ('first_order', 'qr', 'bfloat16')
    """
    if isinstance(rule, AdamInBasis) and rule.solver == "auto":
        return replace(rule, solver=choose(kind))
    if isinstance(rule, NewtonSchulz) and rule.ns_dtype == "auto":
        pays = survives_bfloat16(rule.ns) and (kind == "cuda" or bfloat16_pays(torch.device(kind)))
        return replace(rule, ns_dtype="bfloat16" if pays else "float32")
    return rule


def phases(rule: Rule, matrices: Sequence[tuple[int, int]]) -> list[int]:
    """When in its period each matrix refreshes if staggered, as the engine spreads them, in the order of its names."""
    return stagger_offsets([rule.refresh_cost(m, n) for m, n in matrices], period_of(rule))


def period_of(rule: Rule | Elementwise) -> int:
    """Steps from refresh to refresh, in the end."""
    return rule.period(THE_END) if isinstance(rule, Rule) else 1


def _times(
    rules: tuple[Rule | Elementwise, Elementwise], load: Load, device: Device, itemsize: int
) -> tuple[float, float, float]:
    """Seconds of a rank's step: on the average, at worst, at worst if staggered."""
    rule = settled(rules[0], device.kind)
    rest = load.entries * (entry_bytes(rules[1]) * 2 + 3 * itemsize) / device.entrywise
    if not isinstance(rule, Rule) or not load.matrices:
        return rest, rest, rest
    rest += device.per_stack * load.stacks
    rest += device.per_matrix * max(sum(load.matrices.values()) - load.stacks, 0)
    mean = steady = 0.0
    refreshes: Counter[int] = Counter()
    for (m, n, phase), count in load.matrices.items():
        counted, moments, factors = _cost(rule, m, n)
        passed = (2 * moments + (3 * itemsize + 3 * FLOAT) * m * n) / device.passes
        passed += 2 * factors / device.bandwidth
        always, now = device.seconds(counted.always()), device.seconds(counted.now())
        mean += count * (passed + device.seconds(counted))
        steady += count * (passed + always)
        refreshes[phase] += count * (now - always)  # type: ignore[assignment]
    return rest + mean, rest + steady + math.fsum(refreshes.values()), rest + steady + max(refreshes.values())


@cache
def _cost(rule: Rule, m: int, n: int) -> tuple[Work, int, int]:
    """Of a matrix: its work, bytes of state by entry, bytes of the rest."""
    state = laid_out(rule, torch.empty(1, m, n, device="meta"))
    moments = sum(x.nbytes for name, x in state.items() if name.startswith(MOMENTS))
    return work(rule, m, n), moments, sum(x.nbytes for x in state.values()) - moments


@cache
def entry_bytes(rule: Elementwise) -> int:
    """Bytes of an elementwise rule's state by entry, which is float32."""
    state = rule.init(torch.empty(1, 1, device="meta"))
    return sum(x.itemsize for x in state.values() if x.dim())


def _facts(load: Load) -> tuple[object, ...]:
    return frozenset(load.matrices.items()), load.stacks, load.entries, load.parameters, load.state
