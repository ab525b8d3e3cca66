"""The measurement behind the gates runs, here at sizes too small to mean anything."""

import pytest
from gates import Figure, measure_gates, suggest

from steepest import kernels


def test_each_kernel_is_timed_against_its_twin(launched, device):
    figures = measure_gates(device, sizes=(16,), batches=(1, 2), repeats=1)
    assert {figure.what for figure in figures} == {"gram", "gram of a transpose", "polynomial", "adam"}
    assert {figure.batch for figure in figures} == {1, 2}
    assert {figure.precision for figure in figures} >= {"bfloat16", "float32"}
    assert all(figure.kernel > 0 and figure.twin > 0 for figure in figures)
    assert launched.count("_launch") >= 12
    assert launched.count("adam") >= 2


def test_a_device_without_kernels_is_named(device):
    with pytest.raises(ValueError, match=r"device='meta': kernels don't run there; they need CUDA and Triton"):
        measure_gates("meta")


def figures(what, precision, ratios, batch=1):
    return [Figure(what, precision, size, batch, ratio, 1.0) for size, ratio in ratios.items()]


@pytest.mark.parametrize(
    ("ratios", "least"),
    [
        ({512: 1.2, 1024: 0.9, 2048: 0.5}, 1024),
        ({512: 0.5, 1024: 1.2, 2048: 0.9}, 2048),
        ({512: 0.5, 1024: 0.5}, 512),
        ({512: 0.5, 1024: 0.99}, None),
    ],
)
def test_a_gate_is_where_the_twin_has_won_for_the_last_time(device, ratios, least):
    assert suggest(figures("gram", "tf32", ratios)).tf32 == least
    both = figures("gram", "tf32", ratios) + figures("polynomial", "tf32", {512: 2.0})
    assert suggest(both).tf32 == (1024 if least == 512 else least)
    entries = suggest(figures("adam", "float32", ratios, batch=2)).entries
    assert entries == (None if least is None else 2 * least**2)
    assert suggest(figures("adam", "float32", ratios)).float32 == kernels.Gates().float32
    assert suggest(figures("gram", "tf32", ratios)).bfloat16 == kernels.Gates().bfloat16
