"""``steepest plan --gpu``: predicted times are arithmetic on FLOPs and bytes, predicted state is what is allocated.

No time is judged here; benchmarks/predict.py does that.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import steepest
from steepest.cli import app
from steepest.lab import plan_here
from steepest.lab.bench_measure import state_bytes
from steepest.lab.errors import BadInput
from steepest.lab.plan import _turns, look, mesh
from steepest.lab.plan_devices import GPUS, IDEAL, Assumed, Device, gpu, interpolated, key
from steepest.lab.plan_here import here
from steepest.lab.plan_models import Model, Weight, from_file, preset
from steepest.lab.plan_report import in_ms
from steepest.lab.plan_time import Load, forecast, settled
from steepest.linalg.flops import Part, cholesky, eigh, polar, product, qr
from steepest.rules.adamw import AdamW
from steepest.rules.lion import Lion
from steepest.rules.moso import Moso
from steepest.rules.muon import Muon
from steepest.rules.soap import Soap
from steepest.views import View

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/scaling.md").read_text()
FLAT = {"highest": 2.0, "high": 3.0, "medium": 5.0, "bfloat16": 7.0}
FLAT |= {"qr": 11.0, "cholesky": 13.0, "eigh": 17.0, "svd": 19.0}
DEVICE = Device(
    name="made up",
    kind="cpu",
    speeds={name: ((1, speed),) for name, speed in FLAT.items()},
    bandwidth=23.0,
    entrywise=29.0,
    passes=31.0,
    kept=0.0,
    per_stack=1000.0,
    per_matrix=100.0,
    training=37.0,
    memory=1e6,
)
FREE = replace(DEVICE, bandwidth=math.inf, entrywise=math.inf, passes=math.inf, per_stack=0.0, per_matrix=0.0)
"""Where only products and decompositions take time."""
FILES = {
    "mixed": """
from torch import nn
def model():
    return nn.Sequential(
        nn.Embedding(300, 64), nn.Linear(64, 160), nn.Conv2d(8, 24, 3), nn.Linear(160, 100), nn.Linear(100, 10)
    )
""",
    "gpt": """
from steepest.lab.gpt import GPT
def model():
    return GPT(vocabulary=90, context=32, d=48, depth=2)
""",
}
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
]


def steepest_plan(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "80"})


def model_of(rule, *shapes: tuple[int, int], vectors: int = 0) -> Model:
    weights = [Weight(f"w{k}", shape, View(shape), 4) for k, shape in enumerate(shapes)]
    weights += [Weight("b", (vectors,), None, 4)] * (vectors > 0)
    return Model("made up", tuple(weights), "", rule, AdamW())


def predict(rule, *shapes: tuple[int, int], vectors: int = 0, on: str = "fsdp", world: int = 1, device=DEVICE, mfu=0.5):
    found = look(model_of(rule, *shapes, vectors=vectors), mesh(on, world), 10, device=device, mfu=mfu).forecast
    assert found is not None
    return found


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


def test_elementwise_by_hand():
    lion = replace(model_of(Lion(), vectors=30), elementwise=Lion())
    alone = look(lion, mesh("fsdp", 1), 10, device=DEVICE).forecast
    assert alone.step == alone.worst == alone.staggered == pytest.approx(30 * (2 * 4 + 3 * 4) / 29)
    beside = predict(Muon(), (4, 2), vectors=30).step - predict(Muon(), (4, 2)).step
    assert beside == pytest.approx(30 * (2 * 8 + 3 * 4) / 29)


def test_each_kind_has_its_speed():
    for work, speed in (
        (qr(4, 4), 11), (cholesky(4, 4), 13), (eigh(4), 17), (product(4, 4, 4), 2), (product(4, 4, 4).at("medium"), 5)
    ):  # fmt: skip
        assert DEVICE.seconds(work) == pytest.approx(work.total / speed)
    both = qr(4, 4) + product(4, 4, 4)
    assert DEVICE.seconds(both) == pytest.approx(qr(4, 4).total / 11 + 128 / 2)


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
    assert settled(Soap(), "cuda") == Soap(refresh="first_order")
    assert settled(Soap(refresh="eigh"), "cuda") == Soap(refresh="eigh")
    assert settled(Muon(), "cuda").ns_dtype == "bfloat16"
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
    (engine,) = optimizer._phases.values()
    weights = tuple(Weight(name, shape, View(shape), 4) for name, shape in shapes.items())
    model = Model("", weights, "", Soap(precondition_frequency=3), AdamW())
    ours = _turns(model)
    assert [engine[i, 0, 0] for i in range(5)] == [ours[name, 0][0] for name in shapes]
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


def test_copies_to_undo_a_step_take_time():
    kept = predict(Soap(), (4, 2), device=replace(DEVICE, kept=7.0)).step - predict(Soap(), (4, 2)).step
    assert kept == pytest.approx(7 * 4 * (2 * 4 * 2 + 2 * (16 + 4)) / 23)


def test_no_rank_is_forgotten():
    """The mean's busiest rank need not be the one that holds most."""
    loads = [Load({(4, 2, 0): 1.0}, 1, 0.0, 8.0, 1.0), Load({}, 0, 1.0, 800.0, 7.0)]
    seen = forecast((Muon(ns_dtype="float32"), AdamW()), loads, 1.0, DEVICE, 4)
    assert seen.step == predict(Muon(ns_dtype="float32"), (4, 2)).step
    assert seen.held == 2 * 4 * 800 + 7


# Devices.


def test_at_its_peak_a_gpu_takes_flops_by_peak_and_bytes_by_bandwidth():
    model = preset("124m", "soap", {"precondition_frequency": 10, "refresh": "first_order"}, itemsize=4)
    whole = look(model, mesh("fsdp", 1), 2**19, device=gpu("h200", IDEAL)).forecast
    peaks = GPUS["h200"]
    matrices = [(768, 768)] * 48 + [(3072, 768)] * 24
    entries = sum(m * n for m, n in matrices)
    along = sum(2 * m * n * (m + n) for m, n in matrices)
    cubes = sum(m**3 + n**3 for m, n in matrices)
    squares = sum(m * m + n * n for m, n in matrices)
    full = 3 * along + (2 * cubes + 4 / 3 * cubes) / 10  # Cholesky-QR multiplies in full float32
    bytes_moved = 40 * entries + 16 * squares + 28 * (model.parameters - entries)
    expected = full / peaks.float32 + (2 * along + 6 * cubes) / 10 / peaks.tf32 + bytes_moved / peaks.bandwidth
    assert whole.step == pytest.approx(expected, rel=1e-6)
    assert whole.training == pytest.approx(6 * model.parameters * 2**19 / (peaks.bfloat16 * 0.4))


@pytest.mark.parametrize("name", GPUS)
def test_assumptions_never_beat_the_peak(name):
    guessed, ideal = gpu(name), gpu(name, IDEAL)
    for kind in ideal.speeds:
        for size in (1, 100, 1000, 10**5):
            assert 0 < guessed.speeds[kind][-1][1] <= ideal.speeds[kind][-1][1]
            assert interpolated(guessed.speeds[kind], size) <= interpolated(ideal.speeds[kind], size)
    for what in ("bandwidth", "entrywise", "passes"):
        assert getattr(guessed, what) < getattr(ideal, what)
    for optimizer in ("soap", "muon", "shampoo", "inverse_root", "dion", "adamw"):
        found = [
            look(preset("124m", optimizer, {}), mesh("fsdp", 4), 2**19, device=d).forecast for d in (guessed, ideal)
        ]
        assert 0 < found[1].step < found[0].step
        assert found[0].training == found[1].training


def test_curves_ascend():
    for curve in (Assumed().products, *gpu("h200").speeds.values()):
        assert [size for size, _ in curve] == sorted({size for size, _ in curve})
        assert [value for _, value in curve] == sorted(value for _, value in curve)


def test_an_unknown_gpu_is_told_what_there_is():
    with pytest.raises(BadInput, match="--gpu h2000: there are h200, h100, a100, l40s, and here"):
        gpu("h2000")


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(plan_here, "EVICTED", 10)
    monkeypatch.setattr(plan_here, "COLD_ROUNDS", 1)


@pytest.mark.parametrize(
    ("optimizer", "options", "speeds"),
    [
        ("soap", {"precondition_frequency": 10}, {"highest", "high", "qr"}),
        ("soap", {"refresh": "cholesky"}, {"highest", "high", "cholesky"}),
        ("shampoo", {"refresh": "eigh"}, {"highest", "eigh"}),
        ("muon", {"ns": "exact"}, {"highest", "svd"}),
        ("muon", {"ns_dtype": "bfloat16"}, {"bfloat16"}),
        ("dion", {}, {"highest", "qr", "cholesky"}),
        ("lion", {}, set()),
    ],
)
def test_this_machine_is_measured_for_what_it_will_do(brief, tmp_path, optimizer, options, speeds):
    path = tmp_path / "net.py"
    path.write_text(FILES["mixed"])
    model, threads = from_file(path, optimizer, options), torch.get_num_threads()
    device = here(model, torch.device("cpu"))
    assert set(device.speeds) == speeds
    assert torch.get_num_threads() == threads
    assert all(1e6 < speed < 1e14 for curve in device.speeds.values() for _, speed in curve)
    assert all(1e6 < x < 1e13 for x in (device.bandwidth, device.entrywise, device.passes))
    assert (device.per_stack > 1e-6) == (optimizer != "lion")
    assert device.memory > 1e8
    rule = settled(model.rule, "cpu")
    if speeds:  # every part of the work, at its own size
        sizes = {(key(part), part.size) for w in model.weights if w.view for _, m, n in w.view.pieces
                 for part in rule.work(m, n).parts}  # fmt: skip
        assert sizes == {(name, size) for name, curve in device.speeds.items() for size, _ in curve}
    seen = look(model, mesh("fsdp", 1), 1, device=device).forecast
    assert 0 < seen.step <= seen.worst * (1 + 1e-9)


def test_what_is_timed_is_what_is_counted():
    """Each task's FLOPs are those of one kind, that of its name."""
    for name in ("qr", "cholesky", "eigh", "svd"):
        _, work = plan_here._task(name, 6, torch.device("cpu"))
        assert {part.kind for part in work.parts} == {name}
    assert plan_here._task("svd", 6, torch.device("cpu"))[1].total == polar(6, 6, "exact").total - 2 * 6**3


# What is printed.


def test_the_table_and_the_figures():
    arguments = ["--params", "124m,1b", "--block-size", 0, "--gpu", "H200", "--option", "precondition_frequency=10"]
    done = steepest_plan(*arguments)
    assert done.exit_code == 0, done.output
    assert "Predicted for h200" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    found = json.loads(steepest_plan(*arguments, "--json").output)
    direct = look(
        preset("124m", "soap", {"precondition_frequency": 10}), mesh("fsdp", 8), 2**19, device=gpu("h200")
    ).forecast
    assert found[0]["forecast"] == asdict(direct) | {"share": direct.share, "fits": True}
    assert f" {in_ms(direct.step)} " in done.output
    assert f"{direct.share:.1%}" in done.output


def test_a_model_is_trained_at_the_share_that_is_given():
    slow, fast = (
        json.loads(steepest_plan("--params", "124m", "--block-size", 0, "--gpu", "a100", "--json", *more).output)[0]
        for more in ([], ["--mfu", 0.8])
    )
    assert fast["forecast"]["training"] == pytest.approx(slow["forecast"]["training"] / 2)
    assert fast["forecast"]["step"] == slow["forecast"]["step"]


def test_without_a_gpu_nothing_is_predicted():
    done = steepest_plan("--params", "124m", "--block-size", 0)
    assert "redicted" not in done.output
    assert json.loads(steepest_plan("--params", "124m", "--block-size", 0, "--json").output)[0]["forecast"] is None


def test_this_machine_by_name(brief, tmp_path):
    path = tmp_path / "net.py"
    path.write_text(FILES["mixed"])
    done = steepest_plan(path, "--gpu", "here", "--world", 1, "--block-size", 0)
    assert done.exit_code == 0, done.output
    assert "the speed measured for it" in " ".join(done.output.split())


def test_the_page_shows_what_was_predicted():
    command, *lines = re.search(r"```text\n\$ steepest plan ([^`\n]*--gpu[^`]*)```", PAGE)[1].splitlines()
    done = steepest_plan(*command.split())
    assert [line.rstrip() for line in done.output.splitlines()] == lines


def test_the_page_shows_what_was_measured():
    spec = importlib.util.spec_from_file_location("predict", ROOT / "benchmarks/predict.py")
    predict_script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict_script)
    rows = json.loads((ROOT / "benchmarks/results/predict.json").read_text())["rows"]
    assert predict_script.table(rows) in PAGE
    assert [row | predict_script.summary(row) for row in rows] == rows
    assert all(abs(row["ratio"] - 1) <= 0.3 and abs(row["state_ratio"] - 1) <= 0.05 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpu", "b3"], "--gpu b3: there are h200, h100, a100, l40s, and here"),
        (["--gpu", "h200", "--mfu", "0"], "--mfu 0.0: must be in (0, 1]"),
        (["--gpu", "h200", "--mfu", "1.5"], "--mfu 1.5: must be in (0, 1]"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, complaint):
    done = steepest_plan(*arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert complaint in line


def test_the_help_names_every_gpu():
    text = " ".join(steepest_plan("--help").output.replace("│", " ").split())
    assert all(name in text for name in (*GPUS, "here"))
