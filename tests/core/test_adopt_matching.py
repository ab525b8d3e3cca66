"""Which saved parameter is which, what starts fresh and why, and what is refused before anything has changed."""

from functools import partial

import pytest
import torch
from other_optimizers import Soap, parameters, shapes, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import steepest

SOAP = {"lr": 1e-2, "betas": (0.95, 0.95), "shampoo_beta": 0.9, "weight_decay": 0.1, "precondition_frequency": 3}


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6))


def adamw_of(named, steps=3, **options):
    """An AdamW after some steps."""
    optimizer = torch.optim.AdamW(named, lr=1e-3, **options)
    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    train(params, optimizer, range(steps))
    return optimizer


def state_of(optimizer):
    """Copies of all tensors and options."""
    state_dict = optimizer.state_dict()
    return [x.clone() for named in state_dict["state"].values() for x in named.values()], state_dict["param_groups"]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("given", [False, True])
def test_parameters_are_matched_by_name(prefix, given):
    """A model's groups here come in another order, and matrices of one shape must not be confused."""
    model = small_model()
    named = [(prefix + name, p) for name, p in model.named_parameters()]
    peer = adamw_of([p for _, p in named] if given else named)
    optimizer = steepest.for_model(model, "muon", lr=1e-2)
    adoption = steepest.adopt(optimizer, peer.state_dict(), [name for name, _ in named] if given else None)
    assert not adoption.left
    for p in model.parameters():
        here = optimizer.state[p]
        torch.testing.assert_close(here.get("exp_avg", here.get("momentum_buffer")), peer.state[p]["exp_avg"])
    assert {row.rule: row.taken for row in adoption.rows} == {
        "muon": ("momentum_buffer",),
        "adamw": ("exp_avg", "exp_avg_sq", "step"),
    }


def test_names_stand_for_keys_as_distributed_checkpoints_have_them():
    model = small_model()
    saved = get_optimizer_state_dict(model, adamw_of(model.parameters()))
    optimizer = steepest.for_model(model, "adamw", lr=1e-2)
    assert all(row.taken and not row.fresh for row in steepest.adopt(optimizer, saved).rows)
    for name, p in model.named_parameters():
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], saved["state"][name]["exp_avg_sq"])


def test_what_has_no_counterpart_is_said():
    model = small_model()
    named = [(name, p) for name, p in model.named_parameters() if name != "1.bias"]
    peer = adamw_of([*named, ("x", nn.Parameter(torch.ones(2)))])
    optimizer = steepest.for_model(model, "soap", lr=1e-2)
    options = state_of(optimizer)[1]
    adoption = steepest.adopt(optimizer, peer.state_dict())
    rows = {row.name: row for row in adoption.rows}
    assert rows["1.weight"].why == "soap has no use for Adam's moments, which stand in no basis"
    assert rows["1.bias"].why == "not in the saved state"
    assert rows["2.bias"].fresh == ()
    assert adoption.left == ("x",)
    assert "group 0: lr=0.01" not in adoption.options  # nothing of that group was taken over
    assert "group 1: lr=0.01, there 0.001" in adoption.options
    assert repr(state_of(optimizer)[1]) == repr(options)
    printed = str(adoption)
    assert "\n1.bias     adamw                             all: not in the saved state\n" in printed, printed
    assert "saved, and not here: x" in printed


def test_functions_and_tensors_among_the_options_stay():
    W = nn.Parameter(torch.ones(4, 4))
    every = steepest.LinearSchedule(1, 10, 1000)
    lr = torch.tensor(0.1)
    optimizer = steepest.SOAP([W], lr=lr, precondition_frequency=every, max_precond_dim=0)
    steepest.adopt(optimizer, adamw_of([W]).state_dict())
    assert optimizer.state[W]["clock"] == 3
    assert optimizer.param_groups[0]["lr"] is lr
    assert optimizer.param_groups[0]["precondition_frequency"] is every


def test_momentum_follows_every_view():
    """Heads, blocks of a fused projection, experts: the matrices are cut out of the saved tensor."""
    draw = torch.Generator().manual_seed(0)
    views = [((6, 4), {"split": (4, 2)}), ((4, 6), {"transpose": True}), ((6, 4), {"heads": 3})]
    views += [((3, 4, 2), {"merge_dims": False}), ((3, 4, 2), {}), ((5, 5), {"block_size": 3}), ((3,), {})]
    for shape, view in views:
        W = nn.Parameter(torch.randn(shape, generator=draw))
        peer = torch.optim.SGD([W], lr=0.0, momentum=0.9)
        muon = steepest.Muon([{"params": [W], **view}], lr=0.1, momentum=0.9, nesterov=False, ns="exact")
        W.grad = torch.randn(shape, generator=draw)
        peer.step()
        muon.step()
        wanted = {name: x.clone() for name, x in muon.state[W].items() if name.startswith("momentum_buffer")}
        fresh = steepest.Muon([{"params": [W], **view}], lr=0.1)
        steepest.adopt(fresh, peer.state_dict())
        for name, x in wanted.items():
            torch.testing.assert_close(fresh.state[W][name], x)


def entry(**new):
    """A change of entries of one parameter, and of nothing else."""
    return lambda saved: saved["state"][1].update(new)


def group(**new):
    return lambda saved: saved["param_groups"][0].update(new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(exp_avg=torch.zeros(3)), r"1.weight: 'exp_avg' was saved with shape \[3\], and must have \[4, 4\]"),
        (entry(exp_avg=[0.0]), "1.weight: 'exp_avg' was saved as a list: must be a dense tensor of floats"),
        (entry(exp_avg=torch.zeros(4, 4).int()), "1.weight: 'exp_avg' was saved as a torch.int32 tensor"),
        (entry(exp_avg=torch.zeros(4, 4).to_sparse()), "1.weight: 'exp_avg' was saved as a torch.float32 tensor"),
        (entry(step=torch.tensor(-1.0)), "1.weight: 'step' was saved as .*: must be a count of updates"),
        (entry(step=torch.tensor(float("nan"))), "1.weight: 'step' was saved as tensor"),
        (entry(step=float("inf")), "1.weight: 'step' was saved as inf"),
        (entry(step=True), "1.weight: 'step' was saved as True"),
        (lambda saved: saved["state"][1].pop("step"), "1.weight: 'step' was saved as None"),
        (lambda saved: saved["state"].update({1: [1]}), "1.weight: its state was saved as a list: must be a dict"),
        (lambda saved: saved.pop("state"), "must be a dict with 'state' and a list of 'param_groups'"),
        (lambda saved: saved["param_groups"].append({}), "group 1 of the saved state is not a dict with a list of"),
        (group(param_names=["a"] * 7), "a is the name of more than one parameter"),
        (group(param_names=["a"]), "there are 1, and the saved state has 7 parameters"),
        (group(param_names=list("abcdefg")), "no name is on both sides: there a, b, c and 4 more; here 1.weight"),
        (group(rule="adamw"), "is one of steepest: load it with load_state_dict"),
    ],
)
def test_what_is_damaged_is_refused_and_nothing_changes(change, message):
    model = small_model()
    state_dict = adamw_of(list(model.named_parameters())).state_dict()
    optimizer = steepest.for_model(model, "muon", lr=1e-2)
    before = state_of(optimizer)
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        steepest.adopt(optimizer, state_dict)
    tensors, groups = state_of(optimizer)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before[0], strict=True))
    assert repr(groups) == repr(before[1])


def test_damaged_bases_are_refused():
    params = parameters(shapes("a"))
    peer = Soap(params.values(), **SOAP, max_precond_dim=10)
    train(params, peer, range(3))
    for name, value, message in (
        ("GG", [torch.zeros(5, 5), torch.zeros(4, 4)], r"'GG' was saved with shape \[5, 5\], and must have \[6, 6\]"),
        ("Q", [torch.zeros(6, 6)], "'GG' and 'Q' must be lists of one matrix for each dimension"),
        ("Q", None, "'GG' and 'Q' must be lists"),
    ):
        state_dict = peer.state_dict()
        state_dict["state"] = {0: state_dict["state"][0] | {name: value}}
        with pytest.raises(ValueError, match=message):
            steepest.adopt(steepest.SOAP(params.values(), lr=1e-2), state_dict)


def test_positions_are_taken_only_where_they_tell():
    W, V, b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    saved = adamw_of([W, V, b]).state_dict()
    adamw = partial(steepest.Optimizer, rule="adamw", lr=1e-2)
    assert steepest.adopt(adamw([W, V, b]), saved).rows[2].taken == ("exp_avg", "exp_avg_sq", "step")
    with pytest.raises(ValueError, match="0 of group 0 and parameter 0 of group 1 have the same shape: adopt by name"):
        steepest.adopt(adamw([{"params": [W]}, {"params": [V, b]}]), saved)
    with pytest.raises(ValueError, match="has 3 parameters, the optimizer has 2: adopt by name"):
        steepest.adopt(adamw([W, b]), saved)
    with pytest.raises(ValueError, match="1 of the saved state, by its position parameter 1 of group 0: 'exp_avg' was"):
        steepest.adopt(adamw([W, b, V]), saved)
    two = adamw_of([W, b]).state_dict()  # in other groups, but no two of one shape
    assert all(row.taken for row in steepest.adopt(adamw([{"params": [W]}, {"params": [b]}]), two).rows)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_precond_dim": 5}, "its rows have a basis only there: max_precond_dim decides"),
        ({"use_kl_shampoo": True}, "its covariances are Shampoo's there, and not here"),
        ({"adam_warmup_steps": 10}, "its first basis comes at update 11, and 6 are saved"),
        ({"moment_dtype": "int8"}, "moments in 8 bits can't be taken over: adopt with moment_dtype='float32'"),
        ({"block_size": 3}, "it is seen as several matrices here"),
    ],
)
def test_bases_that_do_not_fit_start_fresh(options, why):
    params = parameters(shapes("a"), torch.float32)
    peer = Soap(params.values(), **SOAP, max_precond_dim=10)
    train(params, peer, range(7))
    optimizer = steepest.SOAP(params.values(), lr=1e-2, **options)
    before = state_of(optimizer)[0]
    (row,) = steepest.adopt(optimizer, peer.state_dict()).rows
    assert (row.taken, row.why) == ((), why)
    assert all(torch.equal(x, y) for x, y in zip(state_of(optimizer)[0], before, strict=True))


@pytest.mark.parametrize(
    ("entries", "options", "why"),
    [
        ({"square_avg": torch.ones(4, 4), "step": 3}, {}, "no optimizer known here has the entries square_avg, step"),
        ({}, {}, "the saved state has nothing for it"),
        ({"momentum_buffer": None}, {"dampening": 0, "momentum": 0.9}, "the saved state has no momentum"),
        ({"momentum_buffer": torch.ones(4, 4)}, {"dampening": 0.5, "momentum": 0.9}, "dampening=0.5 leaves no average"),
        ({"momentum_buffer": torch.ones(4, 4)}, {"momentum": 0.9, "nesterov": True}, "don't tell whether"),
    ],
)
def test_what_is_not_known_starts_fresh(entries, options, why):
    W = nn.Parameter(torch.ones(4, 4))
    optimizer = steepest.Muon([W], lr=1e-2)
    saved = {"state": {0: entries}, "param_groups": [{"params": [0], "lr": 0.1, **options}]}
    (row,) = steepest.adopt(optimizer, saved).rows
    assert why in row.why
    assert not row.taken
    assert not optimizer.state[W]["momentum_buffer"].any()


def test_loading_another_optimizers_state_says_what_to_do():
    model = small_model()
    optimizer = steepest.for_model(model, "soap", lr=1e-2)
    with pytest.raises(ValueError, match=r"is another optimizer's.*steepest.adopt\(optimizer, state_dict\)"):
        optimizer.load_state_dict(adamw_of(model.parameters()).state_dict())


def test_only_optimizers_of_steepest_adopt():
    W = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="SGD: only an optimizer of steepest"):
        steepest.adopt(torch.optim.SGD([W], lr=0.1), adamw_of([W]).state_dict())


def test_a_frozen_parameter_has_nothing_to_take_over_to():
    W = nn.Parameter(torch.ones(4))
    saved = adamw_of([W]).state_dict()
    W.requires_grad_(False)
    (row,) = steepest.adopt(steepest.Optimizer([W], rule="adamw", lr=0.1), saved).rows
    assert row.why == "it has no state before its first gradient"


def test_sharded_parameters_are_refused(monkeypatch):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        shards = torch.distributed.tensor.distribute_tensor(torch.ones(4), mesh)
        W, V = nn.Parameter(torch.ones(4)), nn.Parameter(shards)
        with pytest.raises(ValueError, match="adopt in one process, and load its state with load_consolidated"):
            steepest.adopt(steepest.Optimizer([V], rule="adamw", lr=0.1), adamw_of([W]).state_dict())
        saved = adamw_of([W]).state_dict()
        saved["state"][0]["exp_avg"] = shards
        with pytest.raises(ValueError, match="'exp_avg' was saved in shards: save it whole"):
            steepest.adopt(steepest.Optimizer([W], rule="adamw", lr=0.1), saved)
    finally:
        torch.distributed.destroy_process_group()
