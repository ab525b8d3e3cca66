"""Bring files of the repository from outside docs/ into the site, and link names to the reference.

Pages are written for a code host: they link to each other, and to files of the repository, by relative paths. A page
from outside docs/ gets a place in the site. Any other file that a page links to is copied, and the link leads there.
A name in backticks, such as `steepest.SOAP`, becomes a link to its place in the reference, if it has one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[3]
PAGES = {  # in the repository: in the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/README.md": "figures.md",
}
SOURCES = {there: here for here, there in PAGES.items()}
COPIES = "repository"  # the site's folder of copied files
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)")

NAME = re.compile(r"(?<![`\[])`(steepest(?:\.\w+)+)`(?![`\]])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and every other file that a page links to."""
    for here, there in PAGES.items():
        files.append(File.generated(config, there, abs_src_path=str(ROOT / here)))
    linked = {
        place(file.src_uri, target)
        for file in files.documentation_pages()
        for target, _ in LINK.findall(FENCED.sub("", file.content_string))
    }
    for here in sorted(linked):
        if here.startswith(f"{COPIES}/") and (source := ROOT / here.removeprefix(f"{COPIES}/")).is_file():
            files.append(File.generated(config, here, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files of the repository as links between files of the site, and link names."""

    def moved(link: re.Match[str]) -> str:
        there = place(page.file.src_uri, link[1])
        return f"]({os.path.relpath(there, os.path.dirname(page.file.src_uri) or '.')}{link[2]})"

    parts = FENCED.split(markdown)  # code stands at the odd places
    named = r'<autoref identifier="\1" optional>\g<0></autoref>'
    return "".join(part if i % 2 else NAME.sub(named, LINK.sub(moved, part)) for i, part in enumerate(parts))


def place(page: str, target: str) -> str:
    """Return where in the site the file is that a page of the site links to by its path in the repository."""
    source = SOURCES.get(page, f"docs/{page}")
    path = os.path.normpath(os.path.join(os.path.dirname(source), target))
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}")
