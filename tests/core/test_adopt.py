"""What another optimizer knew is taken over: the next steps are those that it would have taken."""

from functools import partial
from importlib import import_module

import pytest
import torch
from other_optimizers import SHAPES, Dion, Soap, SummingMuon, out_of, parameters, shapes, train
from torch import nn

import steepest
from steepest.lab.shared.peers import EAGER

UNGUARDED = {"guards": False, "match_columns": False}


def differences(make_peer, make, shapes=SHAPES, dtype=torch.float64, adopts=True, before=7, steps=20):
    """How far apart 20 further steps of both optimizers end, in terms of the peer's way; and what was adopted."""
    theirs = parameters(shapes, dtype)
    peer = make_peer(list(theirs.values()))
    train(theirs, peer, range(before))
    start = {name: p.detach().clone() for name, p in theirs.items()}
    ours = {name: nn.Parameter(x.clone()) for name, x in start.items()}
    optimizer = make(list(ours.items()))
    adoption = steepest.adopt(optimizer, peer.state_dict(), list(theirs)) if adopts else None
    train(theirs, peer, range(before, before + steps))
    train(ours, optimizer, range(before, before + steps))
    way = {name: theirs[name].detach() - start[name] for name in theirs}
    return {n: ((ours[n] - theirs[n]).norm() / way[n].norm()).item() for n in theirs}, adoption


def check_continues(make_peer, make, tolerance=1e-4, **more):
    """20 steps agree, and would not without what was taken over."""
    apart, adoption = differences(make_peer, make, **more)
    assert max(apart.values()) < tolerance, (apart, str(adoption))
    fresh, _ = differences(make_peer, make, adopts=False, **more)
    assert min(fresh.values()) > 100 * tolerance, fresh
    assert not any(row.fresh for row in adoption.rows), str(adoption)
    return adoption


# torch.optim.


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_continues(amsgrad):
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": amsgrad}
    check_continues(
        lambda params: torch.optim.AdamW(params, **options),
        lambda named: steepest.Optimizer(named, rule="adamw", **options),
    )


def test_soap_without_bases_continues_adamw():
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0}
    for timing in ("before", "after"):
        check_continues(
            lambda params: torch.optim.AdamW(params, **options),
            lambda named, timing=timing: steepest.SOAP(
                named, **options, max_precond_dim=0, basis_timing=timing, guards=False
            ),
        )


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_of_torch_continues(nesterov, scale, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # in which it would iterate
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    check_continues(
        lambda params: torch.optim.Muon(params, **options, adjust_lr_fn=scale),
        lambda named: steepest.Muon(named, **options, scale=scale, ns_dtype="float32"),
        shapes=shapes("a", "c", "d"),
    )


def test_the_momentum_of_sgd_becomes_an_average():
    params = parameters(shapes("a"))
    sgd = torch.optim.SGD(params.values(), lr=0.0, momentum=0.9)
    train(params, sgd, range(5))
    average = torch.zeros(6, 4, dtype=torch.float64)
    for step in range(5):
        train(params, torch.optim.SGD(params.values(), lr=0.0), [step])
        average = 0.9 * average + 0.1 * params["a"].grad
    muon = steepest.Muon(params.items(), lr=1e-2)
    assert steepest.adopt(muon, sgd.state_dict()).rows[0].taken == ("momentum_buffer",)
    torch.testing.assert_close(muon.state[params["a"]]["momentum_buffer"], average)


# Other algorithms, as their papers have them and their authors' code lays out their state.


SOAP = {"lr": 1e-2, "betas": (0.95, 0.95), "shampoo_beta": 0.9, "weight_decay": 0.1, "precondition_frequency": 3}
AS_ITS_AUTHORS = {"basis_timing": "after", "correct_shampoo_beta_bias": False, "solver": "qr", **UNGUARDED}


@pytest.mark.parametrize("limit", [10, 5])
@pytest.mark.parametrize("before", [1, 2, 7])
def test_soap_by_its_authors_continues(limit, before):
    """With a limit of 5 only sides of 4 and 5 have a basis; after one call there is only a basis."""
    check_continues(
        lambda params: Soap(params, **SOAP, max_precond_dim=limit),
        lambda named: steepest.SOAP(named, **SOAP, **AS_ITS_AUTHORS, max_precond_dim=limit),
        before=before,
    )


def as_pytorch_optimizer(state, options):
    """The first moment in the gradients' coordinates, and a step for the whole group that counts every call."""
    entries = {name: state[name] for name in ("GG", "Q", "exp_avg_sq")}
    return entries | {"exp_avg": out_of(state["exp_avg"], state["Q"])}, {"step": state["step"] + 1}


def as_heavyball(state, options):
    """A batch of one block, the bias of averages corrected, and a step for the whole group that counts every call."""
    parts = {name: [x.unsqueeze(0) if len(x) else None for x in state[name]] for name in ("GG", "Q")}
    for name, beta in zip(("exp_avg", "exp_avg_sq"), options["betas"], strict=True):
        parts[name] = state[name].unsqueeze(0) / (1 - beta ** state["step"])
    return {0: {f"scale_by_soap_{name}_2": x for name, x in parts.items()}}, {"step_count": state["step"] + 1}


@pytest.mark.parametrize("layout", [as_pytorch_optimizer, as_heavyball])
def test_the_layouts_of_other_libraries_mean_the_same(layout):
    params = parameters(shapes("a", "b", "c"))
    peer = Soap(params.values(), **SOAP, max_precond_dim=5)
    train(params, peer, range(7))
    authors = peer.state_dict()
    (group,) = authors["param_groups"]
    laid_out = [layout(state, group) for state in authors["state"].values()]
    saved = {
        "state": {i: entries for i, (entries, _) in enumerate(laid_out)},
        "param_groups": [group | laid_out[0][1]],
    }
    make = partial(steepest.SOAP, lr=1e-2, basis_timing="after", max_precond_dim=5)
    first, second = make(params.values()), make(params.values())
    steepest.adopt(first, authors)
    steepest.adopt(second, saved)
    for p in params.values():
        assert first.state[p]["exp_avg"].any()
        for name, x in first.state[p].items():
            torch.testing.assert_close(second.state[p][name], x)


def test_vectors_of_soap_go_to_adamw():
    check_continues(
        lambda params: Soap(params, **SOAP | {"weight_decay": 0.0}, max_precond_dim=10),
        lambda named: steepest.Optimizer(named, rule="adamw", lr=1e-2, betas=(0.95, 0.95), weight_decay=0.0),
        shapes=shapes("b"),
    )


def test_a_transposed_matrix_of_soap_continues():
    """Seen the other way round, its sides change places."""
    check_continues(
        lambda params: Soap(params, **SOAP, max_precond_dim=10),
        lambda named: steepest.SOAP([{"params": named, "transpose": True}], **SOAP, **AS_ITS_AUTHORS),
        shapes=shapes("a", "c"),
    )


MOONLIGHT = {"momentum": 0.9, "wd": 0.0, "nesterov": True, "ns_steps": 5, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8}


@pytest.mark.parametrize("options", [MOONLIGHT, {"mu": 0.9, "algorithm": "muon", "step": 0}], ids=["moonlight", "dion"])
def test_muon_on_a_sum_of_gradients_continues(options):
    check_continues(
        lambda params: SummingMuon(params, {"lr": 1e-2} | options),
        lambda named: steepest.Muon(named, lr=1e-2, momentum=0.9, weight_decay=0.0, ns="exact"),
        shapes=shapes("a", "c", "d"),
    )


DION = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.0, "rank_fraction": 0.5, "scale": "mup", "orthonormalize": "qr"}


def make_dion(params):
    return Dion(params, {"lr": 1e-2, "mu": 0.9, "algorithm": "dion", "step": 0})


def test_dion_continues():
    check_continues(make_dion, lambda named: steepest.Dion(named, **DION), shapes=shapes("a", "d"))


def test_a_basis_of_dion_on_the_longer_side_starts_fresh():
    """A wide matrix is transposed here, and only its momentum means the same."""
    _, adoption = differences(make_dion, lambda named: steepest.Dion(named, **DION), shapes=shapes("c"))
    assert (adoption.rows[0].taken, adoption.rows[0].fresh) == (("momentum_buffer",), ("Q",))


# Other libraries.

PLAIN = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.0}


def test_soap_of_pytorch_optimizer_continues():
    peers = pytest.importorskip("pytorch_optimizer")
    check_continues(
        lambda params: peers.SOAP(params, **SOAP, max_precondition_dim=5),
        lambda named: steepest.SOAP(named, **SOAP, **AS_ITS_AUTHORS, max_precond_dim=5),
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_of_pytorch_optimizer_continues(nesterov, monkeypatch):
    peers = pytest.importorskip("pytorch_optimizer")
    base = import_module("pytorch_optimizer.optimizer.muon.base")
    iterate = partial(base.zero_power_via_newton_schulz_5, dtype=torch.float64)  # and not in bfloat16
    monkeypatch.setattr(base, "zero_power_via_newton_schulz_5", iterate)
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    check_continues(
        lambda params: peers.Muon([{"params": params, "use_muon": True}], **options),
        lambda named: steepest.Muon(named, **options, scale="original", ns_dtype="float32"),
        shapes=shapes("a", "c", "d"),
    )


@pytest.mark.parametrize(("kl", "before"), [(False, 7), (True, 120)])
def test_soap_of_heavyball_continues(kl, before):
    """Its KL-SOAP starts with eigenvalues of 1e8, which have to be forgotten before roundings agree.

    It refreshes when a sum of sevenths reaches an integer, which is every seventh step here, as in ours.
    """
    heavyball = pytest.importorskip("heavyball")
    options = PLAIN | {"shampoo_beta": 0.6, "precondition_frequency": 7}
    with EAGER():
        check_continues(
            lambda params: (heavyball.KLSOAP if kl else heavyball.SOAP)(
                params, **options, max_precond_dim=10, storage_dtype="float64"
            ),
            lambda named: steepest.SOAP(
                named, **options, basis_timing="after", solver="qr", use_kl_shampoo=kl, **UNGUARDED
            ),
            before=before,
        )


def test_a_convolution_of_heavyball_continues():
    """It sees one as the same matrix: outputs by everything else."""
    heavyball = pytest.importorskip("heavyball")
    options = PLAIN | {"shampoo_beta": 0.6, "precondition_frequency": 7}
    with EAGER():
        check_continues(
            lambda params: heavyball.SOAP(params, **options, storage_dtype="float64"),
            lambda named: steepest.SOAP(named, **options, basis_timing="after", solver="qr", **UNGUARDED),
            shapes={"conv": (4, 2, 2, 2)},
        )


def test_adamw_of_heavyball_continues():
    heavyball = pytest.importorskip("heavyball")
    with EAGER():
        check_continues(
            lambda params: heavyball.AdamW(params, **PLAIN, storage_dtype="float64"),
            lambda named: steepest.Optimizer(named, rule="adamw", **PLAIN),
        )
