"""Tests of state in fewer bytes: its rounding is unbiased and repeats, and checkpoints keep it as it is."""

from __future__ import annotations

import copy
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steepest
from steepest.rules.soap import Soap
from steepest.stack.storage import Storage, coded, coded_squares, decoded, decoded_squares

O = TypeVar("O", bound=steepest.Optimizer)
SHORT = {"basis_dtype": "bfloat16", "moment_dtype": "int8"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 200), st.integers(-30, 30), st.integers(0, 100))
def test_signed_numbers_keep_127_levels(n: int, exponent: int, seed: int) -> None:
    x = random(3, n, seed=seed) * 2.0**exponent
    codes, scales = coded(x, uniform(3, n, seed=seed + 1))
    assert codes.dtype == torch.int8
    assert scales.shape == (3, -(-n // 64))
    largest = torch.stack([block.abs().amax(dim=-1) for block in x.split(64, dim=-1)], dim=-1)
    limit = largest.repeat_interleave(64, dim=-1)[:, :n] / 127
    assert ((decoded(codes, scales) - x).abs() <= limit * (1 + 1e-5)).all()


@given(st.integers(1, 200), st.integers(-30, 30), st.integers(0, 100))
def test_squares_keep_a_level(n: int, exponent: int, seed: int) -> None:
    v = (random(3, n, seed=seed) ** 4 + 1e-4) * 2.0**exponent
    codes, scales = coded_squares(v, uniform(3, n, seed=seed + 1))
    assert codes.dtype == torch.uint8
    ratio = decoded_squares(codes, scales) / v
    assert ((ratio < 1.07) & (ratio > 1 / 1.07)).all()


def test_rounding_is_unbiased() -> None:
    draws = 20_000
    v, x = torch.tensor([1.0, 0.5, 0.013, 3e-6]), torch.tensor([1.0, -0.3, 0.004, 0.0])
    noise = uniform(draws, 4)
    for code, decode, values in ((coded_squares, decoded_squares, v), (coded, decoded, x)):
        found = decode(*code(values.expand(draws, 4), noise))
        level = (found.amax(dim=0) - found.amin(dim=0)).clamp(min=1e-9)
        assert ((found.mean(dim=0) - values).abs() < 4 * level / draws**0.5 + 1e-7).all()


def test_zero_stays_zero_and_small_numbers_do_not_become_zero() -> None:
    v = torch.tensor([[0.0, 1.0, 1e-30]])
    kept = decoded_squares(*coded_squares(v, torch.full((1, 3), 0.999)))
    assert kept[0, 0] == 0
    assert kept[0, 1] == 1
    assert kept[0, 2] == 2.0**-24
    assert torch.equal(decoded_squares(*coded_squares(torch.zeros(2, 70), torch.zeros(2, 70))), torch.zeros(2, 70))


def test_an_average_moves_although_its_steps_are_below_a_level() -> None:
    storage = Storage(moments="int8")
    state = {"exp_avg": torch.zeros(1, 8, 70), "exp_avg_sq": torch.zeros(1, 8, 70)}
    kept = storage.laid_out(state)
    for t in range(1, 400):
        state = storage.restored(kept)
        state["exp_avg"] = state["exp_avg"].lerp(torch.full((1, 8, 70), 2.0), 0.01)
        state["exp_avg_sq"] = state["exp_avg_sq"].lerp(torch.full((1, 8, 70), 4.0), 0.01)
        storage.store(state, kept, torch.full((1, 1, 1), float(t)))
    state = storage.restored(kept)
    expected = 1 - 0.99**399
    assert state["exp_avg"].mean() / 2 == pytest.approx(expected, rel=0.02)
    assert state["exp_avg_sq"].mean() / 4 == pytest.approx(expected, rel=0.02)


def test_state_is_stored_as_it_is_unless_a_rule_asks() -> None:
    assert Storage.of(Soap()) is None
    assert Storage.of(Soap(basis_dtype="bfloat16")) == Storage(bases="bfloat16")


def trained(steps: int, **options: object) -> tuple[torch.nn.Parameter, steepest.SOAP]:
    """Train SOAP on a quadratic valley."""
    W = torch.nn.Parameter(random(24, 80))
    optimizer = steepest.SOAP([W], lr=0.03, precondition_frequency=3, weight_decay=0.0, **options)  # type: ignore[arg-type]
    return W, go_on(W, optimizer, 0, steps)


def go_on(W: torch.nn.Parameter, optimizer: O, start: int, stop: int) -> O:
    for step in range(start, stop):
        A = random(80, 40, seed=step) * torch.linspace(0.02, 1, 80).unsqueeze(-1)
        W.grad = (W.detach() @ A) @ A.mT / 40
        optimizer.step()
    return optimizer


def distance(W: torch.nn.Parameter) -> float:
    return (W.detach() * torch.linspace(0.02, 1, 80)).square().mean().item()


def test_it_trains_alike() -> None:
    start, (W, plain), (V, short) = distance(torch.nn.Parameter(random(24, 80))), trained(60), trained(60, **SHORT)
    assert distance(W) < 0.5 * start
    assert distance(V) == pytest.approx(distance(W), rel=0.1)
    bytes_ = [sum(x.nbytes for x in o.state[p].values()) / 1920 for p, o in ((W, plain), (V, short))]
    d = (24**2 + 80**2) / 1920
    assert bytes_[0] == pytest.approx(8 + 8 * d + 12 / 1920)
    assert bytes_[1] == pytest.approx(2 + 2 * 2 * 4 / 80 + (4 + 2) * d + 12 / 1920)
    assert {short.state[V][name].dtype for name in ("Q_L", "Q_R")} == {torch.bfloat16}


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path) -> None:
    W, _ = trained(20, **SHORT)
    V, first = trained(9, **SHORT)
    torch.save({"W": V.detach(), "state": first.state_dict()}, tmp_path / "last.pt")
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    U = torch.nn.Parameter(saved["W"])
    again = steepest.SOAP([U], lr=0.03, precondition_frequency=3, weight_decay=0.0, **SHORT)
    again.load_state_dict(saved["state"])
    go_on(U, again, 9, 20)
    assert torch.equal(U, W)
    (copied,) = copy.deepcopy(first).state.values()
    assert all(x.dtype == copied[name].dtype and torch.equal(x, copied[name]) for name, x in first.state[V].items())


@pytest.mark.parametrize("options", [{"basis_dtype": "bfloat16"}, {"moment_dtype": "int8"}])
def test_state_kept_otherwise_is_refused(options) -> None:
    (W, plain), (V, short) = trained(2), trained(2, **options)
    for p, optimizer, other in ((W, plain, short), (V, short, plain)):
        before = {name: x.clone() for name, x in optimizer.state[p].items()}
        with pytest.raises(ValueError, match=r"laid out by other options: (basis|moment)_dtype='"):
            optimizer.load_state_dict(other.state_dict())
        assert all(torch.equal(x, before[name]) for name, x in optimizer.state[p].items())


def test_a_matrix_has_the_same_bits_alone_and_in_a_stack() -> None:
    matrices = [random(16, 64, seed=k) for k in range(3)]

    def run(chosen: list[int]) -> list[Tensor]:
        params = [torch.nn.Parameter(matrices[k].clone()) for k in chosen]
        optimizer = steepest.SOAP(params, lr=0.1, **SHORT)
        for step in range(3):
            for k, p in zip(chosen, params, strict=True):
                p.grad = random(16, 64, seed=10 * k + step)
            optimizer.step()
        return params

    together = run([0, 1, 2])
    assert all(torch.equal(run([k])[0], together[k]) for k in range(3))


def muon(name: str, steps: int, **options: object) -> tuple[torch.nn.Parameter, steepest.Optimizer]:
    W = torch.nn.Parameter(random(24, 80))
    optimizer = steepest.create(name, [W], lr=0.03, weight_decay=0.0, **options)
    return W, go_on(W, optimizer, 0, steps)


MUONS = ["muon", "normuon", "adamuon"]


@pytest.mark.parametrize("name", MUONS)
def test_muon_trains_alike_with_a_momentum_in_8_bits(name: str) -> None:
    (W, _), (V, short) = muon(name, 40), muon(name, 40, moment_dtype="int8")
    assert short.state[V]["momentum_buffer"].dtype == torch.int8
    assert distance(W) < 0.8 * distance(torch.nn.Parameter(random(24, 80)))
    assert not torch.equal(V, W)
    assert distance(V) == pytest.approx(distance(W), rel=0.05)


@pytest.mark.parametrize("name", MUONS)
def test_muon_resumes_bit_for_bit_and_refuses_the_other_layout(name: str) -> None:
    W, _ = muon(name, 12, moment_dtype="int8")
    U, first = muon(name, 5, moment_dtype="int8")
    again = steepest.create(name, [U], lr=0.03, weight_decay=0.0, moment_dtype="int8")
    again.load_state_dict(first.state_dict())
    go_on(U, again, 5, 12)
    assert torch.equal(U, W)
    V, plain = muon(name, 1)
    before = plain.state[V]["momentum_buffer"].clone()
    with pytest.raises(ValueError, match="laid out by other options: moment_dtype='"):
        plain.load_state_dict(first.state_dict())
    assert torch.equal(plain.state[V]["momentum_buffer"], before)


def test_a_momentum_without_a_second_moment_moves_although_its_steps_are_below_a_level() -> None:
    """The first entry holds the scale up, so that a step of the others is less than half of a level."""
    storage = Storage(moments="int8")
    target = torch.full((1, 8, 64), 0.3)
    target[..., 0] = 1.0
    state = {"momentum_buffer": torch.where(target == 1.0, 1.0, 0.0)}
    kept = storage.laid_out(state)
    for t in range(1, 400):
        storage.store(state, kept, torch.full((1, 1, 1), float(t)))
        state = storage.restored(kept)
        state["momentum_buffer"].lerp_(target, 0.01)
    found = state["momentum_buffer"][..., 1:].mean().item()
    assert found == pytest.approx(0.3 * (1 - 0.99**399), rel=0.05)


def test_second_moments_of_rows_stay_as_they_are() -> None:
    V, short = muon("normuon", 1, moment_dtype="int8")
    dtypes = {name: x.dtype for name, x in short.state[V].items()}
    assert (dtypes["exp_avg_sq"], dtypes["momentum_buffer"]) == (torch.float32, torch.int8)


@pytest.mark.parametrize(("name", "value"), [("basis_dtype", "float16"), ("moment_dtype", "bfloat16")])
def test_other_words_are_refused(name, value) -> None:
    with pytest.raises(ValueError, match=f"{name}='{value}': must be one of 'float32'"):
        steepest.SOAP([torch.nn.Parameter(torch.eye(2))], lr=0.1, **{name: value})
