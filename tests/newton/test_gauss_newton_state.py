"""What Gauss-Newton keeps between steps, and what it leaves alone."""

import copy
import pickle
import warnings

import pytest
import torch
from networks import fit, flat, network, random
from torch import nn

from steepest import GaussNewton, Residual

# State.


@pytest.mark.parametrize("solver", ["dense", "cg"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_resuming_is_exact_to_the_bit(solver, dtype, how, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model, residual = network(2, 5, 1).to(dtype), fit()
        residual = Residual(residual_function, *(x.to(dtype) for x in residual.data))
        optimizer = GaussNewton(model, solver=solver)
        for _ in range(3):
            optimizer.step(residual)
        if how == "state_dict":
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
            weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            other = network(2, 5, 1, seed=9).to(dtype)
            other.load_state_dict(weights)
            resumed = GaussNewton(other, solver=solver, damping=7.0)
            resumed.load_state_dict(state)
        else:
            resumed = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
            other = resumed.model
    assert other is not model
    for _ in range(3):
        assert torch.equal(optimizer.step(residual), resumed.step(residual))
    assert torch.equal(flat(model), flat(other))
    ours, theirs = optimizer.state_dict(), resumed.state_dict()
    assert ours["param_groups"][0].keys() == theirs["param_groups"][0].keys()
    for name, x in ours["state"][0].items():
        assert torch.equal(x, theirs["state"][0][name]), name
        assert x.dim() == 0 or x.shape == (21,)


def residual_function(u, x, y):
    return u(x) - y


def test_a_copy_together_with_its_model_keeps_to_it():
    model = network(2, 5, 1)
    optimizer = GaussNewton(model)
    copied, other = copy.deepcopy((optimizer, model))
    assert copied.model is other
    copied.step(fit())
    assert not torch.equal(flat(other), flat(model))
    with pytest.raises(ValueError, match="damping=-1"):
        copied.add_param_group({"params": [nn.Parameter(random(2))], "damping": -1})


def test_groups_frozen_and_tied_parameters():
    """Two groups step like one; what is frozen stays; the weight that two layers share moves once."""

    def tied():
        model = network(3, 3, 3, 1)
        model[2].weight = model[0].weight
        model[2].bias.requires_grad_(False)
        return model

    models = [tied(), tied()]
    x = random(9, 3)
    residual = Residual(lambda u, x: u(x) - x.prod(), x)
    optimizers = [GaussNewton(models[0])]
    first, *rest = [p for p in models[1].parameters() if p.requires_grad]
    optimizers.append(GaussNewton(models[1], [{"params": [first]}, {"params": rest}]))
    for optimizer in optimizers:
        for _ in range(4):
            optimizer.step([residual])
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=0, atol=0)
    assert torch.equal(models[0][2].bias, tied()[2].bias)
    assert models[0][2].weight is models[0][0].weight
    assert not torch.equal(models[0][0].weight, tied()[0].weight)


def test_some_parameters_alone_are_moved():
    model = network(2, 5, 1)
    last = model[2].weight
    others = [p.detach().clone() for p in model.parameters() if p is not last]
    GaussNewton(model, [last]).step(fit())
    assert all(torch.equal(a, b) for a, b in zip(others, [p for p in model.parameters() if p is not last], strict=True))
    assert not torch.equal(last, network(2, 5, 1)[2].weight)


def test_the_random_state_gradients_and_mode_are_left_alone():
    model = network(2, 5, 1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = torch.get_rng_state()
    for solver in ("dense", "cg"):
        GaussNewton(model, solver=solver).step(fit())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.is_grad_enabled()
