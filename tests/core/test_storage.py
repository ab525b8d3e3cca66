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
from steepest.engine import elementwise
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


MOMENTA = dict.fromkeys(["muon", "normuon", "adamuon", "dion", "dion2"], "momentum_buffer") | {
    "lion": "exp_avg",
    "adamw": "exp_avg",
}
"""Rules whose momentum can be kept in 8 bits, with its name."""


def descended(rule: str, steps: int, **options: object) -> tuple[torch.nn.Parameter, steepest.Optimizer]:
    W = torch.nn.Parameter(random(24, 80))
    optimizer = steepest.Optimizer([W], rule, lr=0.03, weight_decay=0.0, **options)
    return W, go_on(W, optimizer, 0, steps)


@pytest.mark.parametrize("rule", MOMENTA)
def test_it_descends_alike_with_a_momentum_in_8_bits(rule: str) -> None:
    (W, _), (V, short) = descended(rule, 40), descended(rule, 40, moment_dtype="int8")
    assert short.state[V][MOMENTA[rule]].dtype == torch.int8
    assert distance(W) < 0.9 * distance(torch.nn.Parameter(random(24, 80)))
    assert not torch.equal(V, W)
    assert distance(V) == pytest.approx(distance(W), rel=0.05)


@pytest.mark.parametrize("rule", MOMENTA)
def test_it_resumes_bit_for_bit_and_refuses_the_other_layout(rule: str) -> None:
    W, _ = descended(rule, 12, moment_dtype="int8")
    U, first = descended(rule, 5, moment_dtype="int8")
    again = steepest.Optimizer([U], rule, lr=0.03, weight_decay=0.0, moment_dtype="int8")
    again.load_state_dict(first.state_dict())
    go_on(U, again, 5, 12)
    assert torch.equal(U, W)
    V, plain = descended(rule, 1)
    before = plain.state[V][MOMENTA[rule]].clone()
    with pytest.raises(ValueError, match="laid out by other options: moment_dtype='"):
        plain.load_state_dict(first.state_dict())
    assert torch.equal(plain.state[V][MOMENTA[rule]], before)


@pytest.mark.parametrize("rule", MOMENTA)
def test_a_gradient_that_is_not_finite_leaves_8_bits_as_they_are(rule: str) -> None:
    W, short = descended(rule, 3, moment_dtype="int8")
    before = {name: x.clone() for name, x in short.state[W].items()}
    W.grad = torch.full_like(W, torch.nan)
    short.step()
    assert short.skipped == 1
    assert all(torch.equal(x, before[name]) for name, x in short.state[W].items())


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


@pytest.mark.parametrize("rule", ["dion", "dion2"])
def test_rounding_does_not_pile_up_where_only_what_is_applied_decays(rule: str) -> None:
    """With gradients of a mean and much noise, momenta stay as large, and steps follow the mean as closely."""
    mean, start = 0.2 * random(16, 64, seed=1), random(16, 64)
    followed, sizes = [], []
    for options in ({}, {"moment_dtype": "int8"}):
        W = torch.nn.Parameter(start.clone())
        optimizer = steepest.Optimizer([W], rule, lr=1e-3, weight_decay=0.0, **options)
        for step in range(200):
            W.grad = mean + random(16, 64, seed=100 + step)
            optimizer.step()
        sizes.append(Storage().restored(optimizer.state[W])["momentum_buffer"].norm().item())
        followed.append(torch.cosine_similarity((start - W.detach()).flatten(), mean.flatten(), dim=0).item())
    assert followed[0] > 0.8
    assert followed[1] == pytest.approx(followed[0], abs=0.01)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_second_moments_of_rows_stay_as_they_are() -> None:
    V, short = descended("normuon", 1, moment_dtype="int8")
    dtypes = {name: x.dtype for name, x in short.state[V].items()}
    assert (dtypes["exp_avg_sq"], dtypes["momentum_buffer"]) == (torch.float32, torch.int8)


SHAPES = [(6, 130), (64, 3, 3, 3), (2, 8, 8), (7, 1), (5,), ()]


@pytest.mark.parametrize(("rule", "moments"), [("lion", ["exp_avg"]), ("adamw", ["exp_avg", "exp_avg_sq"])])
def test_parameters_of_any_shape_are_kept_by_rows(rule: str, moments: list[str]) -> None:
    params = [torch.nn.Parameter(random(*shape)) for shape in SHAPES]
    optimizer = steepest.Optimizer(params, rule, lr=0.1, moment_dtype="int8")
    for p, blocks in zip(params, [18, 64, 2, 0, 0, 0], strict=True):
        p.grad = torch.ones_like(p)
        for name in moments:
            assert optimizer.state[p][name].shape == p.shape
            scales = optimizer.state[p].get(f"{name}_scale", torch.empty(0))
            assert scales.numel() == blocks
            assert optimizer.state[p][name].itemsize == (1 if blocks else 4)
    optimizer.step()
    for p in params:  # a constant gradient is the largest of its block, which is coded exactly
        found = optimizer.state[p]["exp_avg"].double()
        if p.dim() > 1 and p[0].numel() > 1:
            assert (found == 127).all()
            assert optimizer.state[p]["exp_avg_scale"].unique().numel() == 1
        else:
            assert found.flatten()[0].item() == pytest.approx(0.01 if rule == "lion" else 0.1)


@pytest.mark.parametrize(("first", "shape"), [(2, (3, 5, 70)), (1, (5, 10, 7)), (1, (4, 3))])
def test_the_mean_over_many_roundings_is_what_was_stored(first: int, shape: tuple[int, ...]) -> None:
    storage, rounds = Storage(moments="int8"), 400
    state = {"momentum_buffer": random(*shape)}
    kept = storage.laid_out(state, first)
    total = torch.zeros(shape)
    for t in range(1, rounds + 1):
        storage.store(state, kept, torch.tensor(float(t)).view((-1, 1, 1) if first == 2 else ()))
        total += storage.restored(kept)["momentum_buffer"]
    level = kept["momentum_buffer_scale"].max()
    off = (total / rounds - state["momentum_buffer"]).abs()
    assert off.max() < 0.15 * level  # six standard deviations of a mean of 400; rounding to nearest is up to half off
    assert off.max() > 0


def test_a_shard_is_rounded_as_it_is_within_the_whole() -> None:
    storage, x, t = Storage(moments="int8"), random(6, 10, 9), torch.tensor(3.0)
    whole, part = (storage.laid_out({"exp_avg": rows}, first=1) for rows in (x, x[2:5]))
    storage.store({"exp_avg": x}, whole, t)
    storage.store({"exp_avg": x[2:5]}, part, t, torch.arange(540).view(6, 10, 9)[2:5])
    assert all(torch.equal(part[name], whole[name][2:5]) for name in part)
    assert {name: tuple(x.shape) for name, x in part.items()} == {"exp_avg": (3, 10, 9), "exp_avg_scale": (3, 2)}


def test_rows_may_be_stored_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    (W, _), _ = descended("lion", 4, moment_dtype="int8"), monkeypatch.setattr(elementwise, "STORED_AT_ONCE", 160)
    V, _ = descended("lion", 4, moment_dtype="int8")
    assert torch.equal(V, W)


def test_flat_parts_of_parameters_are_refused() -> None:
    p = torch.nn.Parameter(torch.ones(12))
    p._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"parameter 0 of shape \[12\] is cut into flat parts by FSDP1, and lion with"):
        steepest.Lion([p], moment_dtype="int8")
    steepest.Lion([p])


@pytest.mark.parametrize(("name", "value"), [("basis_dtype", "float16"), ("moment_dtype", "bfloat16")])
def test_other_words_are_refused(name, value) -> None:
    with pytest.raises(ValueError, match=f"{name}='{value}': must be one of 'float32'"):
        steepest.SOAP([torch.nn.Parameter(torch.eye(2))], lr=0.1, **{name: value})
