"""A rule reads gradients and writes state, nothing else, and no matrix of a stack affects another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.rule import Elementwise, LowRank, Rule, State, Step, whole
from steepest.rules import RULES

SHAPES = [(4, 4), (4, 6), (6, 4), (1, 5), (1, 1)]
LARGER = [(48, 16), (16, 112), (37, 12), (17, 64), (64, 128)]
"""Multiples of 16 and others: with some of these, factors of a stack don't begin where vector registers do."""
STEPS = 4
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name, rule in RULES.items() if issubclass(rule, Rule)},
    "soap after": ("soap", {"basis_timing": "after", "precondition_frequency": 2}),
    "soap warmup": ("soap", {"adam_warmup_steps": 2}),
    "soap eigh": ("soap", {"solver": "eigh", "nesterov": True, "max_update_rms": 0.1}),
    "soap adaptive": ("soap", {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.1}),
    "kl_shampoo sums": ("kl_shampoo", {"shampoo_beta": 1.0}),
    "moso rmsprop": ("moso", {"inner": "rmsprop"}),
}


def rule(name: str) -> Rule:
    of, options = VARIANTS[name]
    at_each = {"precondition_frequency": 1} if of in ("soap", "kl_soap") else {}
    built = RULES[of](**at_each | options)
    assert isinstance(built, Rule)
    return built


def gradients(k: int, B: int, m: int, n: int) -> Tensor:
    return torch.randn(B, m, n, generator=torch.Generator().manual_seed(k))


def step(built: Rule, G: Tensor, state: State, k: int, penalty: Tensor | None = None) -> Tensor | None:
    """Update ``k`` of every matrix, as the engine would ask for it."""
    t = torch.full((len(G), 1, 1), float(k + 1))
    refresh = slice(0, len(G)) if built.due(k, 0) else None
    D = built.update(G, state, Step(t, built.stage(k), refresh, penalty))
    return None if D is None else whole(D)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_only_its_own_state_changes(name: str, shape: tuple[int, int]) -> None:
    built = rule(name)
    state = built.init(torch.empty(2, *shape))
    tensors = dict(state)
    for k in range(STEPS):
        G, penalty, t = gradients(k, 2, *shape), gradients(100 + k, 2, *shape), torch.full((2, 1, 1), k + 1.0)
        inputs = [G, penalty, t]
        kept, versions = [x.clone() for x in inputs], [x._version for x in inputs]
        refresh = slice(0, 2) if built.due(k, 0) else None
        D = built.update(G, state, Step(t, built.stage(k), refresh, penalty))
        assert all(torch.equal(x, old) for x, old in zip(inputs, kept, strict=True))
        assert [x._version for x in inputs] == versions
        assert state.keys() == tensors.keys()
        assert all(state[name] is x for name, x in tensors.items()), "state changes in place"
        assert all(len(x) == 2 for x in state.values())
        if D is not None:
            assert whole(D).shape == G.shape
            addresses = {x.untyped_storage().data_ptr() for x in [*inputs, *state.values()]}
            parts = (D.left, D.right) if isinstance(D, LowRank) else (D,)
            assert all(x.untyped_storage().data_ptr() not in addresses for x in parts), "they are the caller's"
            assert [x.shape[-1] for x in parts] == ([built.rank(*shape)] * 2 if len(parts) == 2 else [shape[1]])


@pytest.mark.parametrize("shape", SHAPES + LARGER, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_each_matrix_is_alone(name: str, shape: tuple[int, int]) -> None:
    """A stack of three does what three stacks of one do, bit for bit."""
    built = rule(name)
    if shape in LARGER and name.startswith("dion") and min(shape) % 64:
        pytest.skip("it steps along a quarter of these, which is no multiple of 16 (docs/many-gpus.md)")
    together = built.init(torch.empty(3, *shape))
    alone = [built.init(torch.empty(1, *shape)) for _ in range(3)]
    for k in range(STEPS):
        G = gradients(k, 3, *shape)
        D = step(built, G, together, k)
        for i, state in enumerate(alone):
            d = step(built, G[i : i + 1], state, k)
            assert (d is None) == (D is None)
            if d is not None and D is not None:
                assert torch.equal(d[0], D[i])
            assert all(torch.equal(x[0], together[key][i]) for key, x in state.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_state_can_be_laid_out_without_memory(name: str) -> None:
    real, meta = (rule(name).init(torch.empty(2, 4, 6, device=device)) for device in ("cpu", "meta"))
    assert {key: (x.shape, x.dtype) for key, x in real.items()} == {key: (x.shape, x.dtype) for key, x in meta.items()}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["zeros", "rank one", "equal columns", "one entry", "huge", "tiny", "denormal"])
def test_hard_gradients(name: str, kind: str) -> None:
    """Gradients whose squares are finite leave finite state and finite directions."""
    built = rule(name)
    state = built.init(torch.empty(2, 4, 6))
    for k in range(STEPS):
        D = step(built, hard(kind, k), state, k)
        assert D is None or torch.isfinite(D).all()
        assert all(torch.isfinite(x).all() for x in state.values())


def hard(kind: str, k: int) -> Tensor:
    G = gradients(k, 2, 4, 6)
    return {
        "zeros": lambda: torch.zeros_like(G),
        "rank one": lambda: G[:, :, :1] @ G[:, :1, :],
        "equal columns": lambda: G[:, :, :1].expand(2, 4, 6).clone(),
        "one entry": lambda: torch.zeros_like(G).index_put_(
            (torch.tensor(0), torch.tensor(1), torch.tensor(2)), G[0, 0, 0]
        ),
        "huge": lambda: G * 1e14,
        "tiny": lambda: G * 1e-18,
        "denormal": lambda: G * 1e-41,
    }[kind]()


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if issubclass(rule, Elementwise)])
@pytest.mark.parametrize("shape", [(4, 6), (5,), ()], ids=str)
def test_elementwise_rules_change_weights_and_state_only(name: str, shape: tuple[int, ...]) -> None:
    built = RULES[name]()
    assert isinstance(built, Elementwise)
    W, g = torch.ones(shape), torch.full(shape, -2.0)
    state = built.init(W)
    tensors, address = dict(state), W.data_ptr()
    for k in range(STEPS):
        version = g._version
        built.apply([W], [g], [state], 0.1, 0.01)
        assert g._version == version
        assert W.data_ptr() == address
        assert all(state[key] is x for key, x in tensors.items())
        assert state["step"] == k + 1
    assert (W > 1).all()
