"""Refuse a site with a link that leads nowhere, or one that fetches anything from the network when it is read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

LINKS = {"a", "area"}
IN_CSS = re.compile(r"(?:url\(|@import)\s*[\"']?([^\"')]+)")


class Document(HTMLParser):
    """The anchors of a page, the addresses that it links to, and those that it is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.parts: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names and refers to."""
        values = {key: value for key, value in attrs if value}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        self.parts |= set(IN_CSS.findall(values.get("style", "")))
        if "href" in values:
            (self.links if tag in LINKS else self.parts).add(values["href"])
        if "src" in values:
            self.parts.add(values["src"])


def on_post_build(config: MkDocsConfig) -> None:
    """Follow every reference in the site."""
    site = Path(config.site_dir)
    pages = {path: Document(path.read_text()) for path in site.rglob("*.html")}
    parts = {path: page.parts for path, page in pages.items()}
    parts |= {path: set(IN_CSS.findall(path.read_text())) for path in site.rglob("*.css")}
    remote = [f"{path}: fetches {part}" for path, found in parts.items() for part in found if is_remote(part)]
    broken = [
        f"{path}: nothing at {link}"
        for path, page in pages.items()
        if path.name != "404.html"  # a server sends it for any path, so its links start at the root
        for link in page.links | page.parts
        if not urlsplit(link).scheme and not leads_somewhere(path, link, pages)
    ]
    if remote or broken:
        raise PluginError("\n".join(["The site can't be read without a network:", *sorted(remote + broken)]))


def is_remote(address: str) -> bool:
    """Return whether a browser asks another machine for what is at an address."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in {"http", "https"}


def leads_somewhere(page: Path, link: str, pages: dict[Path, Document]) -> bool:
    """Return whether a page of the site links to a file of it, and to an anchor that the file has."""
    parts = urlsplit(link)
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve()
    if not parts.fragment or target not in pages:
        return target.is_file()
    return unquote(parts.fragment) in pages[target].anchors
