"""Tests of the engine: any parameter, wrong options, state as views, staggered refreshes, and its repr."""

import sys

import pytest
import torch

import steepest
from steepest.engine.optimizer import Optimizer
from steepest.rule import Elementwise
from steepest.rules import RULES
from steepest.stack.stagger import stagger_offsets


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def train(opt, params, count, first=0):
    for t in range(first, first + count):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * t + i, dtype=p.dtype)
        opt.step()


MAKERS = {
    "soap": lambda p, **k: steepest.SOAP(p, lr=1e-2, **k),
    "rekls": lambda p, **k: steepest.REKLS(p, lr=1e-2),
    "moso": lambda p, **k: steepest.MOSO(p, lr=1e-2, **k),
    "inverse_root": lambda p, **k: steepest.InverseRootSOAP(p, lr=1e-2, **k),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_parameter_works(make, dtype):
    shapes = [(), (1,), (5,), (3, 4), (1, 4), (4, 1), (4, 3, 2, 2), (3, 2, 5), (0,), (0, 3)]
    params = [torch.nn.Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
    frozen = torch.nn.Parameter(torch.ones(3, 3, dtype=dtype), requires_grad=False)
    opt = make([{"params": params}, {"params": []}, {"params": [frozen]}])
    before = [p.detach().clone() for p in params]
    train(opt, params, 3)
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, old)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(x.dtype in (expected, torch.int64) for x in opt.state[p].values())
    assert torch.equal(frozen, torch.ones(3, 3, dtype=dtype))
    assert not opt.state.get(frozen)


def test_a_thawed_parameter_joins():
    W, frozen = torch.nn.Parameter(randn(3, 4)), torch.nn.Parameter(randn(3, 4, seed=1), requires_grad=False)
    opt = steepest.SOAP([W, frozen], lr=1e-2)
    train(opt, [W], 2)
    frozen.requires_grad_(True)
    alone = torch.nn.Parameter(frozen.detach().clone())
    other = steepest.SOAP([alone], lr=1e-2)
    for _ in range(3):
        frozen.grad = alone.grad = randn(3, 4, seed=9)
        W.grad = None
        opt.step()
        other.step()
    assert torch.equal(frozen, alone)
    assert opt.state[frozen]["step"] == 3
    assert opt.state[W]["step"] == 2


def test_stacking_changes_nothing():
    """Matrices that are stepped in one stack end where each ends alone; so do convolutions and experts."""
    shapes = [(4, 6), (4, 6), (4, 3, 1, 2), (3, 4, 6)]
    together = [torch.nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    groups = [{"params": together[:3]}, {"params": together[3:], "merge_dims": False}]
    opt = steepest.SOAP(groups, lr=1e-2, precondition_frequency=2)
    assert [stack.size for stack in opt._stacks] == [6]  # of both groups
    train(opt, together, 5)
    for i, shape in enumerate(shapes):
        start = randn(*shape, seed=i)
        pieces = start if i == 3 else start.reshape(1, 4, 6)
        for e, piece in enumerate(pieces):
            W = torch.nn.Parameter(piece.clone())
            one = steepest.SOAP([W], lr=1e-2, precondition_frequency=2)
            for t in range(5):
                seed = 100 * t + i
                W.grad = randn(*shape, seed=seed).reshape(-1, 4, 6)[e]
                one.step()
            mine = together[i].detach().reshape(-1, 4, 6)[e]
            torch.testing.assert_close(mine, W.detach(), rtol=0, atol=1e-5)


def test_state_is_a_view():
    W, V = torch.nn.Parameter(randn(3, 4)), torch.nn.Parameter(randn(3, 4))
    opt = steepest.SOAP([W, V], lr=1e-2)
    L = opt.state[V]["L"]
    train(opt, [W, V], 2)
    assert L is opt.state[V]["L"]
    assert L.abs().sum() > 0
    assert tuple(L.shape) == (3, 3)
    assert tuple(opt.state[V]["Q_R"].shape) == (4, 4)
    opt.state[V]["exp_avg"].zero_()
    assert opt._stacks[0].state["exp_avg"][1].abs().sum() == 0
    assert opt._stacks[0].state["exp_avg"][0].abs().sum() > 0
    experts = torch.nn.Parameter(randn(5, 3, 4))
    opt = steepest.SOAP([experts], lr=1e-2, merge_dims=False)
    assert tuple(opt.state[experts]["L"].shape) == (5, 3, 3)


BAD = [
    ({"lr": -1.0}, "lr=-1.0"),
    ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\): must be two numbers in \[0, 1\)"),
    ({"betas": (0.9,)}, "betas="),
    ({"shampoo_beta": 1.0}, r"shampoo_beta=1.0: must be a number in \[0, 1\)"),
    ({"preconditioner_decay": -0.1}, "preconditioner_decay=-0.1"),
    ({"eps": -1e-8}, "eps=-1e-08"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ({"weight_decay_method": "l1"}, "weight_decay_method='l1': must be one of 'decoupled'"),
    ({"precondition_frequency": 0}, "precondition_frequency=0"),
    ({"precondition_frequency": 1.5}, "precondition_frequency=1.5"),
    ({"adam_warmup_steps": -1}, "adam_warmup_steps=-1"),
    ({"fp32_matmul_prec": "tf32"}, "fp32_matmul_prec='tf32': must be one of 'highest', 'high', 'medium'"),
    ({"qr_fp32_matmul_prec": ""}, "qr_fp32_matmul_prec=''"),
    ({"adaptive_update_tolerance": -1}, "adaptive_update_tolerance=-1"),
    ({"power_iter_steps": 0}, "power_iter_steps=0"),
    ({"max_update_rms": -1}, "max_update_rms=-1"),
    ({"basis_timing": "during"}, "basis_timing='during'"),
    ({"noise_floor": "high"}, "noise_floor='high'"),
    ({"kl_floor": 1.0}, "kl_floor=1.0"),
    ({"solver": "svd"}, "solver='svd'"),
    ({"refresh": "qr"}, "refresh='qr': the option is called solver"),
    ({"form": "inverse_root"}, "form: .*InverseRootSOAP"),
    ({"max_precond_dim": -1}, "max_precond_dim=-1"),
    ({"nonfinite": "ignore"}, "nonfinite='ignore': must be one of 'skip', 'raise'"),
    *[
        ({name: "no"}, f"{name}='no': must be a bool")
        for name in ("nesterov", "merge_dims", "stagger", "guards", "compile")
    ],
    ({"use_kl_shampoo": "off"}, "use_kl_shampoo='off': must be a bool"),
    ({"use_eigh": True, "solver": "qr"}, "use_eigh=True contradicts solver='qr'"),
    ({"preconditioner_decay": 0.9, "shampoo_beta": 0.5}, "preconditioner_decay=0.9 contradicts shampoo_beta=0.5"),
    ({"guards": False, "noise_floor": 0.1}, "guards=False contradicts noise_floor=0.1"),
    ({"kl_floor": 0.1}, "kl_floor=0.1: soap has no such option"),
    ({"use_egh": True}, "did you mean 'use_eigh'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[next(reversed(options)) for options, _ in BAD])
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        steepest.SOAP([torch.nn.Parameter(torch.zeros(2, 2))], **{"lr": 1e-3} | options)


def test_moso_refuses_what_would_divide_zero_by_zero():
    with pytest.raises(ValueError, match=r"shampoo_beta=1\.0"):
        steepest.MOSO([torch.nn.Parameter(torch.zeros(2, 2))], shampoo_beta=1.0)


def test_unknown_names_suggest_the_nearest():
    W = [torch.nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(ValueError, match="did you mean 'soap'"):
        Optimizer(W, rule="sopa", lr=0.1)
    with pytest.raises(ValueError, match=r"beta=0.9: soap has no such option.*did you mean 'betas'"):
        Optimizer(W, rule="soap", lr=0.1, beta=0.9)
    with pytest.raises(ValueError, match="did you mean 'nadam'"):
        steepest.create("nadan", W, lr=0.1)
    with pytest.raises(ValueError, match="lr=None"):
        Optimizer(W, rule="soap")


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    W, V = torch.nn.Parameter(randn(2, 2)), torch.nn.Parameter(randn(2, 2))
    opt = steepest.SOAP([W], lr=0.1)
    for group in (
        {"params": [V], "betas": (2.0, 0.9)},
        {"params": [V], "rule": "none"},
        {"params": [V], "split": (3,)},
    ):
        with pytest.raises(ValueError, match=r"betas|rule|split"):
            opt.add_param_group(group)
    assert len(opt.param_groups) == len(opt._stacks) == 1
    train(opt, [W], 1)


def test_groups_carry_their_rules_options_only():
    W, b = torch.nn.Parameter(randn(2, 2)), torch.nn.Parameter(randn(2))
    opt = Optimizer([{"params": [W]}, {"params": [b], "rule": "adamw", "mine": 7}], rule="soap", lr=0.1, stagger=True)
    assert opt.param_groups[0]["stagger"] is True
    assert "stagger" not in opt.param_groups[1]
    assert opt.param_groups[1]["betas"] == (0.9, 0.999)
    assert opt.param_groups[1]["mine"] == 7
    assert opt.param_groups[1]["lr"] == 0.1


@pytest.mark.parametrize("period", [2, 5, 10])
def test_staggered_refreshes_cover_every_matrix_once_a_period(period):
    shapes = [(8, 4), (4, 4), (16, 4), (4, 16)] * 2
    params = [torch.nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    opt = steepest.SOAP(params, lr=1e-2, precondition_frequency=period, stagger=True)
    train(opt, params, period)  # every matrix has had its first basis by then
    refreshed = []
    for t in range(period, 3 * period):
        before = [opt.state[p]["Q_R"].clone() for p in params]
        train(opt, params, 1, first=t)
        refreshed.append([not torch.equal(old, opt.state[p]["Q_R"]) for old, p in zip(before, params, strict=True)])
    counts = torch.tensor(refreshed)
    assert (counts.sum(0) == 2).all()
    assert counts[:period].any(1).sum() == min(period, len(shapes))


def test_a_lone_matrix_is_as_if_unstaggered():
    results = []
    for stagger in (False, True):
        W = torch.nn.Parameter(randn(4, 6))
        opt = steepest.SOAP([W], lr=1e-2, precondition_frequency=3, stagger=stagger)
        train(opt, [W], 8)
        results.append(W.detach())
    assert torch.equal(*results)


def test_offsets_balance_their_costs():
    costs = [1024.0**3] * 4 + [768.0**3] * 2 + [256.0**3] * 2
    assert len(set(stagger_offsets(costs, 10))) == 8


def test_repr_says_what_is_not_default():
    W, V, b = (torch.nn.Parameter(randn(*shape)) for shape in ((4, 6), (2, 3), (5,)))
    groups = [{"params": [W, V], "betas": (0.8, 0.9)}, {"params": [b], "rule": "adamw", "weight_decay": 0.0}]
    opt = Optimizer(groups, rule="soap", lr=0.25)
    nbytes = [sum(x.nbytes for p in group["params"] for x in opt.state[p].values()) for group in opt.param_groups]
    assert repr(opt).splitlines() == [
        "Optimizer(",
        f"  group 0: soap, lr=0.25, betas=(0.8, 0.9), 2 parameters, 30 entries, {nbytes[0]:,} bytes of state",
        f"  group 1: adamw, lr=0.25, weight_decay=0.0, 1 parameter, 5 entries, {nbytes[1]:,} bytes of state",
        ")",
    ]
    assert repr(steepest.Muon([W], lr=0.5)).startswith("Muon(\n  group 0: muon, lr=0.5, ")


def test_repr_is_short_for_many_groups():
    def groups(lrs):
        return [{"params": [torch.nn.Parameter(randn(2, 2))], "lr": lr} for lr in lrs]

    alike = repr(steepest.SOAP(groups([0.5, 0.1, 0.5, 0.5]), lr=1.0)).splitlines()
    assert alike[1:-1] == [
        "  groups 0, 2-3: soap, lr=0.5, 3 parameters, 12 entries, 324 bytes of state",
        "  group 1: soap, lr=0.1, 1 parameter, 4 entries, 108 bytes of state",
    ]
    unlike = repr(steepest.SOAP(groups(range(1, 31)), lr=1.0)).splitlines()
    assert len(unlike) == 11
    assert unlike[-2] == "  ... and 22 more kinds of groups"


def test_a_tensor_learning_rate():
    results = []
    for lr in (0.01, torch.tensor(0.01)):
        W = torch.nn.Parameter(randn(3, 4))
        opt = steepest.SOAP([W], lr=lr)
        train(opt, [W], 3)
        results.append(W.detach())
    torch.testing.assert_close(*results)


def test_nonfinite_raise_names_the_parameter_and_changes_nothing():
    W, V = torch.nn.Parameter(randn(2, 2)), torch.nn.Parameter(randn(2, 3))
    opt = steepest.SOAP([("good", W), ("bad", V)], lr=0.1, nonfinite="raise")
    before = [W.detach().clone(), V.detach().clone()]
    W.grad, V.grad = torch.ones(2, 2), torch.full((2, 3), torch.nan)
    with pytest.raises(FloatingPointError, match=r"gradient of bad \(shape \[2, 3\]\)"):
        opt.step()
    assert torch.equal(W, before[0])
    assert torch.equal(V, before[1])
    assert opt.state[W]["step"] == 0


def test_create_knows_torchs_own():
    W = [torch.nn.Parameter(torch.zeros(2, 2))]
    assert type(steepest.create("Adagrad", W, lr=0.1)) is torch.optim.Adagrad
    assert type(steepest.create("rprop", W)) is torch.optim.Rprop
    assert isinstance(steepest.create("moso", W), steepest.MOSO)


def test_cautious_decay_spares_weights_that_the_step_grows():
    W = torch.nn.Parameter(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    opt = steepest.Muon([W], lr=0.1, weight_decay=0.5, weight_decay_method="cautious", ns="exact", scale="none")
    W.grad = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # its polar factor is the identity
    opt.step()
    expected = torch.tensor([[0.95 - 0.1, 0.95], [-0.95, -1.0 - 0.1]])
    torch.testing.assert_close(W.detach(), expected)


def test_other_spellings_mean_the_same():
    W = torch.nn.Parameter(torch.zeros(2, 3))
    spelled = steepest.SOAP([W], use_kl_shampoo=True, use_eigh=True, preconditioner_decay=0.9, guards=False)
    plain = steepest.Optimizer(
        [W], "kl_soap", lr=3e-3, solver="eigh", shampoo_beta=0.9, noise_floor=0, momentum_floor=False, kl_floor=0
    )
    assert spelled.param_groups[0] == plain.param_groups[0]


def test_a_group_may_use_other_spellings_and_inherits_all_the_same():
    params = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2)]
    groups = [{"params": params[:1], "use_kl_shampoo": True}, {"params": params[1:], "use_eigh": True}]
    kl, eigh = steepest.SOAP(groups, lr=0.1, betas=(0.8, 0.9)).param_groups
    assert (kl["rule"], kl["betas"], kl["kl_floor"]) == ("kl_soap", (0.8, 0.9), 1e-4)
    assert (eigh["rule"], eigh["betas"], eigh["solver"]) == ("soap", (0.8, 0.9), "eigh")


def test_the_way_of_a_refreshing_step_is_short():
    """Python calls inside steepest, and the files that they are in: what somebody with a debugger sees."""
    W = torch.nn.Parameter(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = steepest.SOAP([W], lr=1e-3)
    calls = []

    def note(frame, event, arg):
        marks = "engine/phases.py"  # which another test may have put around functions
        if event == "call" and "/steepest/" in frame.f_code.co_filename and marks not in frame.f_code.co_filename:
            calls.append(frame.f_code.co_filename)

    for _ in range(6):  # the sixth refreshes for the second time
        W.grad = torch.ones(12, 8)
        calls.clear()
        sys.setprofile(note)
        optimizer.step()
        sys.setprofile(None)
    assert 20 < len(calls) <= 130
    assert len(set(calls)) <= 16


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if issubclass(rule, Elementwise)])
def test_short_vectors_are_stepped_together_as_each_would_be_alone(rule):
    """They fill no whole vector registers; one has taken fewer steps than the others, one lies strided in memory."""

    def vectors():
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(n, generator=generator) for n in (3, 16, 24, 37)]
        made += [torch.randn(7, 6, generator=generator)[:, ::2], torch.randn((), generator=generator)]
        return [torch.nn.Parameter(x) for x in made]

    def train(params, numbers):
        optimizer = steepest.Optimizer(params, rule, lr=0.1, weight_decay=0.1)
        for step in range(4):
            for p, number in zip(params, numbers, strict=True):
                generator = torch.Generator().manual_seed(100 * step + number)
                missing = step == 1 and number == 2
                p.grad = None if missing else torch.randn(p.shape, generator=generator)
            optimizer.step()
        return [(p.detach(), optimizer.state[p]) for p in params]

    alone = [train([p], [number])[0] for number, p in enumerate(vectors())]
    for (p, state), (one, own) in zip(train(vectors(), range(6)), alone, strict=True):
        assert torch.equal(p, one)
        assert state.keys() == own.keys()
        assert all(torch.equal(state[name], own[name]) for name in state)
