"""What every report is made of: its shell, style, few lines of script, and the parts that stand in it.

A report loads nothing: fonts are the reader's own, and the library that draws its figures is in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

CONFIG = {"responsive": True, "displayModeBar": False, "scrollZoom": False}

STYLE = """
:root { color-scheme: light dark; --ink: #1b2230; --soft: #5b6577; --page: #f6f7f9; --card: #ffffff; --line: #e2e6ec;
  --accent: #2f7de1; --warn: #b4540a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --page: #10141b; --card: #181d26;
  --line: #2a313d; --accent: #6aa8f7; --warn: #f0a35e; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 0 20px 64px; }
header { padding: 44px 0 20px; }
.kicker { color: var(--soft); font-size: .85rem; letter-spacing: .04em; margin: 0 0 10px; }
h1 { font-size: clamp(1.45rem, 3.6vw, 2.3rem); line-height: 1.22; letter-spacing: -.015em; margin: 0; max-width: 30em;
  text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 48px 0 4px; }
h3 { font-size: 1rem; margin: 0 0 2px; }
main > h3 { margin-top: 26px; }
p.sub { font-size: 1.1rem; color: var(--soft); margin: 10px 0 0; }
p.lead, .soft { color: var(--soft); }
p.lead { margin: 0 0 14px; max-width: 62em; }
.warn { border-left: 4px solid var(--warn); background: var(--card); padding: 10px 14px; border-radius: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 14px; margin: 24px 0 0; }
.card, figure, .tablebox, details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 14px 18px; }
.card .what { color: var(--soft); font-size: .85rem; }
.card .number { font-size: 1.75rem; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.card .who { font-size: .9rem; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 5; display: flex; flex-wrap: wrap; gap: 6px 8px; padding: 10px 0;
  background: var(--page); border-bottom: 1px solid var(--line); margin-top: 28px; }
nav button { font: inherit; font-size: .85rem; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 999px; padding: 3px 12px 3px 9px; cursor: pointer; }
nav button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
.dot { display: inline-block; width: .72em; height: .72em; border-radius: 50%; margin-right: .45em; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; margin-top: 14px; }
figure { margin: 0; padding: 16px 18px 12px; min-width: 0; }
figure:only-child { grid-column: 1 / -1; }
figcaption { color: var(--soft); font-size: .85rem; line-height: 1.45; margin-top: 8px; max-width: 70em; }
.main-svg > :not(.hoverlayer) text { fill: var(--ink) !important; }
.annotation rect.bg { fill: var(--card) !important; fill-opacity: .8 !important; }
.tablebox { overflow-x: auto; margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: .8rem; white-space: pre-line;
  vertical-align: bottom; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody tr:last-child td { border-bottom: 0; }
tr.first td { font-weight: 600; }
td.text { text-align: left; white-space: normal; min-width: 28em; overflow-wrap: anywhere; }
ul.notes { color: var(--soft); font-size: .9rem; padding-left: 1.1em; }
details { margin-top: 12px; }
summary { cursor: pointer; padding: 12px 18px; font-weight: 550; }
details .tablebox { border-width: 1px 0 0; border-radius: 0 0 12px 12px; margin: 0; max-height: 32em; overflow: auto; }
pre { margin: 0; padding: 12px 18px; overflow-x: auto; font-size: .8rem; line-height: 1.45; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 20px; margin: 14px 0;
  font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 820px) {
  main { padding: 0 14px 48px; }
  header { padding-top: 24px; }
  .figures { grid-template-columns: minmax(0, 1fr); }
  figure { padding: 14px 10px 10px; }
  figure h3, figcaption { padding: 0 4px; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .card { padding: 12px 14px; }
  nav { flex-wrap: nowrap; overflow-x: auto; }
  nav button { flex: none; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: 8px; }
}
"""

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
