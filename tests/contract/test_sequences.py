"""Any sequence of events leaves SOAP where a plain implementation is: one matrix at a time, in float64, by the book.

Steps with gradients that are missing or NaN, groups that are added, options that change, optimizers that are saved and
loaded: the engine's stacks, slots, clocks and copies must not show in the weights.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import steepest
from steepest.rules.kl_soap import KLSoap

Options = dict[str, Any]
Index = tuple[Any, ...]


# The reference.


@dataclass
class Matrix:
    """A matrix of a parameter, and SOAP's state for it."""

    where: Index
    """Its place in the parameter, seen as ``[batch, rows, columns]``."""
    options: Options
    clock: int = 0
    m: Any = 0.0
    v: Any = 0.0
    K: list[Tensor | None] = field(default_factory=list)
    Q: list[Tensor] = field(default_factory=list)

    def step(self, W: Tensor, G: Tensor) -> None:
        """One update of ``W [m, n]``, in place."""
        o = self.options
        self.clock += 1
        if not self.Q:
            rotated = [d > 1 and min(W.shape) > 1 for d in W.shape]
            self.K = [
                torch.zeros(d, d, dtype=W.dtype) if yes else None for d, yes in zip(W.shape, rotated, strict=True)
            ]
            self.Q = [torch.eye(d, dtype=W.dtype) for d in W.shape]
            self.m, self.v = torch.zeros_like(W), torch.zeros_like(W)
        after, warmup = o["basis_timing"] == "after", o["adam_warmup_steps"]
        first = max(warmup - 1, 0) if after else warmup
        seeds = after and warmup == 0
        if not after:
            self.learn(G, o, first)
        if not (seeds and self.clock == 1):
            u = self.adam(W, G, o, self.clock - seeds, rotating=self.clock - 1 >= first + after)
            W.copy_((W - o["lr"] * u) * decay(o) if after else W * decay(o) - o["lr"] * u)
        if after:
            self.learn(G, o, first)

    def learn(self, G: Tensor, o: Options, first: int) -> None:
        """Update the covariances, and the bases where they are due."""
        if self.K == [None, None]:
            return
        t, b = self.clock, o["shampoo_beta"]
        b = 1 - (1 - b) / (1 - b**t) if o["correct_bias"] else b
        sides = [G @ self.whitening(1, G, o) @ G.T, G.T @ self.whitening(0, G, o) @ G]
        self.K = [None if K is None else b * K + (1 - b) * new for K, new in zip(self.K, sides, strict=True)]
        due = t - 1 == first or (t - 1 > first and (t - 1) % o["precondition_frequency"] == 0)
        if due:
            self.turn(first=t - 1 == first and o["solver"] != "qr", full=o["solver"] == "eigh")

    def whitening(self, side: int, G: Tensor, o: Options) -> Tensor:
        """The matrix between the two gradients in the update of the other side's covariance."""
        d, K, Q = G.shape[side], self.K[side], self.Q[side]
        if not o["use_kl_shampoo"]:
            return torch.eye(d, dtype=G.dtype)
        if K is None:
            return torch.eye(d, dtype=G.dtype) / d
        λ = (Q.T @ K @ Q).diagonal()
        if o["kl_floor"] == 0:
            λ = λ.clamp(min=o["eps"])
        else:
            λ = λ.clamp(min=o["kl_floor"] * λ.max()) if λ.max() > 0 else G.square().mean().sqrt().expand(d)
        return Q @ torch.diag(1 / λ) @ Q.T / d

    def turn(self, first: bool, full: bool) -> None:
        """Replace the bases: the momentum turns with them, second moments follow the order of the columns."""
        momentum = self.Q[0] @ self.m @ self.Q[1].T
        for side, K in enumerate(self.K):
            if K is None:
                continue
            order = (self.Q[side].T @ K @ self.Q[side]).diagonal().argsort(descending=True)
            if first or full:
                self.Q[side] = torch.linalg.eigh(K).eigenvectors.flip(-1)
            else:
                self.Q[side] = torch.linalg.qr(K @ self.Q[side][:, order]).Q
            if not first:
                self.v = self.v.index_select(side, order)
        self.m = self.Q[0].T @ momentum @ self.Q[1]

    def adam(self, W: Tensor, G: Tensor, o: Options, t: int, rotating: bool) -> Tensor:
        """The step's direction."""
        guarded = rotating and self.K != [None, None]
        Q_L, Q_R = self.Q if rotating else [torch.eye(d, dtype=W.dtype) for d in W.shape]
        g = Q_L.T @ (G + o["weight_decay"] * W if o["weight_decay_method"] == "l2" else G) @ Q_R
        β1, β2 = o["betas"]
        self.m = β1 * self.m + (1 - β1) * g
        self.v = β2 * self.v + (1 - β2) * g**2
        if o["correct_bias"]:
            v = self.v / (1 - β2**t)
            m = self.m / (1 - β1**t)
            if o["nesterov"]:
                m = β1 * self.m / (1 - β1 ** (t + 1)) + (1 - β1) * g / (1 - β1**t)
        else:
            v, m = self.v, β1 * self.m + (1 - β1) * g if o["nesterov"] else self.m
        if guarded and o["momentum_floor"]:
            v = torch.maximum(v, m**2)
        τ = {"auto": 1e-2}.get(o["noise_floor"], o["noise_floor"]) if guarded else 0.0
        d = v.sqrt()
        u = d * m / (d * (d + o["eps"]) + τ**2 / t**3 * v.mean()) if τ else m / (d + o["eps"])
        u = Q_L @ u @ Q_R.T
        rms = u.square().mean().sqrt()
        return u * min(1.0, float(o["max_update_rms"] / (rms + 1e-7))) if o["max_update_rms"] else u


def decay(o: Options) -> float:
    """The factor by which weights decay."""
    lr, wd = o["lr"], o["weight_decay"]
    return {"decoupled": 1 - lr * wd, "palm": 1 - lr**2 * wd, "independent": 1 - wd, "l2": 1.0}[
        o["weight_decay_method"]
    ]


class Reference:
    """Weights by name, each a list of matrices."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.matrices: dict[str, list[Matrix]] = {}

    def add(self, name: str, W: Tensor, cut: Collection[Index], options: Options) -> None:
        self.weights[name] = W.detach().clone()
        self.matrices[name] = [Matrix(where, options) for where in cut]

    def step(self, gradients: dict[str, Tensor]) -> None:
        for name, G in gradients.items():
            for matrix in self.matrices[name]:
                g = seen(G)[matrix.where]
                if torch.isfinite(g).all():
                    matrix.step(seen(self.weights[name])[matrix.where], g)


def seen(x: Tensor) -> Tensor:
    """A tensor as ``[batch, rows, columns]``, without a copy."""
    return x.view(1, 1, -1) if x.dim() < 2 else x.view(-1, *x.shape[-2:]) if x.dim() == 3 else x.view(1, x.shape[0], -1)


# What is trained.

WHOLE: tuple[Index, ...] = ((0,),)
SHAPES: dict[str, tuple[int, ...]] = {
    "a": (3, 3),
    "b": (3, 3),
    "wide": (2, 3),
    "kernel": (3, 1, 2, 1),
    "bias": (3,),
    "fused": (5, 3),
    "experts": (2, 3, 3),
    "late 1": (3, 3),
    "late 2": (4, 3),
}
"""No side exceeds the other by more than one: the null space of a first covariance has one dimension then, so that
its basis is no matter of rounding."""
GROUPS: dict[str, tuple[list[str], Options, tuple[Index, ...]]] = {
    "plain": (["a", "b", "wide", "kernel", "bias"], {}, WHOLE),
    "fused": (["fused"], {"split": (3, 2)}, ((0, slice(0, 3)), (0, slice(3, 5)))),
    "experts": (["experts"], {"merge_dims": False}, ((0,), (1,))),
    "late 1": (["late 1"], {}, WHOLE),
    "late 2": (["late 2"], {"lr": 0.05, "weight_decay": 0.2}, WHOLE),
}
"""Names, options of their own, and where their matrices are."""


class Trainee:
    """An optimizer of ours beside the reference."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.reference = Reference()
        self.params: dict[str, nn.Parameter] = {}
        self.groups = ["plain", "fused", "experts"]
        self.optimizer = self.build(reverse=False)

    def build(self, reverse: bool) -> steepest.SOAP:
        """A new optimizer over the present groups, with new parameters of the present values."""
        for name in (name for group in self.groups for name in GROUPS[group][0]):
            W = self.params[name].detach() if name in self.params else draw(name, 0)
            self.params[name] = nn.Parameter(W.clone())
        return steepest.SOAP([self.group(name, reverse) for name in self.groups], **self.options)

    def group(self, name: str, reverse: bool = False) -> Options:
        """A parameter group, known to the reference, too."""
        names, own, cut = GROUPS[name]
        for each in names:
            if each not in self.reference.weights:
                self.reference.add(each, self.params[each], cut, DEFAULTS | self.options | own)
        order = reversed(names) if reverse else names
        return {"params": [(each, self.params[each]) for each in order], **own}

    def step(self, k: int, scale: float, missing: set[str], poisoned: set[str]) -> None:
        gradients = {name: scale * draw(name, k) for name in self.params if name not in missing}
        for name in poisoned & gradients.keys():
            gradients[name].view(-1)[-1] = torch.nan  # in the last of its matrices
        for name, p in self.params.items():
            p.grad = gradients.get(name)
        self.optimizer.step()
        self.reference.step(gradients)

    def set(self, option: str, value: Any) -> None:
        for group in self.optimizer.param_groups:
            group[option] = value
        for matrices in self.reference.matrices.values():
            for matrix in matrices:
                matrix.options[option] = value

    def add(self, name: str) -> None:
        if name not in self.groups:
            self.groups.append(name)
            self.params[name] = nn.Parameter(draw(name, 0))
            self.optimizer.add_param_group(self.group(name))

    def take_elsewhere(self, how: str) -> None:
        if how in ("file", "file, another order"):
            file = io.BytesIO()
            torch.save(self.optimizer.state_dict(), file)
            file.seek(0)
            self.optimizer = self.build(reverse=how != "file")
            self.optimizer.load_state_dict(torch.load(file, weights_only=True))
            return
        copies: dict[str, Callable[[Any], Any]] = {
            "copy": copy.deepcopy,
            "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        }
        self.optimizer, self.params = copies[how]((self.optimizer, self.params))

    def check(self) -> None:
        for name, p in self.params.items():
            expected = self.reference.weights[name]
            torch.testing.assert_close(
                p.detach(), expected, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )
            entries = sorted(self.optimizer.state[p].items())
            steps = [x.view(-1) for key, x in entries if key.startswith("step")]
            assert torch.cat(steps).tolist() == [matrix.clock for matrix in self.reference.matrices[name]]


def draw(name: str, k: int) -> Tensor:
    seed = zlib.crc32(f"{name}, {k}".encode())
    return torch.randn(SHAPES[name], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


DEFAULTS = KLSoap.defaults() | {name: p.default for name, p in inspect.signature(steepest.SOAP).parameters.items()}


# What happens.

OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.1, 0.01]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "weight_decay_method": st.sampled_from(["decoupled", "independent", "palm", "l2"]),
        "precondition_frequency": st.integers(1, 3),
        "adam_warmup_steps": st.integers(0, 2),
        "basis_timing": st.sampled_from(["before", "after"]),
        "use_kl_shampoo": st.booleans(),
        "solver": st.sampled_from(["auto", "qr", "eigh"]),
        "noise_floor": st.sampled_from(["auto", 0.0]),
        "momentum_floor": st.booleans(),
        "correct_bias": st.booleans(),
        "nesterov": st.booleans(),
        "max_update_rms": st.sampled_from([0.0, 0.5]),
        "eps": st.just(1e-6),  # far above rounding, which the floors would otherwise have to hide
    }
)
NAMES = st.sets(st.sampled_from(sorted(SHAPES)), max_size=3)
CHANGES = {
    "lr": st.sampled_from([0.0, 0.03]),
    "weight_decay": st.sampled_from([0.0, 0.3]),
    "betas": st.sampled_from([(0.5, 0.9), (0.95, 0.99)]),
    "shampoo_beta": st.just(0.8),
    "precondition_frequency": st.integers(1, 3),
}
EVENT = st.one_of(
    st.tuples(st.just("step"), st.sampled_from([1.0, 1e-3, 30.0]), NAMES, NAMES),
    st.tuples(st.just("step"), st.just(1.0), st.just(set()), st.just(set())),
    st.sampled_from(sorted(CHANGES)).flatmap(lambda name: st.tuples(st.just("set"), st.just(name), CHANGES[name])),
    st.tuples(st.just("add"), st.sampled_from(["late 1", "late 2"])),
    st.tuples(st.just("take"), st.sampled_from(["file", "file, another order", "copy", "pickle"])),
)


def follow(options: Options, events: list[tuple[Any, ...]]) -> None:
    trainee = Trainee(options)
    for k, (what, *details) in enumerate(events):
        match what:
            case "step":
                trainee.step(1 + k, *details)
            case "set":
                trainee.set(*details)
            case "add":
                trainee.add(*details)
            case "take":
                trainee.take_elsewhere(*details)
    trainee.check()


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(OPTIONS, st.lists(EVENT, min_size=1, max_size=8))
def test_any_sequence(options: Options, events: list[tuple[Any, ...]]) -> None:
    follow(options, events)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OPTIONS, st.lists(EVENT, min_size=1, max_size=16))
def test_any_long_sequence(options: Options, events: list[tuple[Any, ...]]) -> None:
    follow(options, events)


def test_everything_at_once() -> None:
    """One sequence contains every kind of event, so that each run of the tests covers them all."""
    events: list[tuple[Any, ...]] = [
        ("step", 1.0, {"b"}, {"experts"}),
        ("step", 1.0, set(), set()),
        ("add", "late 1"),
        ("step", 30.0, {"a", "late 1"}, {"fused", "kernel"}),
        ("take", "file, another order"),
        ("set", "betas", (0.5, 0.9)),
        ("step", 1e-3, {"wide"}, set()),
        ("take", "pickle"),
        ("add", "late 2"),
        ("set", "lr", 0.03),
        *[("step", 1.0, set(), set())] * 4,
        ("take", "copy"),
        ("step", 1.0, set(), {"a", "late 2"}),
        ("take", "file"),
        ("step", 1.0, {"bias"}, set()),
    ]
    for timing in ("before", "after"):
        options = {"lr": 0.1, "precondition_frequency": 2, "basis_timing": timing, "use_kl_shampoo": timing == "before"}
        follow(options, events)
