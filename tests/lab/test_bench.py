"""The bench: its figures add up, peers do the same work, and what can't be measured is refused. No time is judged."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from steepest.cli import app
from steepest.engine.phases import PHASES, REST
from steepest.lab.bench import command as bench_session
from steepest.lab.bench import peers as bench_peers
from steepest.lab.bench.entrants import Entrant, Family, parse_entrants
from steepest.lab.bench.measure import Measured, measure, state_bytes
from steepest.lab.bench.peers import entrant, peers_of
from steepest.lab.bench.results import rows
from steepest.lab.bench.shapes import MODELS, ShapeSet, shape_set
from steepest.lab.bench.speed import floor, measure_speed
from steepest.lab.bench.text import times
from steepest.lab.plan import time as plan_time
from steepest.lab.plan.devices import Device
from steepest.lab.plan.models import Architecture, gpt2, rule_of
from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.peers import EAGER, PACKAGES, PEERS, float32_for_bfloat16
from steepest.rule.work import work

CPU = torch.device("cpu")
TINY = ShapeSet("tiny", "for tests", Counter({("a", 12, 8): 2, ("b", 6, 6): 1}), 1, 1)


def ideal(flops=1e9, bfloat16=0.0, bandwidth=1e9) -> Device:
    """A device on which everything runs at the speed of products and copies."""
    kinds = ("highest", "high", "medium", "qr", "cholesky", "eigh", "svd")
    speeds = dict.fromkeys(kinds, ((1, flops),)) | {"bfloat16": ((1, bfloat16),)}
    return Device("ideal", "cpu", speeds, bandwidth, bandwidth, bandwidth, 0.0, 0.0, flops, 0.0)


SPEED = ideal()


def measured(text: str, steps: int = 2, warmup: int = 1, shapes: ShapeSet = TINY) -> list[Measured]:
    return measure(parse_entrants(text, 12), shapes.matrices, CPU, steps, warmup)


@pytest.fixture
def tiny(hasty, monkeypatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", Architecture("for tests", 3, partial(gpt2, d=8)))


def bench(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


# Shapes.


@pytest.mark.parametrize(
    ("name", "matrices", "entries"),
    [("gpt-tiny", 8, 1572864), ("gpt2-124m", 48, 84934656), ("llama-1b", 112, 973078528), ("moe", 272, 142606336)],
)
def test_every_set_builds(name, matrices, entries):
    shapes = shape_set(name)
    assert (len(shapes.matrices), shapes.entries) == (matrices, entries)
    cut = shape_set(name, depth=1)
    assert len(cut.matrices) * shapes.layers == matrices
    assert f"1 of {shapes.layers} layers" in str(cut)
    assert shape_set(name, depth=1000) == shapes


# Figures.


def test_phases_add_up_to_the_step():
    for one in measured("soap, moso, muon, adamw, shampoo, kl-soap"):
        assert len(one.cpu) == len(one.wall) == len(one.phases) == 2
        for seconds, phases in zip(one.cpu, one.phases, strict=True):
            assert 0 < sum(phases.values()) <= seconds
        assert set(one.phase_means()) <= {*PHASES, REST}


@pytest.mark.parametrize(
    ("name", "heard"),
    [
        ("soap", {"gather", "factors", "refresh", "project", "elementwise", "apply", REST}),
        ("kl-soap", {"gather", "factors", "refresh", "project", "elementwise", "apply", REST}),
        ("muon", {"gather", "orthogonalize", "apply", REST}),
        ("adamw", {"elementwise", REST}),
        ("shampoo-f1", {"gather", "factors", "refresh", "project", "apply", REST}),
    ],
)
def test_each_has_its_phases(name, heard):
    assert set(measured(name)[0].phase_means()) == heard


def test_state_is_what_the_optimizer_has():
    (one,) = measured("soap")
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in TINY.matrices]
    optimizer = one.entrant.make(params)
    has = sum(x.nbytes for p in params for x in optimizer.state[p].values())
    assert one.state_bytes == has == state_bytes(optimizer.state)
    factors = 2 * 2 * 4 * sum(m * m + n * n for m, n in TINY.matrices) / 2
    assert has == 8 * TINY.entries + factors + len(params) * 12  # two moments; step and clock
    assert rows([one], TINY, SPEED)[0]["state_bytes_per_entry"] == has / TINY.entries
    assert one.peak_bytes >= one.held_bytes >= has


def test_memory_is_watched_from_construction_on():
    class Hungry(torch.optim.SGD):
        def step(self, closure=None):
            torch.zeros(2**20)  # allocated, and gone
            return super().step(closure)

    (one,) = measure([_entrant(lambda params: Hungry(params, lr=0.1))], TINY.matrices, CPU, 1, 1)
    assert one.held_bytes < 4096
    assert 4 * 2**20 <= one.peak_bytes < 4 * 2**20 + 4096


def test_all_see_the_same_gradients_unspoilt():
    seen: dict[str, list[list[torch.Tensor]]] = {"first": [], "second": []}

    def spoiler(label: str) -> Entrant:
        class Spoiler(torch.optim.SGD):
            def step(self, closure=None):
                grads = [p.grad for group in self.param_groups for p in group["params"]]
                seen[label].append([grad.clone() for grad in grads])
                for grad in grads:
                    grad.zero_()

        return replace(_entrant(lambda params: Spoiler(params, lr=0.1)), label=label)

    measure([spoiler("first"), spoiler("second")], TINY.matrices, CPU, 2, 1)
    assert len(seen["first"]) == 3
    torch.testing.assert_close(seen["first"], seen["second"], rtol=0, atol=0)
    assert not torch.equal(seen["first"][0][0], seen["first"][1][0])
    assert seen["first"][0][0].abs().min() > 0


def test_ratios_are_to_the_fastest_peer_and_1_to_oneself():
    ours = Measured(_entrant(), cpu=[2.0, 4.0], wall=[3.0, 3.0])
    slow = Measured(replace(_entrant(), label="slow", ours=False), cpu=[6.0], wall=[6.0])
    fast = Measured(replace(_entrant(), label="fast", ours=False), cpu=[4.0], wall=[4.0])
    broken = Measured(replace(_entrant(), label="broken", ours=False), error="no")
    alone = Measured(replace(_entrant(), label="alone", family=Family("muon")), cpu=[1.0], wall=[1.0])
    found = rows([ours, slow, broken, fast, alone], TINY, SPEED)
    assert [row.get("ratio") for row in found] == [0.75, 1.5, None, 1.0, 1.0]
    assert [row.get("baseline") for row in found] == ["fast", "fast", None, "fast", "alone"]
    assert found[0]["ratios"] == {"slow": 0.5, "fast": 0.75}
    assert [cells[0] for cells in times(found, "cpu_ms")[1]] == ["ours", "slow", "broken", "fast *", "alone *"]
    assert found[0]["cpu_ms"]["mean"] == 3000
    assert found[0]["cpu_ms"]["max_over_mean"] == 4 / 3


def test_an_entrant_that_raises_is_out_and_the_others_go_on():
    def unmade(params):
        raise ValueError("not today")

    class Late(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("too late\nfor all")

    entrants = [
        replace(_entrant(unmade), label="unmade"),
        replace(_entrant(lambda params: Late(params, lr=0.1)), label="late"),
        _entrant(),
    ]
    found = rows(measure(entrants, TINY.matrices, CPU, 2, 1), TINY, SPEED)
    assert [row["error"] for row in found] == ["not today", "RuntimeError: too late", ""]
    assert "cpu_ms" not in found[1]
    assert len(found[2]["cpu_ms_by_step"]) == 2


def test_time_that_is_up_ends_steps_with_a_whole_period():
    asked: list[bool] = []

    def late(after: int) -> bool:
        asked.append(True)
        return len(asked) > after

    entrants = parse_entrants("soap-f2, adamw", 12)
    for after, steps in ((5, 4), (6, 4), (20, 6)):  # two steps of warm-up, then periods of two
        asked.clear()
        found = measure(entrants, TINY.matrices, CPU, 6, 2, late=partial(late, after))
        assert [len(one.wall) for one in found] == [steps, steps]
        assert not any(one.error for one in found)
    asked.clear()
    found = measure(entrants, TINY.matrices, CPU, 6, 2, late=partial(late, 1))
    assert {one.error for one in found} == {"time was up before its first timed step"}


# The floor.


def test_the_floor_is_flops_and_bytes():
    m, n = 12, 8
    shapes = ShapeSet("one", "", Counter({("a", m, n): 3}), 1, 1)
    soap = rule_of("soap", {"precondition_frequency": 5})
    products = 3 * work(soap, m, n).total / 10
    passes = 3 * (40 * m * n + 16 * (m * m + n * n)) / 7
    assert floor(soap, shapes, ideal(10.0, bandwidth=7.0)) == pytest.approx(products + passes)
    adamw = floor(rule_of("adamw", {}), shapes, SPEED)
    assert adamw == pytest.approx(3 * 28 * m * n / 1e9)


@pytest.mark.parametrize("pays", [True, False])
def test_newton_schulz_runs_in_bfloat16_where_that_pays(monkeypatch, pays):
    monkeypatch.setattr(plan_time, "bfloat16_pays", lambda device: pays)
    shapes = ShapeSet("one", "", Counter({("a", 8, 8): 1}), 1, 1)
    both = ideal(1.0, 4.0, 1e99)
    flops = 30 * 8**3
    assert floor(rule_of("muon", {}), shapes, both) == pytest.approx(flops / (4 if pays else 1))
    assert floor(rule_of("muon", {"ns_dtype": "float32"}), shapes, both) == pytest.approx(flops)
    assert floor(rule_of("muon", {"ns": "cans"}), shapes, both) == pytest.approx(flops)  # it doesn't survive bfloat16


def test_a_machine_has_a_speed(hasty):
    speed = measure_speed(TINY, CPU)
    assert [size for size, _ in speed.speeds["highest"]] == [6, 9, 10]
    assert all(rate > 1e6 for curve in speed.speeds.values() for _, rate in curve)
    assert speed.bandwidth > 1e6


# Families and peers.


def test_peers_are_told_to_do_the_same():
    ours = parse_entrants(
        "soap-f10(betas=(0.8, 0.9), shampoo_beta=0.7, max_precond_dim=8, lr=0.5), muon(momentum=0.6)", 12
    )
    assert ours[0].family == Family("soap", 10, 8)
    settings = {
        f"{peer.package}.{peer.name}": dict(entrant(peer, one).settings)
        for one in ours
        for peer in PEERS
        if one.family.kind == peer.kind
    }
    soap = {"lr": 0.5, "betas": (0.8, 0.9), "shampoo_beta": 0.7, "precondition_frequency": 10, "merge_dims": False}
    for label, limit in (("pytorch_optimizer.SOAP", "max_precondition_dim"), ("heavyball.SOAP", "max_precond_dim")):
        assert settings[label].items() >= (soap | {limit: 8}).items()
    assert settings["torch.optim.Muon"]["momentum"] == settings["heavyball.Muon"]["betas"][0] == 0.6


def test_families_tell_work_apart():
    names = "soap, soap(solver='eigh'), soap-f2, kl-soap, muon, muon(ns='cubic5'), moso, adamw"
    families = [str(one.family) for one in parse_entrants(names, 12)]
    expected = ["soap, f = 1", "soap by eigh, f = 1", "soap, f = 2", "kl-soap, f = 1", "muon", "muon by cubic5"]
    assert families == [*expected, "moso", "adamw"]


def test_each_family_has_its_peers_once():
    ours = parse_entrants("soap-f2, soap-f2(stagger=True), muon, adamw", 12)
    found, missing = peers_of(ours, libraries=False)
    assert [one.label for one in found] == [
        *("torch.optim.Muon", "torch.optim.Muon in float32", "torch.optim.AdamW", "torch.optim.AdamW fused")
    ]
    assert missing == []
    assert all(not one.ours for one in found)


def test_torch_muon_multiplies_in_float32_only_within_its_scope():
    x = torch.ones(1)
    with float32_for_bfloat16():
        assert x.bfloat16().dtype == torch.float32
    assert x.bfloat16().dtype == torch.bfloat16


@pytest.mark.parametrize("package", PACKAGES)
def test_peers_step(package):
    pytest.importorskip(package)
    names = "soap-f2, soap-f1, kl-soap-f2, muon, normuon, adamuon, adamw, lion, shampoo-f2, kl-shampoo-f2"
    found, _ = peers_of(parse_entrants(names, 12), libraries=True)
    found = [one for one in found if one.label.startswith(package)]
    assert len(found) >= 6
    for one in measure(found, TINY.matrices, CPU, 2, 3):
        assert one.error == ""
        assert one.state_bytes > 4 * TINY.entries * 0.9
        assert set(one.phase_means()) == {REST}


def test_heavyball_compiles_only_within_its_scope():
    heavyball = pytest.importorskip("heavyball")
    before = heavyball.utils.compile_mode
    with EAGER():
        assert heavyball.utils.compile_mode is None
    assert heavyball.utils.compile_mode == before
    found, _ = peers_of(parse_entrants("kl-soap", 12), libraries=True, compiled=True)
    assert [one.label for one in found] == ["heavyball.KLSOAP f1", "heavyball.KLSOAP compiled f1"]
    with found[1].scope():
        assert heavyball.utils.compile_mode == before  # as it comes


# The command.


def test_end_to_end(tiny, tmp_path):
    done = bench(
        "--shapes", "tiny, tiny", "--optimizers", "soap-f2, adamw", "--steps", 4, "--depth", 1, "--out", tmp_path
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert {"command", "versions", "machine", "device", "threads", "steps", "load"} <= found.keys()
    assert len(found["sets"]) == 2
    one = found["sets"][0]
    assert (one["layers"], one["of_layers"], one["warmup"]) == (1, 3, 3)
    assert "1 of 3 layers" in done.output
    names = [row["contender"] for row in one["rows"]]
    assert names == ["soap-f2", "adamw", "torch.optim.AdamW", "torch.optim.AdamW fused"]
    for row in one["rows"]:
        assert len(row["cpu_ms_by_step"]) == 4
        assert row["cpu_ms"]["mean"] == pytest.approx(sum(row["cpu_ms_by_step"]) / 4)
        assert sum(row["phases_ms"].values()) <= row["cpu_ms"]["mean"]
        assert row["over_floor"] == pytest.approx(row["cpu_ms"]["mean"] / row["floor_ms"])
    html = (tmp_path / "report.html").read_text()
    assert html.count("plotly-graph-div") >= 2
    assert "http" not in html.split("</script>")[-3].split("<body>")[-1]  # nothing is loaded
    for name in names:
        assert name in html


def test_a_peer_that_is_not_there_is_named(tiny, tmp_path, monkeypatch):
    find = bench_peers.importlib.util.find_spec
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None if name in PACKAGES else find(name))
    done = bench("--shapes", "tiny", "--optimizers", "soap", "--peers", "--steps", 2, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    for package in PACKAGES:
        assert f"{package} is not installed" in done.output
    assert 'pip install "steepest[peers]"' in " ".join(done.output.split())
    assert json.loads((tmp_path / "results.json").read_text())["missing"] == ["heavyball", "pytorch_optimizer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "huge"), "--shapes huge: there are gpt-tiny, gpt2-124m, llama-1b, moe"),
        (("--depth", 0), "--depth 0: must be at least 1, a number of layers"),
        (("--steps", 25), "--steps 25: must be a multiple of 10, since soap-f10 refreshes every 10 steps"),
        (("--steps", 0), "--steps 0: must be at least 1"),
        (("--warmup", 0), "--warmup 0: must be at least 1"),
        (("--device", "tpu"), "--device tpu: must be one of cpu, cuda"),
        (("--compiled",), "--compiled: is about peers that compile themselves, so it needs --peers"),
        (("--optimizers", "saop"), "unknown optimizer 'saop'; did you mean 'soap'?"),
        (("--optimizers", "soap(lr=-1)"), "optimizer soap(lr=-1): lr=-1: must be"),
        (("--optimizers", "soap-f3(precondition_frequency=2)"), "names its frequency twice"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path):
    done = bench(*arguments, "--out", tmp_path)
    assert done.exit_code == 2
    assert message in done.output
    assert not list(tmp_path.iterdir())


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="--device cuda: torch sees no CUDA device here"):
        bench_session.pick_device("cuda")


def test_out_that_is_a_file(tiny, tmp_path):
    (tmp_path / "file").touch()
    done = bench("--shapes", "tiny", "--optimizers", "adamw", "--out", tmp_path / "file")
    assert done.exit_code == 2
    assert f"can't write to {Path(tmp_path / 'file')}" in " ".join(done.output.split())


def _entrant(make=lambda params: torch.optim.SGD(params, lr=0.1)) -> Entrant:
    return Entrant("ours", Family("soap", 1), rule_of("soap", {}), make, {}, scope=nullcontext)
