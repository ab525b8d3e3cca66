"""What is summed, what it is divided by, and what is thrown away."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from checked import Checked, close, loss_of, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.curvature import Curvature, Statistics

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def squares(outputs: Tensor) -> Tensor:
    """One loss per row."""
    return (outputs * outputs.detach().cos()).square().sum(-1)


def equal(ours: dict[Tensor, Statistics], theirs: dict[Tensor, Statistics], scale: float = 1.0) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for weight, statistics in ours.items():
        close(statistics.A, theirs[weight].A)
        close(statistics.B, theirs[weight].B * scale)
        if statistics.S is not None and theirs[weight].S is not None:
            close(statistics.S, theirs[weight].S * scale)


def collected(model: nn.Module, losses, **options) -> dict[Tensor, Statistics]:
    """What a step collects whose losses are these, in bases of the unit matrices."""
    curvature = Checked(model, **options)

    def units(weight: Tensor) -> tuple[Tensor, Tensor]:
        layer = next(layer for layer in curvature.layers if layer.weight is weight)
        G, m, n = layer.shape
        return torch.eye(n).double().expand(G, n, n), torch.eye(m).double().expand(G, m, m)

    curvature.bases = units
    for loss in losses:
        loss(model).backward()
    return curvature.collect()


@pytest.mark.parametrize("x", [X, TOKENS], ids=["rows", "tokens"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_mean_and_micro_batches_give_the_same(x, sharing):
    model = mlp(dtype=torch.float64)
    whole = collected(model, [lambda net: squares(net(x)).mean()], sharing=sharing)
    parts = [lambda net, part=part: squares(net(part)).mean() / 3 for part in x.chunk(3)]
    equal(collected(model, parts, sharing=sharing), whole)


def test_a_sum_is_so_many_times_the_mean():
    model = mlp(dtype=torch.float64)
    mean = collected(model, [lambda net: squares(net(X)).mean()])
    equal(collected(model, [lambda net: squares(net(X)).sum()], loss_terms="sum"), mean, scale=6)
    parts = [lambda net, part=part: squares(net(part)).sum() for part in X.chunk(3)]
    equal(collected(model, parts, loss_terms="sum"), mean, scale=6)


def test_loss_terms():
    model = mlp(dtype=torch.float64)
    mask = torch.ones(6, 5).double()
    mask[2:, 3:] = 0  # 22 tokens count
    losses = [lambda net: (squares(net(TOKENS)) * mask).sum() / mask.sum()]
    wanted = collected(model, losses, loss_terms=22)
    equal(collected(model, losses, loss_terms=lambda: mask.sum()), wanted)
    equal(collected(model, losses, loss_terms="rows"), wanted, scale=30 / 22)
    equal(collected(model, losses, loss_terms="batch"), wanted, scale=6 / 22)
    equal(collected(model, losses * 2, loss_terms=lambda: mask.sum()), collected(model, losses * 2, loss_terms=44))


def test_losses_count_by_their_square():
    model = mlp(dtype=torch.float64)
    once = collected(model, [lambda net: squares(net(X)).mean()])
    equal(collected(model, [lambda net: 7 * squares(net(X)).mean()]), once, scale=49)


@pytest.mark.parametrize("out", ["tensor", "tuple", "dict", "object"])
def test_outputs_are_found(out):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(dtype=torch.float64)

        def forward(self, x: Tensor):
            y = self.net(x)
            return {"tensor": y, "tuple": (None, [y]), "dict": {"loss": y.sum(), "hidden": y[:2], "logits": y}}.get(
                out, {"loss": y.sum(), "all": y}
            )

    def read(y):
        return {"tensor": lambda: y, "tuple": lambda: y[1][0], "dict": lambda: y["logits"]}.get(out, lambda: y["all"])()

    model = Net()
    wanted = collected(model, [lambda net: squares(read(net(X))).mean()], loss_terms=6)
    equal(collected(model, [lambda net: squares(read(net(X))).mean()]), wanted)


def test_outputs_of_one_dimension_are_rows():
    model = nn.Sequential(nn.Linear(4, 1, dtype=torch.float64), nn.Flatten(0))
    losses = [lambda net: net(X).square().mean()]
    equal(collected(model, losses), collected(model, losses, loss_terms=6))


def test_a_model_that_is_not_called_itself():
    """Then the layers' own inputs are counted, with a warning."""
    model = nn.ModuleDict({"body": mlp(dtype=torch.float64), "head": nn.Linear(3, 2, dtype=torch.float64)})
    losses = [lambda net: squares(net["head"](net["body"](X))).mean()]
    wanted = collected(model, losses, loss_terms=6)
    with pytest.warns(UserWarning, match="loss_terms='rows': the model was not called itself"):
        equal(collected(model, losses), wanted)
    equal(collected(model, losses, loss_terms=lambda: 6), wanted)


def test_forward_passes_that_lead_nowhere_do_not_count():
    model = mlp(dtype=torch.float64)
    wanted = collected(model, [lambda net: squares(net(X)).mean()])
    curvature = Checked(model)
    model(X)
    squares(model(X)).mean().backward()
    for weight, statistics in curvature.collect().items():
        close(statistics.B, wanted[weight].B)


class Scaler(SimpleNamespace):
    def get_scale(self) -> float:
        self.asked = getattr(self, "asked", 0) + 1
        return self.scale


def test_the_loss_scale_is_divided_out():
    model = mlp(dtype=torch.float64)
    wanted = collected(model, [lambda net: squares(net(X)).mean()])
    scaler = Scaler(scale=1024.0)
    equal(collected(model, [lambda net: 1024 * squares(net(X)).mean()], grad_scaler=scaler), wanted)
    assert scaler.asked == 1  # not once a layer: it waits for the device


def test_a_step_that_the_scaler_skips_leaves_nothing():
    model = mlp(dtype=torch.float64)
    wanted = collected(model, [lambda net: squares(net(X)).mean()])
    scaler = Scaler(scale=1024.0)
    curvature = Checked(model, grad_scaler=scaler)
    (squares(model(X)).mean() * torch.inf).backward()  # no step follows
    scaler.scale = 512.0
    (512 * squares(model(X)).mean()).backward()
    for weight, statistics in curvature.collect().items():
        close(statistics.B, wanted[weight].B)


def test_nan_is_kept_for_the_rule_to_refuse():
    model = mlp(dtype=torch.float64)
    curvature = Checked(model)
    (squares(model(X)).mean() * torch.nan).backward()
    assert all(s.B.isnan().all() and s.A.isfinite().all() for s in curvature.collect().values())
    squares(model(X)).mean().backward()
    assert all(s.B.isfinite().all() for s in curvature.collect().values())


def test_collecting_and_discarding_empty_the_inbox():
    model = mlp()
    curvature = Checked(model)
    loss_of(model(X.float())).backward()
    assert len(curvature.collect()) == 3
    assert curvature.collect() == {}
    loss_of(model(X.float())).backward()
    curvature.discard()
    assert curvature.collect() == {}


def test_what_a_function_of_listening_says_counts_at_each_forward_pass():
    model = mlp()
    curvature = Checked(model)
    due = [False, True]
    curvature.listening = lambda: due[0]
    loss_of(model(X.float())).backward()
    assert curvature.calls == {}
    due.reverse()
    loss_of(model(X.float())).backward()
    assert set(curvature.calls.values()) == {1}


def test_only_the_weights_that_are_wanted():
    model = mlp()
    curvature = Checked(model, only=[model[2].weight])
    loss_of(model(X.float())).backward()
    assert set(curvature.collect()) == {model[2].weight}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_float32_or_finer(dtype):
    model = mlp(dtype=dtype)
    curvature = Checked(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.dtype) or x, lambda x: x):
        loss = loss_of(model(X.to(dtype)))
    loss.backward()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for s in curvature.collect().values() for x in (s.A, s.B)} == {wanted}
    assert set(saved) == {dtype}
    curvature.check(1e-1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "type2"}, "fisher='type2': must be 'empirical' or 'sampled'"),
        ({"sharing": "both"}, "sharing='both': must be 'expand' or 'reduce'"),
        ({"loss_terms": "tokens"}, "loss_terms='tokens': must be"),
        ({"loss_terms": 0}, "loss_terms=0: must be"),
        ({"loss_terms": True}, "loss_terms=True: must be"),
    ],
)
def test_words_that_are_not_known(options, message):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        Curvature(model, **options)
    assert not model._forward_hooks


def test_one_sample_is_a_rank_one_gradient():
    """For N = 1, A and B are the two covariances of the gradient, up to a scale."""
    model = mlp(dtype=torch.float64)
    curvature = Checked(model)
    F.cross_entropy(model(X[:1]), torch.tensor([1])).backward()
    for layer in curvature.layers:
        G = layer.join(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
        s = curvature._inbox[layer.weight]
        for ours, theirs in ((s.A[0], G.T @ G), (s.B[0], G @ G.T)):
            torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), rtol=1e-10, atol=1e-12)
