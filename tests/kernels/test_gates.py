"""Kernels are used above their gates only, and a warning says when they do not work."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from steepest import kernels
from steepest.kernels import Gates, adam_pays, available, keeping_pays, product_pays, use
from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.symmetric import accumulate_gram, gram, symmetric_product
from steepest.rules.parts.moments import adam


class OnGPU(torch.Tensor):
    """Says that it is on a GPU; only sizes are asked for here."""


@pytest.fixture
def gpu(monkeypatch):
    """As if CPU tensors were on a GPU with a Triton that works; whether it is asked is counted."""
    asked = []
    monkeypatch.setattr(kernels, "_candidate", lambda x: kernels._mode != "never")
    monkeypatch.setattr(kernels, "_works", lambda device: asked.append(device) or True)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    return asked


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("precision", "dtype", "rows", "columns", "pays"),
    [
        ("highest", torch.bfloat16, 2048, 256, True),
        ("highest", torch.bfloat16, 2047, 4096, False),
        ("highest", torch.bfloat16, 4096, 255, False),
        ("highest", torch.float32, 8192, 8192, False),
        ("high", torch.float32, 2048, 2048, True),
        ("high", torch.float64, 8192, 8192, False),
    ],
)
def test_products_have_a_gate_of_size(gpu, precision, dtype, rows, columns, pays):
    with fp32_matmul_precision(precision):
        assert product_pays(meta(2, rows, columns, dtype=dtype)) is pays
    assert bool(gpu) is pays  # a device is tried only when it is to be used


def test_gates_can_be_set(gpu):
    X = meta(1, 100, 100)
    with use("auto", Gates(float32=100, columns=100)):
        assert product_pays(X)
        assert not product_pays(meta(1, 99, 100))
    with use("auto", Gates(bfloat16=None, tf32=None)):
        assert not product_pays(meta(1, 9000, 9000, dtype=torch.bfloat16))
    assert not product_pays(X)
    with use("always"):
        assert product_pays(X)
        assert not product_pays(meta(0, 100, 100))
        assert not product_pays(meta(1, 100, 0))
        assert not product_pays(meta(1, 50000, 10)), "offsets have 32 bits"
    with use("never"):
        assert not product_pays(meta(1, 9000, 9000, dtype=torch.bfloat16))


def test_moments_have_a_gate_of_entries_dtype_and_layout(gpu):
    def pays(shape, dtype=torch.float32, turned=False):
        m = meta(*shape, dtype=dtype)
        return adam_pays(m, m.mT if turned else m, m)

    assert pays((4, 512, 512))
    assert not pays((4, 512, 511))
    assert not pays((4, 512, 512), torch.float64)
    assert not pays((4, 512, 512), turned=True)
    with use("always"):
        assert pays((1, 2, 3))
    with use("auto", Gates(entries=None)):
        assert not pays((4, 512, 512))


def test_a_cpu_has_none_whatever_is_asked_for():
    if kernels.INTERPRETED:
        pytest.skip("Triton interprets here")
    for mode in kernels.MODES:
        with use(mode):
            assert not available(torch.zeros(2, 2))


def test_tensors_without_memory_or_with_a_derivative_go_to_torch(monkeypatch):
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with use("always"):
        X = torch.zeros(2, 2)
        assert available(X)
        assert not available(X.as_subclass(OnGPU))
        assert not available(X.clone().requires_grad_())
        with torch.no_grad():
            assert available(X.clone().requires_grad_())
        with FakeTensorMode():
            assert not available(torch.zeros(2, 2))


def test_without_triton_there_is_the_twin(monkeypatch):
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with use("always"):
        assert not available(torch.zeros(2, 2))


def test_a_triton_that_does_not_work_is_reported_once(monkeypatch):
    device = torch.device("cuda", 5)
    monkeypatch.setattr(kernels, "_working", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match=r"don't work on cuda:5.*STEEPEST_KERNELS=never"):
        assert not kernels._works(device)
    assert not kernels._works(device)


def test_a_gpu_without_tensor_cores_for_tf32_is_not_tried(monkeypatch):
    monkeypatch.setattr(kernels, "_working", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels._works(torch.device("cuda", 5))


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(kernels, "_working", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not kernels._works(torch.device("cuda", 5))
    assert not kernels._working


def test_the_scope_ends_with_an_exception():
    def fail():
        with use("never", Gates(entries=1)):
            assert kernels.gates.entries == 1
            raise KeyError

    before = kernels._mode, kernels.gates
    with pytest.raises(KeyError):
        fail()
    assert (kernels._mode, kernels.gates) == before


def test_a_bad_mode_is_named():
    with (
        pytest.raises(ValueError, match=r"mode='sometimes': must be one of 'auto', 'never', 'always'"),
        use("sometimes"),
    ):
        pass


def test_the_environment_decides_and_is_checked():
    code = """
import os, sys
try:
    from steepest import kernels
except ValueError as error:
    print(error)
os.environ["STEEPEST_KERNELS"] = "never"
from steepest import kernels
print(kernels._mode, "triton" in sys.modules)
"""
    environment = os.environ | {"STEEPEST_KERNELS": "yes"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    refused, taken = done.stdout.splitlines()
    assert "STEEPEST_KERNELS='yes': must be one of 'auto'" in refused
    assert taken == "never False"  # and Triton isn't imported before it is needed


def test_on_a_cpu_gates_leave_no_break_in_a_compiled_graph():
    X, K = torch.randn(1, 9, 4), torch.eye(9)[None]
    state = {"exp_avg": torch.zeros(1, 9, 4), "exp_avg_sq": torch.zeros(1, 9, 4)}

    @torch.compile(backend="eager", fullgraph=True)
    def step(K, X, m, v):
        accumulate_gram(K, X, 0.5)
        D = adam(X, {"exp_avg": m, "exp_avg_sq": v}, torch.ones(1, 1, 1), (0.9, 0.99), 1e-8, noise_floor=0.1)
        return symmetric_product(K, K) @ D + gram(X) @ D

    result = step(K.clone(), X, *(x.clone() for x in state.values()))
    accumulate_gram(K, X, 0.5)
    D = adam(X, state, torch.ones(1, 1, 1), (0.9, 0.99), 1e-8, noise_floor=0.1)
    torch.testing.assert_close(result, K @ K @ D + X @ X.mT @ D)


def test_what_is_kept_has_a_gate_of_entries_and_layout(gpu):
    assert keeping_pays(meta(1, 1024, 1024))
    assert keeping_pays(meta(1, 1024, 1024, dtype=torch.int8).mT)
    assert not keeping_pays(meta(1, 1024, 1023))
    assert not keeping_pays(meta(1, 1024, 4096)[..., ::2])
    with use("auto", Gates(entries=None)):
        assert not keeping_pays(meta(1, 4096, 4096))
    with use("always"):
        assert keeping_pays(meta(3))
        assert not keeping_pays(meta(1)[0])
        assert not keeping_pays(meta(0, 4))
        assert not keeping_pays(meta(1, 2**30))
    with use("never"):
        assert not keeping_pays(meta(1, 4096, 4096))
