"""Tests of ``steepest plan``, and of the page of simulations, whose figures the script reproduces."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.plan.models import PRESETS, Model, Weight, from_file, preset
from steepest.lab.plan.plan import jobs, look, mesh
from steepest.rule.work import work
from steepest.rules.adamw import AdamW
from steepest.rules.soap import Soap
from steepest.view import View

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/scaling.md").read_text()
FOUND = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())
TOKENS = 2**20
MODEL = """
from torch import nn

def model():
    return nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 160), nn.Tanh(), nn.Conv2d(6, 20, 3), nn.Linear(160, 10))
"""


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simulate = load("simulate")


def steepest(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})


# The page.


def test_the_page_shows_what_was_simulated():
    for table in simulate.tables(FOUND):
        assert table in PAGE


@pytest.mark.parametrize("way", simulate.WAYS)
@pytest.mark.parametrize(("name", "world"), [("7b", 64), ("7b", 1024), ("70b", 256)])
def test_balances_come_again(name, way, world):
    assert simulate.balance(name, way, world) == FOUND["balance"][f"{name}, {way}"][str(world)]


@pytest.mark.parametrize(("kind", "in_order"), [("by cost", False), ("in order", True)])
def test_waiting_comes_again(kind, in_order):
    assert simulate.waiting("70b", 128, in_order) == FOUND["waiting"][f"70b, {kind}"]["128"]


@pytest.mark.parametrize(
    ("name", "size", "world"), [("7b", 0, 1024), ("7b", 4096, 256), ("70b", 0, 64), ("70b", 4096, 64)]
)
def test_outlooks_come_again(name, size, world):
    assert simulate.outlook(name, size, mesh("fsdp", world)) == FOUND["outlook"][f"{name}, {size}"][str(world)]


def test_the_command_on_the_page_prints_that():
    command, *lines = re.search(r"```text\n\$ steepest (.*?)```", PAGE, re.DOTALL)[1].splitlines()
    done = steepest(*command.split())
    assert [line.rstrip() for line in done.output.splitlines()] == lines


# What is planned.


@pytest.mark.parametrize(
    ("name", "parameters", "matrices"),
    [("124m", 124_439_808, 72), ("1b", 1_235_814_400, 112), ("7b", 6_738_415_616, 224), ("70b", 68_976_648_192, 560)],
)
def test_well_known_models_have_their_published_sizes(name, parameters, matrices):
    one = look(preset(name, "muon", {}), mesh("ddp", 2), TOKENS)
    assert (one.parameters, one.matrices) == (parameters, matrices)
    assert PRESETS[name][0]


def test_state_is_what_init_lays_out_and_elementwise_eight_bytes():
    model = preset("124m", "soap", {})
    d, layers = 768, 12
    matrices = [(3, d, d), (1, d, d), (1, 4 * d, d), (1, d, 4 * d)]
    expected = layers * sum(b * 4 * (2 * m * n + 2 * m * m + 2 * n * n) for b, m, n in matrices)
    rest = 8 * (model.parameters - layers * sum(b * m * n for b, m, n in matrices))
    whole = look(model, mesh("ddp", 1), TOKENS)
    assert (whole.state_max, whole.elementwise_max) == (expected + rest, rest)
    assert (whole.sent_in_max, whole.sent_out_max, whole.balance) == (0, 0, 1)
    four = look(model, mesh("fsdp", 4), TOKENS)
    assert four.state_mean == (expected + rest) / 4
    replicated = look(model, mesh("ddp", 4), TOKENS)
    assert replicated.state_mean == expected / 4 + rest


def test_share_and_balance():
    model = preset("7b", "muon", {})
    one = look(model, mesh("fsdp", 256), TOKENS)
    total = sum(job.cost for job in jobs(model, mesh("fsdp", 256)))
    assert one.flops_mean == pytest.approx(total / 256)
    assert one.balance == one.flops_max / one.flops_mean > 1
    assert one.share == pytest.approx(one.flops_max * 256 / (6 * 6_738_415_616 * TOKENS))


def test_layouts_send_what_they_send():
    """Directions are float32 and gradients bfloat16; P entries in matrices of two sizes are assigned evenly."""
    model = preset("7b", "soap", {})
    P = sum(job.rectangle.size for job in jobs(model, mesh("ddp", 32)))
    ddp, fsdp, hsdp = (look(model, mesh(text, 32), TOKENS) for text in ("ddp", "fsdp", "hsdp:4x8"))
    assert ddp.sent_in_max == 0
    assert ddp.sent_out_mean == pytest.approx(4 * P * 31 / 32)
    assert fsdp.sent_in_mean == pytest.approx(2 * P / 32 * 31 / 32)
    assert fsdp.sent_out_mean == pytest.approx(4 * P / 32 * 31 / 32)
    assert hsdp.sent_in_mean == pytest.approx(2 * P / 32 * 7 / 8)
    assert hsdp.sent_out_mean == pytest.approx(4 * P / 32 * (4 - 1 / 8))
    for text in ("tp", "fsdp+tp:8x4"):
        cut = look(model, mesh(text, 32), TOKENS)
        assert cut.sent_in_mean == pytest.approx(fsdp.sent_in_mean)
        assert cut.sent_out_mean == pytest.approx(fsdp.sent_out_mean)


def test_a_model_from_a_file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    model = from_file(path, "soap", {})
    assert [(weight.name, weight.view is not None) for weight in model.weights] == [
        ("0.weight", False), ("1.weight", True), ("1.bias", False), ("3.weight", True), ("3.bias", False),
        ("4.weight", False), ("4.bias", False),
    ]  # fmt: skip
    assert {weight.itemsize for weight in model.weights} == {4}
    names = [job.name for job in jobs(model.cut(32), mesh("fsdp", 4))]
    assert names == [f"1.weight.{k}" for k in range(10)] + ["3.weight"], "slices can't cut merged columns: one job"
    assert next(job.rectangle.shape for job in jobs(model.cut(32), mesh("fsdp", 4))) == (32, 32)


def test_nothing_is_allocated_for_a_model_from_a_file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\ndef model(): return nn.Linear(2**20, 2**20)\n")
    assert from_file(path, "muon", {}).parameters == 2**40 + 2**20


@pytest.mark.parametrize(("layout", "travel"), [("fsdp", False), ("hsdp:2x2", False), ("ddp", True)])
def test_experts_stay_where_they_are_whole(layout, travel):
    view = View((8, 24, 12), merge_dims=False)
    model = Model("experts", (Weight("up", (8, 24, 12), view, 2),), "soap", Soap(), AdamW())
    on = mesh(layout, 4)
    one = look(model, on, TOKENS)
    assert len(list(jobs(model, on))) == travel
    assert (one.sent_out_max > 0) == travel
    shares = {"fsdp": (1 / 4, 1 / 4), "hsdp:2x2": (1 / 2, 1 / 2), "ddp": (1, 1 / 4)}[layout]
    assert (one.flops_max, one.flops_mean) == tuple(share * 8 * work(Soap(), 24, 12).total for share in shares)
    state = 8 * 4 * (2 * 24 * 12 + 2 * 24**2 + 2 * 12**2)
    assert (one.state_max, one.state_mean) == tuple(share * state for share in shares)


# What is printed.


def test_blocks_are_tried_unless_one_is_asked_for():
    found = json.loads(steepest("plan", "--params", "124m, 1b", "--optimizer", "muon", "--json").output)
    assert [(one["model"], one["block_size"]) for one in found] == [
        ("124m", 0), ("124m", 2048), ("1b", 0), ("1b", 4096), ("1b", 2048)
    ]  # fmt: skip
    found = json.loads(steepest("plan", "--params", "124m", "--block-size", 512, "--json").output)
    assert [one["block_size"] for one in found] == [512]
    assert found[0].keys() >= {"balance", "share", "lockstep", "state_mean"}


def test_gradients_of_another_dtype():
    half, full = (
        json.loads(steepest("plan", "--params", "124m", "--block-size", 0, "--json", *dtype).output)[0]
        for dtype in ([], ["--dtype", "float32"])
    )
    assert 2 * half["sent_in_max"] == full["sent_in_max"]
    assert half["sent_out_max"] == full["sent_out_max"]


def test_an_optimizer_without_matrices():
    done = steepest("plan", "--params", "124m", "--optimizer", "lion")
    assert done.exit_code == 0, done.output
    assert re.search(r"124m +– +0 +62.2M", done.output), "four bytes of each parameter by eight"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--params", "3b"], "--params 3b: there are 124m, 1b, 7b, 70b"),
        (["nowhere.py"], "no such file"),
        (["nowhere.py", "--params", "7b"], "not both"),
        (["--world", "0"], "--world 0: must be at least 1"),
        (["--layout", "pp"], "--layout pp: must be fsdp, ddp, tp, hsdp:RxS"),
        (["--layout", "hsdp:3x2"], "3 times 2 are no 8 ranks"),
        (["--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--dtype", "int8"], "--dtype int8: there are float32"),
        (["--block-size", "-1"], "block_size=-1: must be an integer >= 0"),
        (["--optimizer", "saop"], "did you mean 'soap'?"),
        (["--option", "precondition_freq=1"], "did you mean 'precondition_frequency'?"),
        (["--option", "heads=2"], "heads=2: the routing says how matrices are seen"),
        (["--option", "max_precond_dim=-1"], "max_precond_dim=-1: must be an integer >= 0"),
    ],
)
def test_bad_input_gets_one_clear_line_and_status_2(arguments, complaint):
    done = steepest("plan", *arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert complaint in line
    assert done.stdout == ""
