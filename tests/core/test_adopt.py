"""What another optimizer knew is taken over: the next steps are those that it would have taken."""

import pytest
import torch
from torch import nn

import steepest
from steepest.lab.bench.peers import EAGER

SHAPES = {"a": (6, 4), "b": (4,), "c": (5, 7), "d": (6, 4)}
UNGUARDED = {"guards": False, "match_columns": False}


def parameters(shapes=SHAPES, dtype=torch.float64):
    """Named parameters with values of their own."""
    draw = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype)) for n, s in shapes.items()}


def train(params, optimizer, steps):
    """Steps whose gradients depend on the weights, so that a difference would feed on itself."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in params.values():
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64)
            p.grad = (0.3 * p.detach() + noise * torch.linspace(0.5, 2, p.shape[-1]).double()).to(p.dtype)
        optimizer.step()


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


def shapes(*names):
    return {name: SHAPES[name] for name in names}


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


class Soap(torch.optim.Optimizer):
    """SOAP (arXiv:2409.11321, Algorithm 3) on vectors and matrices, with the state of its authors' code."""

    def __init__(self, params, **options):
        super().__init__(params, {"betas": (0.95, 0.95), "shampoo_beta": 0.9, "eps": 1e-8} | options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for W in group["params"]:
                self.step_one(W, self.state[W], group)

    def step_one(self, W, state, group):
        G, (beta1, beta2) = W.grad, group["betas"]
        if "Q" not in state:  # the first gradient only seeds the basis
            small = [W.dim() == 2 and d <= group["max_precond_dim"] for d in W.shape]
            state |= {"step": 0, "exp_avg": torch.zeros_like(W), "exp_avg_sq": torch.zeros_like(W)}
            state["GG"] = [torch.zeros(d, d, dtype=W.dtype) if s else [] for s, d in zip(small, W.shape, strict=True)]
            self.feed(G, state, group)
            state["Q"] = [torch.linalg.eigh(K)[1].flip(1) if len(K) else [] for K in state["GG"]]
            return
        state["step"] += 1
        t = state["step"]
        P = into(G, state["Q"])
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * P
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * P**2
        u = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        W -= group["lr"] * out_of(u, state["Q"])
        W -= group["lr"] * group["weight_decay"] * W
        self.feed(G, state, group)
        if t % group["precondition_frequency"] == 0:
            momentum = out_of(state["exp_avg"], state["Q"])
            for i, (K, Q) in enumerate(zip(state["GG"], state["Q"], strict=True)):
                if len(K):
                    order = (Q.T @ K @ Q).diagonal().argsort(descending=True)
                    state["exp_avg_sq"] = state["exp_avg_sq"].index_select(i, order)
                    state["Q"][i] = torch.linalg.qr(K @ Q[:, order])[0]
            state["exp_avg"] = into(momentum, state["Q"])

    def feed(self, G, state, group):
        for K, new in zip(state["GG"], (G @ G.T, G.T @ G) if G.dim() == 2 else (), strict=False):
            if len(K):
                K.lerp_(new, 1 - group["shampoo_beta"])


def into(x, Q):
    x = Q[0].T @ x if len(Q[0]) else x
    return x @ Q[1] if len(Q) == 2 and len(Q[1]) else x


def out_of(x, Q):
    x = Q[0] @ x if len(Q[0]) else x
    return x @ Q[1].T if len(Q) == 2 and len(Q[1]) else x


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
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
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


def test_adamw_of_heavyball_continues():
    heavyball = pytest.importorskip("heavyball")
    with EAGER():
        check_continues(
            lambda params: heavyball.AdamW(params, **PLAIN, storage_dtype="float64"),
            lambda named: steepest.Optimizer(named, rule="adamw", **PLAIN),
        )
