from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from steepest.lab.race.report import page
from steepest.lab.race.results import find_results


class Loads(HTMLParser):
    """A parser that collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        self.found += [
            f"{tag} {name}={value}" for name, value in attributes if name in ("src", "href", "srcset", "data")
        ]


def without_plotly(html: str) -> str:
    """Return the page without plotly, whose source contains addresses that it never loads here."""
    return re.sub(r"<script>/\*\*\n\* plotly.*?</script>", "", html, count=1, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workload(loaded):
    return loaded("digits")


@pytest.fixture(scope="module")
def html(make_plan, make_runs, workload) -> str:
    plan = make_plan("adamw", "soap", "moso", swept=True, shorter=(4, 8))
    found = make_runs(plan, lambda t: math.inf if t.contender.lr > 0.02 else 1 + abs(t.contender.lr - 0.01))
    return page(find_results(found), workload, 'steepest race --optimizers "adamw, <b>"')


def test_a_report_loads_nothing(html) -> None:
    loads = Loads()
    loads.feed(html)
    assert loads.found == []
    assert not {"link", "img", "iframe"} & set(loads.tags)
    own = without_plotly(html)
    assert len(own) < len(html) - 10**6
    assert "http://" not in own
    assert "https://" not in own
    assert "@import" not in own
    assert "url(" not in own


def test_a_report_says_everything(html) -> None:
    for text in (
        "Loss over steps",
        "Loss over CPU time",
        "Steps to adamw&#39;s final loss",
        "divided by what adamw takes",
        "peak: megabytes that the optimizer",
        "Final loss over learning rate",
        "Final loss over distance",
        "How long does an optimizer&#39;s step take?",
        "All 27 runs",
        "diverged at",
        "weight of Linear",
        "steepest race --optimizers &#34;adamw, &lt;b&gt;&#34;",
        "same number of trials: 4 settings × 1 seed",
    ):
        assert text in html, text
    assert "<b>" not in without_plotly(html)


def test_everybody_can_be_shown_and_hidden(html) -> None:
    assert re.findall(r'data-label="([^"]+)"', html) == ["adamw", "soap", "moso"]


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("names", [("adamw",), ("soap", "moso")])
def test_small_races_have_a_report_too(make_plan, make_runs, workload, names, seeds) -> None:
    runs = make_runs(make_plan(*names, seeds=seeds), lambda t: 1.0)
    assert "nan" not in without_plotly(page(find_results(runs), workload, "steepest race"))


def test_a_race_in_which_all_diverged_has_a_report(make_plan, make_runs, workload) -> None:
    runs = make_runs(make_plan("adamw", "soap"), lambda t: math.inf)
    assert "diverged" in page(find_results(runs), workload, "steepest race")


def test_a_race_that_was_interrupted_has_a_report(make_plan, make_runs, workload) -> None:
    runs = make_runs(make_plan("adamw", "soap", swept=True, shorter=(4, 8)), lambda t: t.contender.lr)
    everything = runs.finished
    for some in (everything[:1], everything[1:2], everything[:5], everything[:-3]):
        runs.finished, runs.interrupted = some, True
        assert "Interrupted" in page(find_results(runs), workload, "steepest race")
