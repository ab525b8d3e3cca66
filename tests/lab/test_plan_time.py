"""``steepest plan --gpu``: predicted times are arithmetic on FLOPs and bytes, predicted state is what is allocated.

No time is judged here; benchmarks/predict.py does that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from plans_made_up import DEVICE, FILES, FLAT, FREE, model_of, predict
from torch import nn

import steepest
from steepest.lab.bench.measure import state_bytes
from steepest.lab.plan.devices import gpu, interpolated
from steepest.lab.plan.models import Model, Weight, from_file, preset
from steepest.lab.plan.plan import _refresh_offsets, look, mesh
from steepest.lab.plan.time import Load, forecast, settled
from steepest.rule.work import Part, Work
from steepest.rules.adamw import AdamW
from steepest.rules.lion import Lion
from steepest.rules.moso import Moso
from steepest.rules.muon import Muon
from steepest.rules.soap import Soap
from steepest.view import View

OPTIMIZERS = [
    ("soap", {}),
    ("soap", {"basis_dtype": "bfloat16"}),
    ("soap", {"moment_dtype": "int8"}),
    ("soap", {"basis_dtype": "bfloat16", "moment_dtype": "int8", "max_precond_dim": 100}),
    ("soap", {"use_kl_shampoo": True, "precondition_frequency": 10}),
    ("moso", {}),
    ("shampoo", {}),
    ("muon", {}),
    ("normuon", {}),
    ("dion", {}),
    ("adamw", {}),
    ("lion", {}),
    ("lion", {"moment_dtype": "int8"}),
]


# Memory.


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS, ids=str)
def test_state_is_what_an_optimizer_allocates(tmp_path, name, optimizer, options):
    path = tmp_path / "net.py"
    path.write_text(FILES[name])
    planned = look(from_file(path, optimizer, options), mesh("fsdp", 1), 1, device=DEVICE)
    scope: dict = {}
    exec(FILES[name], scope)
    real = steepest.for_model(scope["model"](), optimizer, lr=1e-3, **options)
    for group in real.param_groups:  # all of it is there before there is a gradient, but for the elementwise rule's
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    real.step()
    assert planned.state_max == pytest.approx(state_bytes(real.state), rel=0.05)
    weights = sum(p.nbytes for group in real.param_groups for p in group["params"])
    assert planned.forecast.held == planned.state_max + 2 * weights


@pytest.mark.parametrize(("world", "fits"), [(1, False), (64, True)])
def test_what_fits(world, fits):
    seen = look(preset("70b", "muon", {}), mesh("fsdp", world), 2**20, device=gpu("h100")).forecast
    assert seen.fits is fits
    assert seen.held > 2 * 2 * 68_976_648_192 / world


def test_replicas_hold_all_weights():
    shapes = [(8, 4)] * 4
    shared, replicated = (predict(Muon(), *shapes, on=on, world=4) for on in ("fsdp", "ddp"))
    assert (shared.held, replicated.held) == (4 * (2 * 32 + 32), 4 * (2 * 128 + 32))


# Time: the model of a step.


def test_soap_by_hand():
    """A 4 × 2 matrix and its twin; f = 5. Three products along each side at "highest", two at a refresh at "high"."""
    m, n, f = 4, 2, 5
    along, cubes = 2 * m * n * (m + n), 2 * (m**3 + n**3)
    often = 3 * along / 2
    seldom = (2 * along + cubes) / 3 + (8 / 3 * (m**3 + n**3)) / 11
    passed = (2 * 8 + 6 * 4) * m * n / 31 + 2 * 8 * (m * m + n * n) / 23
    once = 1000 + 100
    seen = predict(Soap(precondition_frequency=f), (m, n), (m, n))
    assert seen.step == pytest.approx(2 * (often + seldom / f + passed) + once)
    assert seen.worst == pytest.approx(2 * (often + seldom + passed) + once)
    assert seen.staggered == pytest.approx(2 * (often + passed) + seldom + once), "one after the other"


def test_a_first_step_of_soap_by_hand():
    """Both bases come from one decomposition in float64, whose FLOPs count twice; later, momentum turns as ever."""
    m, n = 4, 2
    along = 2 * m * n * (m + n)
    singular = 2 * (2 * 2 * m * n * n) / 2 + 2 * 9 * n**3 / 17
    completed = (2 * m * n**2 - 2 / 3 * n**3 + 4 * m * m * n - 2 * (m + m) * n**2 + 4 / 3 * n**3) / 11
    passed = (2 * 8 + 6 * 4) * m * n / 31 + 2 * 8 * (m * m + n * n) / 23
    first = 3 * along / 2 + 2 * along / 3 + singular + completed + passed
    assert predict(Soap(), (m, n), (m, n)).first == pytest.approx(2 * first + 1000 + 100)
    assert predict(Soap(adam_warmup_steps=9), (m, n)).first == pytest.approx(
        3 * along / 2 + 2 * along / 3 + 2 * 9 * (m**3 + n**3) / 17 + passed + 1000
    ), "several gradients have no common singular vectors"
    assert predict(Muon(), (m, n)).first == predict(Muon(), (m, n)).step, "it refreshes nothing"


def test_elementwise_by_hand():
    lion = replace(model_of(Lion(), vectors=30), elementwise=Lion())
    alone = look(lion, mesh("fsdp", 1), 10, device=DEVICE).forecast
    assert alone.step == alone.worst == alone.staggered == alone.first == pytest.approx(30 * (2 * 4 + 3 * 4) / 29)
    beside = predict(Muon(), (4, 2), vectors=30).step - predict(Muon(), (4, 2)).step
    assert beside == pytest.approx(30 * (2 * 8 + 3 * 4) / 29)


def test_each_kind_has_its_speed():
    for part, speed in (
        (Part("qr", 4), 11), (Part("cholesky", 4), 13), (Part("eigh", 4), 17),
        (Part("product", 4, "highest"), 2), (Part("product", 4, "medium"), 5),
    ):  # fmt: skip
        assert DEVICE.seconds(Work({part: 128.0})) == pytest.approx(128 / speed)
    both = Work({Part("qr", 4): 44.0, Part("product", 4, "highest"): 128.0})
    assert DEVICE.seconds(both) == pytest.approx(44 / 11 + 128 / 2)


def test_a_speed_depends_on_size():
    sized = replace(FREE, speeds=FREE.speeds | {"qr": ((4, 1.0), (16, 4.0))})
    assert [sized.speed(Part("qr", size)) for size in (2, 4, 8, 16, 99)] == pytest.approx([1, 1, 2, 4, 4])
    assert interpolated(((8, 3.0),), 8) == 3.0


def test_precision_is_the_rules():
    seen = [predict(Soap(precondition_frequency=10, **o), (8, 8), device=FREE).worst for o in (
        {}, {"fp32_matmul_prec": "high"}, {"qr_fp32_matmul_prec": "highest"}
    )]  # fmt: skip
    along, cubes = 2 * 2 * 8**3, 2 * 2 * 8**3
    slow = 2 * 8 / 3 * 8**3 / 11
    assert seen == pytest.approx(
        [3 * along / 2 + (2 * along + cubes) / 3 + slow, (5 * along + cubes) / 3 + slow, (5 * along + cubes) / 2 + slow]
    )
    in_bfloat16, in_float32 = (predict(Muon(ns_dtype=d), (8, 8), device=FREE).step for d in ("bfloat16", "float32"))
    assert in_bfloat16 / in_float32 == pytest.approx(2 / 7)


def test_the_words_of_a_device():
    assert settled(Soap(), "cuda") == Soap(solver="first_order")
    assert settled(Soap(solver="eigh"), "cuda") == Soap(solver="eigh")
    assert settled(Muon(), "cuda").ns_dtype == "float16"
    assert settled(Muon(ns="cans"), "cuda").ns_dtype == "float32"
    assert settled(Moso(), "cuda") == Moso()


def test_the_busiest_rank_counts():
    """Three matrices on two ranks: one has two of them, in one stack."""
    two, one = predict(Muon(), (4, 2), (4, 2)), predict(Muon(), (4, 2))
    assert predict(Muon(), *[(4, 2)] * 3, world=2).step == pytest.approx(two.step)
    assert two.step - 100 - 1000 == pytest.approx(2 * (one.step - 1000))
    other = predict(Muon(), (4, 2), (4, 6)).step - predict(Muon(), (4, 6)).step
    assert other == pytest.approx(one.step), "another shape is another stack"


def test_experts_are_stepped_where_they_lie():
    experts = Weight("up", (8, 6, 4), View((8, 6, 4), merge_dims=False), 4)
    model = Model("experts", (experts,), "", Soap(precondition_frequency=4), AdamW())
    cut, whole = (look(model, mesh("fsdp", world), 10, device=DEVICE).forecast for world in (4, 1))
    assert cut.step - 1000 - 100 == pytest.approx((whole.step - 1000 - 7 * 100) / 4)
    assert whole.staggered < whole.worst
    assert cut.held == whole.held / 4


def test_phases_are_the_engines():
    shapes = {"c": (6, 4), "z": (9, 3), "b": (4, 4), "d": (9, 3), "e": (2, 9)}
    params = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    optimizer = steepest.Optimizer(params.items(), "soap", lr=1e-3, precondition_frequency=3, stagger=True)
    for p in params.values():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    engine = optimizer._roster._offsets
    weights = tuple(Weight(name, shape, View(shape), 4) for name, shape in shapes.items())
    model = Model("", weights, "", Soap(precondition_frequency=3), AdamW())
    ours = _refresh_offsets(model)
    assert [3 * engine[i, 0, 0] for i in range(5)] == [ours[name, 0][0] for name in shapes]
    assert len(set(engine.values())) == 3


def test_a_model_takes_six_flops_per_parameter_and_token():
    seen = predict(Muon(), (4, 2), vectors=2, world=2, mfu=0.25)
    assert seen.training == pytest.approx(6 * 10 * 10 / 2 / (37 * 0.25))
    assert seen.share == seen.step / (seen.step + seen.training)


def test_faster_is_not_slower():
    slow = predict(Soap(precondition_frequency=2), (8, 6), (4, 4), vectors=9)
    for change in (
        *({"speeds": DEVICE.speeds | {name: ((1, 2 * FLAT[name]),)}} for name in ("highest", "high", "qr")),
        *({name: 2 * getattr(DEVICE, name)} for name in ("bandwidth", "entrywise", "passes")),
        {"per_stack": 1.0}, {"training": 99.0},
    ):  # fmt: skip
        fast = predict(Soap(precondition_frequency=2), (8, 6), (4, 4), vectors=9, device=replace(DEVICE, **change))
        if "training" in change:
            assert fast.training < slow.training
            continue
        assert fast.step < slow.step, change
        assert fast.worst < slow.worst, change
    seldom = predict(Soap(precondition_frequency=4), (8, 6), (4, 4), vectors=9)
    assert seldom.step < slow.step
    assert seldom.worst == slow.worst


def test_bases_in_fewer_bytes_are_moved_in_fewer():
    fine, coarse = (predict(Soap(basis_dtype=dtype), (4, 2)).step for dtype in ("float32", "bfloat16"))
    assert fine - coarse == pytest.approx(2 * 2 * (16 + 4) / 23)


def test_no_rank_is_forgotten():
    """The mean's busiest rank need not be the one that holds most."""
    busy = Load(matrices=Counter({(4, 2, 0): 1}), stacks={(0, 4, 2)}, parameters=8.0, state=1.0)
    loads = [busy, Load(entries=1.0, parameters=800.0, state=7.0)]
    seen = forecast((Muon(ns_dtype="float32"), AdamW()), loads, 1.0, DEVICE, 4)
    assert seen.step == predict(Muon(ns_dtype="float32"), (4, 2)).step
    assert seen.held == 2 * 4 * 800 + 7
