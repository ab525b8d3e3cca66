"""Newton-Schulz iterates in the dtype that was measured to be faster; the group holds it, and a saved run keeps it."""

import io

import pytest
import torch

import steepest
from steepest.linalg import stopwatch
from steepest.linalg.polar import iteration_dtype, polar_factor
from steepest.linalg.stopwatch import bfloat16_pays
from steepest.rules.parts import newton_schulz

CPU = torch.device("cpu")
NAMES = ["muon", "normuon", "adamuon", "dion2"]


@pytest.fixture
def processor(monkeypatch):
    """Pretend that a product takes so many seconds, by dtype and side; what was timed, and on how many threads."""
    timed = []

    def pretend(float32, bfloat16, small=None):
        def seconds(X):
            timed.append((X.dtype, len(X), torch.get_num_threads()))
            noise = 1 + (len(timed) * 7 % 5)  # five different times, the shortest of which is the true one
            if X.dtype == torch.float32:
                return noise * float32
            return noise * (small if small and len(X) == stopwatch.SMALL else bfloat16)

        monkeypatch.setattr(stopwatch, "_seconds", seconds)
        bfloat16_pays.cache_clear()
        return timed

    yield pretend
    bfloat16_pays.cache_clear()


@pytest.fixture
def pays(monkeypatch):
    """Pretend that bfloat16 pays, or that it doesn't."""
    return lambda answer: monkeypatch.setattr(newton_schulz, "bfloat16_pays", lambda device: answer)


def gradient(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bfloat16", "answer"), [(1 / 3, True), (1 / 1.45, False), (1.0, False), (60.0, False)])
def test_the_margin_is_decisive(processor, bfloat16, answer):
    processor(1.0, bfloat16, small=1.0)
    assert bfloat16_pays(CPU) is answer


def test_it_is_measured_once_in_turn_and_on_one_thread(processor):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        timed = processor(1.0, 0.5)
        assert bfloat16_pays(CPU)
        first = len(timed)
        assert bfloat16_pays(CPU)
        assert len(timed) == first
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert {on for *_, on in timed} == {1}
    assert [dtype for dtype, *_ in timed[:4]] == [torch.float32, torch.bfloat16] * 2
    assert {side for _, side, _ in timed} == {stopwatch.SMALL, stopwatch.LARGE}


def test_a_processor_without_bfloat16_is_not_kept_busy_with_it(processor):
    timed = processor(1.0, 60.0)
    assert not bfloat16_pays(CPU)
    assert {side for _, side, _ in timed} == {stopwatch.SMALL}


def test_a_device_that_multiplies_float16_iterates_in_it(pays, monkeypatch):
    pays(True)
    monkeypatch.setattr(newton_schulz, "multiplies_float16", lambda device: True)
    word = {ns: steepest.Muon([torch.nn.Parameter(torch.zeros(2, 3))], ns=ns) for ns in ("keller", "cans")}
    assert {ns: optimizer.param_groups[0]["ns_dtype"] for ns, optimizer in word.items()} == {
        "keller": "float16",
        "cans": "float32",
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", [True, False])
def test_the_group_holds_a_plain_word(pays, name, answer):
    pays(answer)
    optimizer = steepest.create(name, [torch.nn.Parameter(torch.zeros(2, 3))], lr=0.1)
    word = "bfloat16" if answer else "float32"
    assert optimizer.param_groups[0]["ns_dtype"] == word
    assert optimizer.state_dict()["param_groups"][0]["ns_dtype"] == word


def test_what_is_named_is_not_measured(processor):
    timed = processor(1.0, 0.5)
    for word in ("float32", "bfloat16", "float16"):
        optimizer = steepest.Muon([torch.nn.Parameter(torch.zeros(2, 3))], ns_dtype=word)
        assert optimizer.param_groups[0]["ns_dtype"] == word
    for ns in ("exact", "cans"):  # neither can run in bfloat16
        optimizer = steepest.Muon([torch.nn.Parameter(torch.zeros(2, 3))], ns=ns)
        assert optimizer.param_groups[0]["ns_dtype"] == "float32"
    assert not timed


def test_parameters_without_a_device_leave_it_open(processor):
    timed = processor(1.0, 0.5)
    optimizer = steepest.Muon([torch.nn.Parameter(torch.empty(2, 3, device="meta"))])
    assert optimizer.param_groups[0]["ns_dtype"] == "auto"
    assert not timed


def test_a_later_group_is_settled_too(pays):
    pays(True)
    first, second = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    optimizer = steepest.Optimizer([first], "lion", lr=0.1)
    optimizer.add_param_group({"params": [second], "rule": "muon"})
    assert optimizer.param_groups[1]["ns_dtype"] == "bfloat16"
    assert "ns_dtype" not in optimizer.param_groups[0]


def test_a_saved_run_goes_on_in_its_own_dtype_wherever_it_is_loaded(pays):
    def run(steps, saved=None):
        W = torch.nn.Parameter(gradient(0, 130, 150) if saved is None else saved["W"].clone())
        optimizer = steepest.Muon([W], lr=0.1)
        if saved is not None:
            optimizer.load_state_dict(saved["optimizer"])
        for seed in steps:
            W.grad = gradient(seed, 130, 150)
            optimizer.step()
        file = io.BytesIO()
        torch.save({"W": W.detach().clone(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    pays(True)
    unbroken, broken_off = run(range(1, 4)), run(range(1, 3))
    pays(False)
    assert not torch.equal(run(range(1, 4))["W"], unbroken["W"])  # the dtype shows
    assert torch.equal(run(range(3, 4), broken_off)["W"], unbroken["W"])


@pytest.mark.parametrize(
    ("shape", "gains"),
    [((128, 128), True), ((3, 256, 1024), True), ((127, 256), False), ((1025, 256), False), ((64, 64), False)],
)
def test_on_a_cpu_bfloat16_is_for_matrices_that_gain_by_it(shape, gains):
    assert iteration_dtype(torch.empty(shape), "bfloat16") == (torch.bfloat16 if gains else torch.float32)
    assert iteration_dtype(torch.empty(shape), "float32") == torch.float32
    assert iteration_dtype(torch.empty(shape), "auto") is None
    assert iteration_dtype(torch.empty(shape, dtype=torch.float64), "bfloat16") is None
    if shape[-2:] == (64, 64):
        assert iteration_dtype(torch.empty(shape, device="meta"), "bfloat16") == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(130, 150), (150, 130), (40, 130)])
def test_one_matrix_in_16_bits_is_as_in_a_batch(dtype, shape):
    G = gradient(1, 2, *shape)
    together = polar_factor(G, dtype=dtype)
    for one, expected in zip(G, together, strict=True):
        alone = polar_factor(one, dtype=dtype)
        assert (alone - expected).norm() / expected.norm() < 0.02
        assert (alone - polar_factor(one)).norm() / expected.norm() < 0.03


def test_a_table_that_needs_float32_is_named():
    for word in ("bfloat16", "float16"):
        with pytest.raises(ValueError, match=rf"ns_dtype='{word}': must be 'float32' or 'auto' with ns='cans'"):
            steepest.Muon([torch.nn.Parameter(torch.zeros(2, 3))], ns="cans", ns_dtype=word)
    with pytest.raises(ValueError, match=r"ns_dtype='fp32': must be one of 'auto', 'float32', 'bfloat16', 'float16'"):
        steepest.Dion2([torch.nn.Parameter(torch.zeros(2, 3))], ns_dtype="fp32")
