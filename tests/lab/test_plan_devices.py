"""Devices of ``steepest plan --gpu``: GPUs at and below their peaks, and this machine, measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plans_made_up import FILES, steepest_plan

from steepest.lab.plan import here as plan_here
from steepest.lab.plan.devices import GPUS, PRODUCTS, gpu, interpolated, key
from steepest.lab.plan.here import here
from steepest.lab.plan.models import from_file, preset
from steepest.lab.plan.plan import look, mesh
from steepest.lab.plan.time import settled, starting
from steepest.lab.shared.errors import BadInput
from steepest.rule.work import counted, first_work, work


def ideal(name):
    """A GPU on which everything runs at its peak."""
    device, peaks = gpu(name), GPUS[name]
    products = {"highest": peaks.float32, "high": peaks.tf32, "medium": peaks.tf32, "bfloat16": peaks.bfloat16}
    speeds = {kind: ((1, products.get(kind, peaks.float32)),) for kind in device.speeds}
    bandwidths = dict.fromkeys(("bandwidth", "entrywise", "passes"), peaks.bandwidth)
    return replace(device, speeds=speeds, **bandwidths, per_stack=0.0, per_matrix=0.0)


def test_at_its_peak_a_gpu_takes_flops_by_peak_and_bytes_by_bandwidth():
    model = preset("124m", "soap", {"precondition_frequency": 10, "solver": "first_order"}, itemsize=4)
    whole = look(model, mesh("fsdp", 1), 2**19, device=ideal("h200")).forecast
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
    guessed, peak = gpu(name), ideal(name)
    for kind in peak.speeds:
        for size in (1, 100, 1000, 10**5):
            assert 0 < guessed.speeds[kind][-1][1] <= peak.speeds[kind][-1][1]
            assert interpolated(guessed.speeds[kind], size) <= interpolated(peak.speeds[kind], size)
    for what in ("bandwidth", "entrywise", "passes"):
        assert getattr(guessed, what) < getattr(peak, what)
    for optimizer in ("soap", "muon", "shampoo", "inverse_root", "dion", "adamw"):
        found = [
            look(preset("124m", optimizer, {}), mesh("fsdp", 4), 2**19, device=d).forecast for d in (guessed, peak)
        ]
        assert 0 < found[1].step < found[0].step
        assert found[0].training == found[1].training


def test_curves_ascend():
    for curve in (PRODUCTS, *gpu("h200").speeds.values()):
        assert [size for size, _ in curve] == sorted({size for size, _ in curve})
        assert [value for _, value in curve] == sorted(value for _, value in curve)


def test_an_unknown_gpu_is_told_what_there_is():
    with pytest.raises(BadInput, match="--gpu h2000: there are h200, h100, a100, l40s, and here"):
        gpu("h2000")


@pytest.fixture
def brief(hasty, monkeypatch):
    monkeypatch.setattr(plan_here, "EVICTED", 10)
    monkeypatch.setattr(plan_here, "COLD_ROUNDS", 1)


@pytest.mark.parametrize(
    ("optimizer", "options", "speeds"),
    [
        ("soap", {"precondition_frequency": 10}, {"highest", "high", "qr", "eigh"}),
        ("soap", {"solver": "cholesky"}, {"highest", "high", "cholesky", "eigh", "qr"}),
        ("shampoo", {"solver": "eigh"}, {"highest", "eigh", "qr"}),
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
    rule, starts = settled(model.rule, "cpu"), starting(model.rule, "cpu")
    if speeds:  # every part of the work, at its own size
        sizes = {(key(part), part.size) for w in model.weights if w.view for _, m, n in w.view.pieces
                 for part in {**work(rule, m, n).parts, **first_work(starts, m, n).parts}}  # fmt: skip
        assert sizes == {(name, size) for name, curve in device.speeds.items() for size, _ in curve}
    seen = look(model, mesh("fsdp", 1), 1, device=device).forecast
    assert 0 < seen.step <= seen.worst * (1 + 1e-9)


def test_each_task_is_of_the_kind_that_it_is_timed_for():
    for kind, task in plan_here.TASKS.items():
        assert {part.kind for part in counted(task, torch.empty(6, 6, device="meta")).parts} == {kind}


def test_this_machine_by_name(brief, tmp_path):
    path = tmp_path / "net.py"
    path.write_text(FILES["mixed"])
    done = steepest_plan(path, "--gpu", "here", "--world", 1, "--block-size", 0)
    assert done.exit_code == 0, done.output
    assert "the speed measured for it" in " ".join(done.output.split())
