"""Σ δ āᵀ is the gradient of weight and bias, in every situation that training loops make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checked import Checked, Twice, loss_of, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, x: Tensor = X, **options: Any) -> Checked:
    """One forward and backward pass."""
    curvature = Checked(model, **options)
    loss_of(model(x)).backward()
    return curvature


@pytest.mark.parametrize("x", [X, X[0], TOKENS, TOKENS[:, None]], ids=["rows", "one row", "tokens", "two shared axes"])
def test_plain(x):
    curvature = train(mlp(), x)
    curvature.check()
    assert curvature.calls == {"0": 1, "2": 1, "4": 1}
    assert curvature.uncalled() == []


def test_autocast():
    model = mlp()
    curvature = Checked(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model(TOKENS))
        loss.backward()  # within autocast, too: sums are made outside of it
    curvature.check(tolerance=2e-2)
    assert {s.B.dtype for s in curvature.collect().values()} == {torch.float32}


def test_a_forward_pass_without_gradients_before():
    model = mlp()
    curvature = Checked(model)
    with torch.no_grad():
        model(X)
    model.eval()
    model(X).sum().backward()
    assert curvature.calls == {}
    model.zero_grad()
    model.train()
    loss_of(model(X)).backward()
    curvature.check()
    assert set(curvature.calls.values()) == {1}


def test_gradients_that_accumulate():
    model = mlp()
    curvature = Checked(model)
    for half in X.chunk(2):
        (loss_of(model(half)) / 2).backward()
    curvature.check()
    assert set(curvature.calls.values()) == {2}


def test_a_graph_that_is_gone_through_twice():
    model = mlp()
    curvature = Checked(model)
    loss = loss_of(model(X))
    loss.backward(retain_graph=True)
    loss.backward()
    curvature.check()
    assert set(curvature.calls.values()) == {2}


@pytest.mark.parametrize("x", [X, TOKENS], ids=["rows", "tokens"])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_activations_in_place(x, fisher):
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.SiLU(inplace=True), nn.Linear(8, 3)
    )
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))
    plain.load_state_dict(model.state_dict())
    statistics = []
    for net in (model, plain):
        curvature = Checked(net, fisher=fisher)
        outputs = net(x)
        curvature.sample(outputs, "normal")
        loss_of(outputs).backward()
        if fisher == "empirical":
            curvature.check()
        assert set(curvature.calls.values()) == {1}
        statistics.append(list(curvature.collect().values()))
    for ours, theirs in zip(*statistics, strict=True):
        torch.testing.assert_close(ours.B, theirs.B)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.before, self.within, self.after = nn.Linear(4, 8), mlp_8(), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.after(checkpoint(self.within, self.before(x).tanh(), use_reentrant=self.reentrant))


def mlp_8() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    curvature = train(Checkpointed(reentrant))
    curvature.check()
    assert curvature.calls == {"before": 1, "within.0": 1, "within.2": 1, "after": 1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model(reentrant):
    model = mlp()
    curvature = Checked(model)
    loss_of(checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)).backward()
    curvature.check()
    recomputed, curvature = curvature.collect(), train(model)
    for weight, statistics in curvature.collect().items():  # the number of loss terms is right, too
        torch.testing.assert_close(recomputed[weight].B, statistics.B)


def test_samples_need_checkpoints_that_are_not_reentrant():
    model = Checkpointed(reentrant=False)
    curvature = Checked(model, fisher="sampled")
    outputs = model(X)
    curvature.sample(outputs, "normal")
    assert set(curvature.calls.values()) == {1}
    assert len(curvature.calls) == 4
    loss_of(outputs).backward()
    assert set(curvature.calls.values()) == {1}

    model.reentrant = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        curvature.sample(model(X), "normal")


def test_a_module_that_is_used_twice():
    curvature = train(Twice())
    curvature.check()
    assert curvature.calls == {"a": 2, "b": 1}


def test_frozen_layers():
    model = mlp()
    model[2].requires_grad_(False)
    curvature = train(model)
    curvature.check()
    assert curvature.calls == {"0": 1, "4": 1}
    assert curvature.uncalled() == []
    model[2].requires_grad_(True)
    loss_of(model(X)).backward()
    assert curvature.calls["2"] == 1


def test_a_frozen_bias_is_no_column():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    curvature = train(model)
    curvature.check()
    assert curvature.collect()[model.weight].A.shape == (1, 4, 4)


def test_keywords():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=x)

    train(Net()).check()


def test_hooks_of_others():
    """Ours sees the module's own output, whoever came first."""
    model = mlp()
    penalties: list[Tensor] = []

    def penalize(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        penalties.append(output.pow(2).mean() + output.exp().mean())
        return output * 2

    model[0].register_forward_hook(penalize)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    curvature = Checked(model)
    model[2].register_forward_hook(penalize)
    (loss_of(model(X)) + sum(penalties)).backward()
    curvature.check()


class Wrapper(nn.Module):
    """As DDP holds a model: under a name of its own, and calls it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_wrapped_models():
    model = mlp()
    curvature = Checked(model)
    loss_of(Wrapper(model)(X)).backward()
    curvature.check()
    assert set(curvature.calls.values()) == {1}
    within = Checked(Wrapper(mlp()))
    assert [layer.name for layer in within.layers] == ["module.0", "module.2", "module.4"]
    loss_of(within.model(X)).backward()
    within.check()


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "stride": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3)),
    "padding": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1)),
    "dilation": lambda: nn.Conv2d(4, 6, (2, 3), dilation=(3, 2), padding=2),
    "same": lambda: nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: nn.Conv2d(4, 6, 2, padding="valid"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
    "circular same": lambda: nn.Conv2d(4, 6, 2, padding="same", padding_mode="circular"),
    "replicate": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, padding_mode="replicate"),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2),
    "1d same, even": lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3),
    "3d": lambda: nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), dilation=(2, 1, 1), groups=2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("batch", [(3,), ()], ids=["batch", "one image"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, batch):
    model = CONVOLUTIONS[name]()
    x = torch.randn(*batch, 4, *(5, 6, 7)[: model.weight.dim() - 2])
    curvature = Checked(model)
    out = model(x)
    (out * torch.cos(torch.arange(out.numel()).view_as(out))).sum().backward()
    curvature.check()


def test_convolutions_in_place():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(100, 3)
    )
    train(model, torch.randn(3, 2, 6, 6)).check()


def test_blocks_are_bounded_and_add_up(monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(7, 2, 6, 6)
    whole = train(model, x).collect()
    monkeypatch.setattr("steepest.curvature.layer.BLOCK_BYTES", 2 * 16 * 19 * 4)  # two images
    layer = Checked(model).layers[0]
    sizes = [a.shape for a, _ in layer.blocks(x, torch.zeros(7, 4, 4, 4))]
    assert sizes == [(1, 2, 16, 19)] * 3 + [(1, 1, 16, 19)]
    for weight, statistics in train(model, x).collect().items():
        torch.testing.assert_close(statistics.A, whole[weight].A)
        torch.testing.assert_close(statistics.B, whole[weight].B)


class Conv1D(nn.Module):
    """As in Hugging Face's transformers: a linear layer whose weight is [in, out], and whose output is a view."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@pytest.mark.parametrize("inplace", [False, True])
def test_transposed_weights(inplace):
    model = nn.Sequential(Conv1D(8, 4), nn.ReLU(inplace=inplace), Conv1D(3, 8))
    curvature = train(model, TOKENS)
    curvature.check()
    A = curvature.collect()[model[0].weight].A
    assert A.shape == (1, 5, 5)


def test_outputs_that_are_views():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v)

    train(Split(), TOKENS).check()


def test_double_backward_raises():
    model = mlp()
    curvature = Checked(model)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"'4'.*create_graph=True.*steepest\.GaussNewton"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    curvature.listening = False  # in between such losses are like any others
    (u,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    u.square().sum().backward()


def test_transforms_pass_by():
    model = mlp()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, params, (x,)))

    wanted = [torch.func.grad(loss)(params, X), torch.func.vmap(torch.func.grad(loss), (None, 0))(params, X)]
    curvature = Checked(model)
    found = [torch.func.grad(loss)(params, X), torch.func.vmap(torch.func.grad(loss), (None, 0))(params, X)]
    assert curvature.calls == {}
    for ours, theirs in zip(found, wanted, strict=True):
        for name in params:
            assert torch.equal(ours[name], theirs[name])


def test_attention_and_recurrent_layers_are_not_heard():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.lstm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LSTM(4, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.attention(x, x, x)[0])[0])

    curvature = train(Net(), TOKENS)
    curvature.check()
    assert [layer.name for layer in curvature.layers] == ["head"]
