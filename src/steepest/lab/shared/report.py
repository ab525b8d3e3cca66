"""Reports: each is one HTML file, rendered from Jinja templates, that a browser shows without loading anything else.

A report's template extends ``shared/report.html`` and puts itself together from the macros in ``shared/parts.html``::

    {% extends "shared/report.html" %}
    {% from "shared/parts.html" import figure, opening, section with context %}
    {% block title %}steepest race{% endblock %}
    {% block body %}
    {{ opening(["steepest race", today], "SOAP needs the fewest steps") }}
    {% call section("Who learns fastest?", "Lower is better.") %}
    {% call figure("Loss over steps", chart) %}Bands show the range over seeds.{% endcall %}
    {% endcall %}
    {% endblock %}

Values are escaped, charts are plotly figures, and the fonts are the reader's own.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

CHART_OPTIONS = {"responsive": True, "displayModeBar": False, "scrollZoom": False}


def render(template: str, **values: Any) -> str:
    """Render a template, named by its path below ``steepest/lab``, with these values and ``today``.

    >>> render("shared/parts.html", unused=1).strip()
    ''
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plot"] = _plot
    environment.globals["plotly"] = lambda: Markup(get_plotlyjs())
    today = datetime.now(UTC).strftime("%d %B %Y")
    return environment.get_template(template).render(today=today, **values)


def _plot(chart: go.Figure) -> Markup:
    """Return the HTML of a chart; the page itself contains plotly's code."""
    return Markup(chart.to_html(full_html=False, include_plotlyjs=False, config=CHART_OPTIONS))
