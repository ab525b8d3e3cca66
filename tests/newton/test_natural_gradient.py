"""The natural gradient: golden directions by every solver, the loss' scale, bounds, and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steepest import NaturalGradient

LOSSES = {
    "ce": (F.cross_entropy, "categorical"),
    "mse": (lambda o, y: 0.5 * (o - y).square().sum(1).mean(), "normal"),
    "bce": (F.binary_cross_entropy_with_logits, "bernoulli"),
}


def build(numbers, rows=6):
    """The golden file's net, and its closure for the first rows of the data."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    net.load_state_dict({name: torch.tensor(x, dtype=torch.float64) for name, x in numbers["params"].items()})
    x = torch.tensor(numbers["x"], dtype=torch.float64)[:rows]
    y = torch.tensor(numbers["y"], dtype=torch.long if numbers["loss"] == "ce" else torch.float64)[:rows]

    def closure():
        outputs = net(x)
        return outputs, LOSSES[numbers["loss"]][0](outputs, y)

    return net, closure


@pytest.fixture
def numbers(golden):
    return {case["loss"]: case for case in golden("curvature_products")["cases"]}


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def tiny(**options):
    """Options under which a step is ``1e-3`` times the natural gradient, unbounded."""
    return {"lr": 1e-3, "max_kl": 0.0, "damping": 0.01, "tolerance": 1e-13, "products": 1000} | options


def direction(net, closure, **options):
    before = flat(net.parameters())
    NaturalGradient(net.parameters(), **tiny(**options)).step(closure)
    return (before - flat(net.parameters())) / 1e-3


# The direction.


@pytest.mark.parametrize("solver", ["dense", "cg", "auto"])
@pytest.mark.parametrize("loss", LOSSES)
def test_directions_match_the_golden_numbers(numbers, loss, solver):
    """With 18 outputs of 31 parameters the dense system is the dual; bce is a mean over entries, c = 1/3."""
    net, closure = build(numbers[loss])
    found = direction(net, closure, likelihood=LOSSES[loss][1], solver=solver)
    expected = torch.tensor(numbers[loss]["natural_direction"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("penalty", [0.0, 0.05])
@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("loss", LOSSES)
def test_primal_dual_and_conjugate_gradients_agree(numbers, loss, rows, penalty):
    """The primal has fewer parameters than outputs, when only the last layer is trained."""
    found = {}
    for trained, solver in [("all", "dense"), ("all", "cg"), ("bias", "dense"), ("bias", "cg")]:
        net, closure = build(numbers[loss], rows)
        net.requires_grad_(trained == "all")
        net[2].bias.requires_grad_(True)

        def penalized(net=net, closure=closure):
            outputs, value = closure()
            return outputs, value + penalty * sum(p.square().sum() for p in net.parameters())

        found[trained, solver] = direction(net, penalized, likelihood=LOSSES[loss][1], solver=solver)
    for trained in ("all", "bias"):
        torch.testing.assert_close(found[trained, "dense"], found[trained, "cg"], rtol=1e-8, atol=1e-10)


def test_the_direction_does_not_depend_on_the_parametrization(numbers):
    """Without damping the outputs change alike where a layer's input is mapped linearly."""
    case, T = numbers["mse"], torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    x = torch.tensor(case["x"], dtype=torch.float64)
    y = torch.tensor(case["y"], dtype=torch.float64)
    changes = []
    for mapped in (False, True):
        net = nn.Linear(3, 2).double()
        torch.nn.init.zeros_(net.weight)
        torch.nn.init.zeros_(net.bias)
        inputs = x @ T if mapped else x

        def closure(net=net, inputs=inputs):
            o = net(inputs)
            return o, 0.5 * (o - y[:, :2]).square().sum(1).mean()

        direction(net, closure, likelihood="normal", damping=1e-10)
        changes.append(net(inputs).detach())
    torch.testing.assert_close(*changes, rtol=1e-6, atol=1e-9)
    assert changes[0].abs().max() > 1e-5


# The scale of the loss.


@pytest.mark.parametrize("scale", [1 / 3, 1.0, 7.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_multiple_of_the_loss_has_the_same_natural_gradient(numbers, loss, scale):
    net, closure = build(numbers[loss])
    plain = direction(net, closure, likelihood=LOSSES[loss][1], damping=1e-3)
    net, closure = build(numbers[loss])

    def scaled():
        outputs, value = closure()
        return outputs, scale * value

    found = direction(net, scaled, likelihood=LOSSES[loss][1], damping=1e-3 * scale)
    torch.testing.assert_close(found, plain, rtol=1e-8, atol=1e-10)


def test_another_loss_needs_its_scale(numbers):
    net, closure = build(numbers["ce"])

    def policy():  # of an advantage for each row
        outputs, _ = closure()
        advantage = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 1.0], dtype=torch.float64)
        return outputs, -(outputs.log_softmax(1)[:, 0] * advantage).mean()

    before = flat(net.parameters())
    with pytest.raises(ValueError, match=r"the loss is no multiple.*loss_scale=1.0"):
        NaturalGradient(net.parameters()).step(policy)
    assert torch.equal(flat(net.parameters()), before)
    start = float(policy()[1].detach())
    NaturalGradient(net.parameters(), loss_scale=1.0).step(policy)
    assert float(policy()[1].detach()) < start


@pytest.mark.parametrize(("loss", "likelihood"), [("ce", "normal"), ("mse", "categorical"), ("bce", "categorical")])
def test_the_likelihood_of_another_loss_is_refused(numbers, loss, likelihood):
    net, closure = build(numbers[loss])
    optimizer = NaturalGradient(net.parameters(), likelihood=likelihood)
    with pytest.raises(ValueError, match=f"no multiple of the negative log likelihood of likelihood='{likelihood}'"):
        optimizer.step(closure)
    assert all(float(entries["step"]) == 0 for entries in optimizer.state.values())


def test_padded_rows_are_refused(numbers):
    net, closure = build(numbers["ce"])

    def padded():
        outputs, _ = closure()
        return outputs, F.cross_entropy(outputs, torch.tensor([0, 1, 2, -100, -100, 0]))

    with pytest.raises(ValueError, match="leave padded rows out of the outputs"):
        NaturalGradient(net.parameters()).step(padded)


def test_certain_predictions_do_no_harm():
    """In float32 probabilities of 0 and 1 leave a Fisher matrix of zeros, or of rounding."""
    for size in (10.0, 17.0, 30.0, 1000.0):
        logits = nn.Parameter(torch.tensor([[size, -size], [-size, size]]))
        NaturalGradient([logits]).step(lambda logits=logits: (logits, F.cross_entropy(logits, torch.tensor([0, 1]))))
        assert logits.isfinite().all()


# The length.


@pytest.mark.parametrize("solver", ["dense", "cg"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_divergence_is_bounded(numbers, loss, solver):
    net, closure = build(numbers[loss])
    before = closure()[0].detach()
    likelihood = LOSSES[loss][1]
    NaturalGradient(net.parameters(), likelihood=likelihood, max_kl=1e-6, damping=1e-3, solver=solver).step(closure)
    after = closure()[0].detach()
    divergence = {
        "categorical": lambda: F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="sum"),
        "normal": lambda: 0.5 * (after - before).square().sum(),
        "bernoulli": lambda: (
            F.binary_cross_entropy_with_logits(after, before.sigmoid(), reduction="sum")
            - F.binary_cross_entropy_with_logits(before, before.sigmoid(), reduction="sum")
        ),
    }[likelihood]()
    assert float(divergence) / len(before) == pytest.approx(1e-6, rel=0.02)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_never_rises_and_goes_down(numbers, loss):
    net, closure = build(numbers[loss])
    optimizer = NaturalGradient(net.parameters(), likelihood=LOSSES[loss][1], lr=4.0, max_kl=0.0, damping=1e-4)
    losses = [float(optimizer.step(closure)) for _ in range(20)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.3 * losses[0]


def test_a_failed_step_leaves_the_weights_bit_for_bit(numbers):
    net, closure = build(numbers["ce"])
    before, calls = flat(net.parameters()), []

    def rising():
        calls.append(1)
        outputs, loss = closure()
        return outputs, loss + len(calls)

    NaturalGradient(net.parameters()).step(rising)
    assert torch.equal(flat(net.parameters()), before)
    assert len(calls) == 12


def test_a_rate_of_zero_moves_nothing(numbers):
    net, closure = build(numbers["ce"])
    before = flat(net.parameters())
    NaturalGradient(net.parameters(), lr=0.0).step(closure)
    assert torch.equal(flat(net.parameters()), before)


@pytest.mark.parametrize("solver", ["dense", "cg"])
@pytest.mark.parametrize("where", ["loss", "outputs", "constant"])
def test_what_is_not_finite_moves_nothing(numbers, where, solver):
    net, closure = build(numbers["ce"])
    before = flat(net.parameters())

    def broken():
        outputs, loss = closure()
        if where == "loss":
            return outputs, loss * math.nan
        if where == "constant":
            return outputs, loss + math.inf
        outputs = outputs * torch.tensor([math.inf, 1, 1], dtype=torch.float64)
        return outputs, F.cross_entropy(outputs, torch.zeros(6, dtype=torch.long))

    optimizer = NaturalGradient(net.parameters(), solver=solver)
    optimizer.step(broken)
    assert torch.equal(flat(net.parameters()), before)
    assert float(optimizer.state[net[0].weight]["skipped"]) == 1
    optimizer.step(closure)
    assert not torch.equal(flat(net.parameters()), before)


def test_a_resumed_run_repeats_every_bit(numbers):
    net, closure = build(numbers["ce"])
    optimizer = NaturalGradient(net.parameters(), damping=1e-3)
    for _ in range(2):
        optimizer.step(closure)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        optimizer.step(closure)
    other, again = build(numbers["ce"])
    other.load_state_dict(weights)
    resumed = NaturalGradient(other.parameters())
    resumed.load_state_dict(state)
    for _ in range(2):
        resumed.step(again)
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))


# Bad use.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"likelihood": "poisson"}, "likelihood='poisson': must be one of 'categorical', 'normal', 'bernoulli'"),
        ({"lr": -1.0}, "lr=-1.0: must be a number >= 0"),
        ({"damping": 0.0}, "damping=0.0: must be a number above 0"),
        ({"max_kl": math.inf}, "max_kl=inf: must be a number >= 0"),
        ({"loss_scale": 0}, "loss_scale=0: must be None or a number above 0"),
        ({"solver": "lu"}, "solver='lu': must be 'auto', 'dense' or 'cg'"),
        ({"tolerance": 0}, "tolerance=0: must be a number between 0 and 1"),
        ({"products": 1.5}, "products=1.5: must be an integer >= 1"),
    ],
)
def test_options_out_of_range_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        NaturalGradient([nn.Parameter(torch.ones(2))], **given)


def test_a_closure_must_return_outputs(numbers):
    net, closure = build(numbers["ce"])
    optimizer = NaturalGradient(net.parameters())
    with pytest.raises(TypeError, match=r"NaturalGradient.step\(\) needs a closure that returns \(outputs, loss\)"):
        optimizer.step()
    with pytest.raises(
        TypeError, match=r"the closure returned the loss alone: NaturalGradient needs \(outputs, loss\)"
    ):
        optimizer.step(lambda: closure()[1])
    with pytest.raises(ValueError, match="no graph behind the outputs"):
        optimizer.step(lambda: (closure()[0].detach(), closure()[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused(dtype):
    with pytest.raises(ValueError, match=f"parameters of {dtype}: NaturalGradient needs float32 or float64"):
        NaturalGradient([nn.Parameter(torch.zeros(2, dtype=dtype))])


def test_the_model_itself_will_do() -> None:
    model = nn.Linear(2, 2)
    optimizer = NaturalGradient(model, likelihood="categorical")
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
