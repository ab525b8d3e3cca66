"""Optimizers as their papers have them, each with the state that its authors' code keeps; and a training for them."""

import torch
from torch import nn

SHAPES = {"a": (6, 4), "b": (4,), "c": (5, 7), "d": (6, 4)}


def shapes(*names):
    return {name: SHAPES[name] for name in names}


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


class SummingMuon(torch.optim.Optimizer):
    """Muon on a sum of gradients, with the options and the state of Moonlight's or of microsoft/dion's code."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            μ = group.get("mu", group.get("momentum"))
            entry = "momentum" if "algorithm" in group else "momentum_buffer"
            for W in group["params"]:
                M = self.state[W][entry] = μ * self.state[W].get(entry, torch.zeros_like(W)) + W.grad
                U, _, V = torch.linalg.svd(W.grad + μ * M, full_matrices=False)
                W -= group["lr"] * 0.2 * max(W.shape) ** 0.5 * U @ V


class Dion(torch.optim.Optimizer):
    """Dion (arXiv:2504.05295, Algorithm 1), with the state of microsoft/dion: Q has a row for each column of M."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for W in group["params"]:
                state = self.state[W]
                if not state:
                    Q = torch.randn(W.shape[1], 2, dtype=W.dtype, generator=torch.Generator().manual_seed(1))
                    state |= {"momentum": torch.zeros_like(W), "Q": Q}
                M = state["momentum"] + W.grad
                P = torch.linalg.qr(M @ state["Q"])[0]
                R = M.T @ P
                state["momentum"] = M - (1 - group["mu"]) * P @ R.T
                state["Q"] = R / R.norm(dim=0)
                W -= group["lr"] * (W.shape[0] / W.shape[1]) ** 0.5 * P @ state["Q"].T
