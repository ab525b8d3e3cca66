from __future__ import annotations

import math

import pytest
import torch

from steepest.lab.shared.contenders import hidden_matrices
from steepest.lab.shared.errors import BadInput
from steepest.lab.workloads.workload import BUILT_IN, SUITE, Workload, canonical, load_workload


@pytest.fixture(scope="module", params=BUILT_IN)
def workload(request, loaded):
    return loaded(request.param)


def test_batches_follow_the_generator_alone(workload) -> None:
    first, second = (workload.batch(torch.Generator().manual_seed(7)) for _ in range(2))
    torch.manual_seed(1)
    other = workload.batch(torch.Generator().manual_seed(8))
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_models_follow_the_global_seed(workload) -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(torch.cat([p.detach().flatten() for p in workload.model().parameters()]))
    assert torch.equal(*weights)


def test_an_untrained_model_guesses(workload) -> None:
    torch.manual_seed(0)
    model = workload.model()
    if workload.likelihood != "categorical":
        pytest.skip("it tells no classes apart")
    classes = 96 if "character" in workload.measure else 10
    assert workload.validation(model) == pytest.approx(math.log(classes), abs=0.5)


def test_the_gpt_has_the_parameters_it_is_said_to_have() -> None:
    model = load_workload("stdlib").model()
    assert sum(p.numel() for p in model.parameters()) == 115_008
    assert sum(p.numel() for p in hidden_matrices(model).values()) == 98_304


@pytest.mark.parametrize("name", SUITE)
def test_scale_widens_the_network(name, loaded) -> None:
    usual, wide = (workload.model() for workload in (loaded(name), load_workload(f"{name}(scale=1.5)")))
    assert sum(p.numel() for p in wide.parameters()) > 1.3 * sum(p.numel() for p in usual.parameters())


@pytest.mark.parametrize("name", SUITE)
def test_the_suite_has_a_length_and_a_hash_of_the_data(name, loaded) -> None:
    workload = loaded(name)
    assert 50 <= workload.suite_steps <= 5000
    assert len(workload.describe()["sha256"]) == 64


def test_the_suite_takes_a_race_s_steps_unless_the_workload_says_otherwise() -> None:
    class Short(Workload):
        steps = 7

    class Both(Short):
        suite_steps = 11

    assert Short.suite_steps.fget(Short) == 7
    assert Both.suite_steps == 11


def test_options_of_a_workload() -> None:
    model = load_workload("stdlib(width=32, depth=3, heads=2)").model()
    assert model.head.in_features == 32
    assert [block.heads for block in model.blocks] == [2, 2, 2]
    assert load_workload("stdlib(scale=0.5,width=40)").model().head.in_features == 20


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("stdlib(size=2)", "workload 'stdlib(size=2)': no option 'size'; there are scale, width, depth, heads"),
        ("stdlib(scale=0)", "workload 'stdlib(scale=0)': scale=0: must be a positive number"),
        ("photo(scale=float)", "workload 'photo(scale=float)': options are names and plain values, like stdlib("),
        ("photo(2)", "workload 'photo(2)': options are names"),
        ("photo(scale='2')", "scale='2': must be a positive number"),
        ("stdlib(depth=1.5)", "depth=1.5: must be a positive integer"),
        ("stdlib(heads=0)", "heads=0: must be a positive integer"),
        ("library(scale=2)", "unknown workload 'library': give one of stdlib,"),
    ],
)
def test_a_bad_option_gets_one_clear_line(spec, complaint) -> None:
    with pytest.raises(BadInput) as caught:
        load_workload(spec)
    assert str(caught.value).startswith(complaint) or str(caught.value).endswith(complaint)
    assert "\n" not in str(caught.value)


def test_options_of_a_workload_file(tmp_path, quick_task) -> None:
    path = quick_task()
    path.write_text(path.read_text() + "    def __init__(self, *, more=0):\n        self.more = more\n")
    assert load_workload(f"{path}(more=3)").more == 3
    with pytest.raises(BadInput, match="no option 'most'; there are more"):
        load_workload(f"{path}(most=3)")
    assert canonical(f"{path}(more=3,)") == f"{path}(more=3)"


def test_a_file_is_known_by_its_whole_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert canonical("task.py") == str(tmp_path.resolve() / "task.py")
    assert canonical("task(1).py") == str(tmp_path.resolve() / "task(1).py")


def test_the_gpt_sees_no_future() -> None:
    torch.manual_seed(0)
    model = load_workload("stdlib").model()
    symbols = torch.randint(96, (1, 64))
    changed = symbols.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 96
    before, after = model(symbols), model(changed)
    assert torch.equal(before[0, :40], after[0, :40])
    assert not torch.equal(before[0, 40:], after[0, 40:])


def test_targets_are_the_following_symbols() -> None:
    symbols, following = load_workload("stdlib").batch(torch.Generator().manual_seed(0))
    assert symbols.shape == following.shape == (32, 64)
    assert torch.equal(symbols[:, 1:], following[:, :-1])


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (None, "no such file"),
        ("import nonsense_that_is_nowhere", "No module named"),
        ("x = 1", "defines no class"),
        ("def f(:", "SyntaxError"),
        ("from steepest.lab import Workload\nclass A(Workload): pass", "abstract"),
    ],
)
def test_a_bad_workload_file_gets_one_clear_line(tmp_path, source, complaint) -> None:
    path = tmp_path / "task.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(BadInput) as caught:
        load_workload(str(path))
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_comments_leave_the_fingerprint_of_a_workload_alone(quick_task) -> None:
    path = quick_task()
    before = load_workload(str(path)).fingerprint()
    path.write_text('"""Said."""\n' + path.read_text() + "# and said again\n")
    assert load_workload(str(path)).fingerprint() == before
    path.write_text(path.read_text().replace("Linear(6, 2)", "Linear(6, 2, bias=False)"))
    assert load_workload(str(path)).fingerprint() != before
