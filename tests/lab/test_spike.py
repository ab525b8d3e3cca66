"""The spike study: its findings hold at small sizes, and at its own sizes where a claim is about these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

from steepest import functional
from steepest.cli import app
from steepest.lab.shared.device import one_thread
from steepest.lab.spike import command as spike_session
from steepest.lab.spike.command import page
from steepest.lab.spike.study import (
    ALL_BUT_QUOTIENTS,
    EPS,
    FLOOR,
    GRADIENTS,
    GUARDS,
    ONLY_QUOTIENTS,
    PRECISIONS,
    SOLVERS,
    Case,
    Setup,
    Study,
    compare,
    draw,
    follow,
    largest_angle,
    quotients_at,
    study,
)
from steepest.lab.spike.text import angles, as_json, floors, headline, products
from steepest.linalg.eigenbasis import conjugate
from steepest.linalg.precision import round_to_tf32

SMALL = Setup(shape=(32, 16), steps=32, spike_at=12, top=4)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def found() -> Study:
    with one_thread():
        return study(SMALL)


def both(found: Study, solver: str, guard: str, gradients: str = "isotropic"):
    return [found.trace(solver, guard, precision, gradients) for precision in PRECISIONS]


# Findings.


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_the_absolute_eps_the_basis_jumps_at_high_and_only_there(solver):
    """At the study's own sizes the angle is 77 to 90 degrees from N = 2 on, and 0 at N = 1 and at "highest".

    The top eigenvector alone may take a few steps more under orthogonal iteration; rounding decides its direction.
    """
    setup = replace(Setup(), steps=Setup().spike_at + 10)
    pair = compare(Case(solver, "absolute"), setup)
    at = {n: setup.spike_at - 1 + n for n in (-10, -1, 1, 2, 5, 10)}
    high, highest = (pair.traces[precision] for precision in PRECISIONS)
    for n in (2, 5, 10):
        assert 77 < high["leading_deg"][at[n]] <= 90
    assert 60 < high["top1_deg"][at[10]] <= 90
    for n in (-10, -1, 1):
        assert high["leading_deg"][at[n]] < 0.1
    assert max(highest["leading_deg"][at[-10] :] + highest["top1_deg"][at[-10] :]) < 0.1


def test_it_is_the_quotients_that_do_it(found):
    for solver in SOLVERS:
        only, but = (found.quotients[solver, key] for key in (ONLY_QUOTIENTS, ALL_BUT_QUOTIENTS))
        assert found.after(only["leading_deg"], 10) > 60
        assert max(but["leading_deg"]) < 0.1
        high, highest = both(found, solver, "absolute")
        assert found.after(high["quotients_lost_right"], 0) == 0 < found.after(high["quotients_lost_right"], 1)
        assert found.after(high["smallest_quotient_right"], 1) < 0 < found.after(highest["smallest_quotient_right"], 1)
        assert max(highest["quotients_lost_right"]) == 0


def test_what_stands_still_is_the_first_gradient(found):
    _, frozen = both(found, "REKLS", "absolute")
    assert max(frozen["to_first_gradient_deg"]) < 0.1
    assert frozen["eigenvalue_1_to_2"][0] == pytest.approx(frozen["eigenvalue_1_to_2"][-1], rel=1e-4)
    assert frozen["top_eigenvalue"][0] > 0.1 / EPS
    _, learning = both(found, "REKLS", "relative")
    assert found.after(learning["to_first_gradient_deg"], 0) > 30


def test_the_relative_floor_makes_the_precisions_agree(found):
    for solver in SOLVERS:
        absolute, relative = (found.pairs[Case(solver, guard)] for guard in ("absolute", "relative"))
        assert found.after(absolute.apart, 0) < 0.01
        assert found.after(absolute.apart, 10) > 1
        assert max(relative.apart) < 0.1
    assert found.floors[FLOOR] < 0.01 < 1 < found.floors[1e-7]


def test_with_it_the_basis_turns_with_the_spike_itself_at_either_precision(found):
    for solver in SOLVERS:
        for trace in both(found, solver, "relative"):
            assert found.after(trace["leading_deg"], 1) > 60
            growth = trace["top_eigenvalue"][SMALL.spike_at] / trace["top_eigenvalue"][SMALL.spike_at - 1]
            assert growth > 100, "the spike outweighs what was in L"


def test_clipping_keeps_the_spike_out(found):
    for solver in SOLVERS:
        for trace in both(found, solver, "clipped"):
            assert found.after(trace["leading_deg"], 1) < 10
            assert found.after(trace["update_rms"], 19) > 0.7 * found.after(trace["update_rms"], 0)
    _, spiked = both(found, "REKLS", "relative")
    assert found.after(spiked["update_rms"], 19) < 0.65 * found.after(spiked["update_rms"], 0)


def test_against_the_truth_standing_still_is_no_virtue(found):
    high, frozen = both(found, "REKLS", "absolute", "directional")
    assert max(frozen["to_truth_deg"]) - min(frozen["to_truth_deg"]) < 0.1
    assert found.after(high["to_truth_deg"], 19) < 0.6 * found.after(frozen["to_truth_deg"], 19)
    for trace in both(found, "REKLS", "relative", "directional"):
        assert found.after(trace["to_truth_deg"], 0) < 0.6 * found.after(frozen["to_truth_deg"], 0)
        assert found.after(trace["to_truth_deg"], 1) < 0.6 * found.after(frozen["to_truth_deg"], 1)
    assert found.trace("REKLS", "relative", "high")["to_truth_deg"] == []


# Method.


def test_every_case_is_followed(found):
    wanted = {Case(s, guard, gradients) for s in SOLVERS for guard in GUARDS for gradients in GRADIENTS}
    assert set(found.pairs) == wanted
    assert all(len(t["leading_deg"]) == SMALL.steps for pair in found.pairs.values() for t in pair.traces.values())


def test_a_path_comes_again_and_leaves_nothing_behind():
    short = replace(SMALL, steps=5, spike_at=3)
    before = torch.get_float32_matmul_precision(), torch.get_rng_state()
    once, again = (follow(Case("SOAP-KL", "absolute"), "high", short) for _ in range(2))
    for name, tensor in once._asdict().items():
        assert torch.equal(tensor, getattr(again, name)), name
    assert torch.get_float32_matmul_precision() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(X @ X, round_to_tf32(X) @ round_to_tf32(X))


def test_quotients_get_a_precision_of_their_own_and_give_it_back():
    seen = []

    def spy(a, p, diag=False):
        seen.append(torch.get_float32_matmul_precision())
        return conjugate(a, p, diag)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steepest.lab.spike.study.conjugate", spy)
        with quotients_at("high"):
            follow(Case("REKLS", "relative"), "highest", replace(SMALL, steps=2, spike_at=1))
    # Two products of the update, at the given precision; two of the study, at the path's.
    assert seen == ["high", "high", "highest", "highest"] * 2
    assert functional.conjugate is conjugate


def test_gradients_are_as_they_are_said_to_be():
    setup = replace(SMALL, steps=400, spike_at=10)
    G, none = draw("isotropic", setup)
    assert none is None
    assert G[10].norm() / G[9].norm() == pytest.approx(1000, rel=0.1)
    G, truth = draw("directional", replace(setup, scale=1.0))
    left, right = (torch.linalg.eigh((X @ X.mT).mean(dim=0)) for X in (G, G.mT))
    assert largest_angle(left.eigenvectors[:, -4:], truth).item() < 2
    for values in (left.eigenvalues, right.eigenvalues):
        rest = values[:-4].mean()
        assert (values[-1] / rest).item() == pytest.approx(15**2, rel=0.2)
        assert (values[-4] / rest).item() == pytest.approx(10**2, rel=0.2)
    assert not torch.equal(draw("isotropic", SMALL)[0], draw("isotropic", replace(SMALL, seed=1))[0])


def test_angles_are_exact_where_a_cosine_is_blind():
    t = torch.tensor(1e-5, dtype=torch.float64).deg2rad()
    P = torch.eye(3, dtype=torch.float64)[:, :1]
    Q = torch.stack([t.cos(), t.sin(), torch.zeros_like(t)]).unsqueeze(-1)
    assert largest_angle(P, Q).item() == pytest.approx(1e-5, rel=1e-6)
    plane = torch.eye(3)[:, :2]
    tilted = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.75**0.5]])
    assert largest_angle(plane, tilted).item() == pytest.approx(60, abs=1e-4)
    assert largest_angle(plane, plane.flip(1)).item() == pytest.approx(0, abs=1e-6)


# Output.


def test_tables_have_the_studys_structure(found):
    head, rows, labels = angles(found)
    assert labels == 3
    assert [title.replace("\n", " ") for title in head[3:]] == [
        *(f"N = {n} before" for n in (10, 5, 2, 1)),
        *(f"N = {n} after" for n in (1, 2, 5, 10)),
    ]
    assert len(rows) == len(GUARDS) * len(SOLVERS) * len(PRECISIONS)
    row = next(cells for cells in rows if cells[:3] == ["absolute eps", "REKLS", "high"])
    trace = found.trace("REKLS", "absolute", "high")
    assert row[-1] == f"{found.after(trace['top1_deg'], 10):.1f} / {found.after(trace['leading_deg'], 10):.1f}"
    head, rows, _ = products(found)
    assert head[2:] == ["N = 1\nafter", "N = 2\nafter", "N = 5\nafter", "N = 10\nafter"]
    assert [cells[:2] for cells in rows] == [
        [name, s] for name in ("Rayleigh quotients", "everything else") for s in ("REKLS", "SOAP-KL")
    ]
    assert [cells[0] for cells in floors(found).rows] == ["0.01", "0.001", "0.0001", "1e-05", "1e-06", "1e-07"]


def test_sentences_follow_from_the_figures(found):
    claim, more = headline(found)
    high, highest = both(found, "REKLS", "absolute")
    assert f"{found.after(high['leading_deg'], 2):.1f}° at “high”" in claim
    assert f"{found.after(highest['leading_deg'], 2):.2f}° at “highest”" in claim
    assert f"{100 * found.apart('relative'):.2g}%" in more
    assert f"{found.apart('absolute'):.2g} times" in more


def test_values_survive_json(found):
    values = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert values["setup"]["tf32"] == "emulated"
    assert len(values["cases"]) == len(found.pairs)
    case = next(c for c in values["cases"] if (c["solver"], c["guard"]) == ("REKLS", "absolute eps"))
    assert case["high"]["leading_deg"]["+2"] == pytest.approx(
        found.after(found.trace("REKLS", "absolute", "high")["leading_deg"], 2), rel=1e-3
    )
    assert case["highest"]["eigenvalue_1_to_2"]["-1"] == case["highest"]["eigenvalue_1_to_2"]["+1"]
    assert len(values["products"]) == 4


class Loads(HTMLParser):
    """A parser that collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.found += [f"{tag} {name}={value}" for name, value in attributes if name in ("src", "href", "srcset")]


def test_the_page_says_it_all_and_loads_nothing(found):
    html = page(found, "steepest spike --out <here>")
    loads = Loads()
    loads.feed(html)
    assert loads.found == []
    for text in (
        "Does the basis turn?",
        "How far is the basis from the truth?",
        "Which product makes the difference?",
        "How large must a floor be?",
        "emulated TF32",
        "steepest spike --out <here>",
        *headline(found),
    ):
        assert text in unescape(html), text
    for solver in SOLVERS:
        for precision in PRECISIONS:
            assert f'data-label="{solver}, {precision}"' in html
            assert html.count(f'"legendgroup":"{solver}, {precision}"') == 4, "one curve in each chart"


def test_the_command_shows_and_writes_it(found, tmp_path, monkeypatch):
    setups = []

    def stand_in(setup, progress):
        setups.append((setup, torch.get_num_threads()))
        return found

    monkeypatch.setattr(spike_session, "study", stand_in)
    out = tmp_path / "deep" / "out"
    torch.set_num_threads(2)
    done = CliRunner().invoke(app, ["spike", "--seed", "3", "--out", str(out)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert setups == [(Setup(seed=3, device="cuda" if torch.cuda.is_available() else "cpu"), 1)]
    assert torch.get_num_threads() == 2
    flat = " ".join(done.output.split())
    for sentence in headline(found):
        assert sentence in flat
    assert "everything else" in done.output
    assert json.loads((out / "results.json").read_text())["headline"] == " ".join(headline(found))
    assert headline(found)[0] in (out / "report.html").read_text()


def test_what_cannot_be_done_is_said_before_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(spike_session, "study", lambda setup, progress: pytest.fail("it began"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    for options, message in (
        (["--device", "tpu"], "--device tpu: must be one of auto, cpu, cuda"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--out", str(tmp_path / "file" / "out")], "--out"),
    ):
        done = CliRunner().invoke(app, ["spike", *options])
        assert done.exit_code == 2
        assert message in done.output


def test_progress_names_each_case(monkeypatch):
    class Stop(Exception):
        """Raised to end the study early."""

    def stop(case, setup):
        raise Stop

    calls: list[str] = []
    monkeypatch.setattr("steepest.lab.spike.study.compare", stop)
    with pytest.raises(Stop):
        study(SMALL, calls.append)
    assert calls == ["isotropic, absolute eps, SOAP-KL"]
