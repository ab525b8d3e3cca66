"""What every report is made of: its shell, style, few lines of script, and the parts that stand in it.

A report loads nothing: fonts are the reader's own, and the library that draws its figures is in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

CONFIG = {"responsive": True, "displayModeBar": False, "scrollZoom": False}

STYLE = (Path(__file__).parent / "report.css").read_text()

SCRIPT = """
for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(plot);  // the page is laid out now
for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", shown);
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      const traces = plot.data.flatMap((trace, i) => trace.legendgroup === button.dataset.label ? [i] : []);
      if (traces.length) Plotly.restyle(plot, {visible: shown}, traces);
    }
  });
}
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
<script>$plotly</script>
</head>
<body>
<main>
$body
</main>
<script>$script</script>
</body>
</html>
""")


def render(title: str, body: Iterable[str]) -> str:
    """The whole file; parts that are empty are left out."""
    parts = "\n".join(filter(None, body))
    return PAGE.substitute(title=escape(title), style=STYLE, plotly=get_plotlyjs(), script=SCRIPT, body=parts)


def card(what: str, number: str, who: str) -> str:
    """A number that one remembers."""
    return (
        f'<div class="card"><div class="what">{escape(what)}</div><div class="number">{escape(number)}</div>'
        f'<div class="who">{escape(who)}</div></div>'
    )


def section(title: str, lead: str, *shown: str) -> str:
    """A heading, a sentence under it, and figures side by side."""
    intro = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<h2>{escape(title)}</h2>{intro}<div class="figures">{"".join(shown)}</div>'


def figure(title: str, drawn: go.Figure, caption: str) -> str:
    """A chart with a title over it and a caption below."""
    plot = drawn.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)
    return f"<figure><h3>{escape(title)}</h3>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table of rows that `row` has made."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<div class="tablebox"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def row(name: str, numbers: Iterable[str], texts: Iterable[str] = (), first: bool = False) -> str:
    """A line of a table: a name in markup, numbers, and texts that may wrap."""
    cells = [f"<td>{name}</td>"]
    cells += [f"<td>{escape(number)}</td>" for number in numbers]
    cells += [f'<td class="text">{escape(text)}</td>' for text in texts]
    return f"<tr{' class=first' if first else ''}>{''.join(cells)}</tr>"


def dot(colour: str) -> str:
    """Stands before a name that has a colour."""
    return f'<span class="dot" style="background:{colour}"></span>'
