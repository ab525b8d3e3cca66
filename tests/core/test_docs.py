"""The documentation is true: its code runs, its links and names lead somewhere, its tables name what there is."""

import doctest
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import steepest
from steepest.engine.group import STACK_OPTIONS, option_defaults
from steepest.optimizers import BY_CLOSURE, NAMES
from steepest.optimizers.shared import SharedOptions
from steepest.optimizers.soap import SOAPOptions
from steepest.view import OPTIONS as VIEW_OPTIONS

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
EXAMPLE = "CONTRIBUTING.md"  # its code makes files, which test_the_worked_example_works writes and tests
DRAWN = {"docs/race.png"}  # by a race; a checkout may be without it
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@dataclass(frozen=True)
class Block:
    """Fenced code, and where it stands."""

    page: str
    line: int
    language: str
    code: str


def text_of(page):
    return (ROOT / page).read_text()


def blocks(page):
    text = text_of(page)
    return [
        Block(page, text.count("\n", 0, m.start(2)), language=m[1], code=m[2])  # the line before its first
        for m in FENCE.finditer(text)
    ]


def prose(page):
    """A page without its fenced code."""
    return FENCE.sub("", text_of(page))


# Code.


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)


class Transformer(nn.Module):
    """The model of the README."""

    def __init__(self, vocabulary=96, d=16):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList([Layer(d), Layer(d)])
        self.head = nn.Linear(d, vocabulary, bias=False)


def run(block, names):
    """A block as a session, if it has prompts, or as a program; errors point at the page's own lines."""
    if ">>>" not in block.code:
        exec(compile("\n" * block.line + block.code, block.page, "exec"), names)
        return
    session = doctest.DocTestParser().get_doctest(block.code, names, block.page, str(ROOT / block.page), block.line)
    failures = []
    doctest.DocTestRunner(optionflags=FLAGS).run(session, out=failures.append, clear_globs=False)
    names.update(session.globs)  # a session works on a copy; the next block goes on with it
    assert not failures, "".join(failures)


@pytest.mark.parametrize("page", [page for page in PAGES if page != EXAMPLE])
def test_python_on_the_page_runs(page, tmp_path, monkeypatch):
    """One namespace a page: its blocks are read, and run, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"torch": torch, "__name__": "page"} | ({"model": Transformer()} if page == "README.md" else {})
    for block in blocks(page):
        if block.language == "python":
            run(block, names)


def test_a_wrong_example_is_seen():
    with pytest.raises(AssertionError, match=r"line 8[\s\S]*Expected[\s\S]*3[\s\S]*Got[\s\S]*2"):
        run(Block("README.md", 7, "python", ">>> 1 + 1\n3\n"), {})
    with pytest.raises(ZeroDivisionError):
        run(Block("README.md", 7, "python", "1 / 0\n"), {})


# Links and names.


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if str(file.relative_to(ROOT)) in DRAWN:
            continue
        assert file.exists(), f"{page}: nothing at {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page}: no heading for {target}"


def anchors(text):
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolves(name):
    """Whether a dotted name is a module, or what is found in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[cut:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_names_in_backticks_exist(page):
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        for name in re.findall(r"^steepest(?:\.\w+)+", span):
            assert resolves(name), f"{page}: there is no {name}"


def test_resolving_sees_what_is_missing():
    assert resolves("steepest.linalg.polar.TABLES")
    assert not resolves("steepest.SAOP")
    assert not resolves("steepest.linalg.poler")


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_commands_exist(page):
    made = {title(block) for block in blocks(EXAMPLE)} if page == EXAMPLE else set()
    for path in re.findall(r"\b(?:src|tests|docs|benchmarks|examples)/[\w/.-]*\w", text_of(page)):
        assert path in made | DRAWN or (ROOT / path).exists(), f"{page}: there is no {path}"
    targets = re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make (\w[\w-]*)", text_of(page), re.MULTILINE):
        assert target in targets, f"{page}: make has no {target}"


def test_commands_of_the_command_line_exist():
    app = pytest.importorskip("steepest.cli").app
    known = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    for page in PAGES:
        for command in re.findall(r"`steepest ([a-z-]+)", prose(page)):
            assert command in known, f"{page}: steepest has no command {command}"


# Tables.


def rows(page, heading):
    """The cells of the table rows that follow a heading, up to the next."""
    section = text_of(page).split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def options(page):
    """Tables whose rows are option, default, meaning, as ``{option: default}``."""
    return dict(re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`|none) \|", text_of(page), re.MULTILINE))


def test_the_readme_lists_every_optimizer():
    listed = {re.match(r"`([\w-]+)`", cells[0])[1] for cells in rows("README.md", "The optimizers")}
    assert listed == {*NAMES, *BY_CLOSURE}


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (.*)$", text_of("CHANGELOG.md"), re.MULTILINE)[1]
    assert re.fullmatch(rf"\[{re.escape(steepest.__version__)}\] - (unreleased|\d{{4}}-\d\d-\d\d)", first), first


def test_the_page_on_soap_lists_every_option_and_its_default():
    parameters = inspect.signature(steepest.SOAP).parameters.values()
    theirs = {p.name: repr(p.default) for p in parameters if p.default is not p.empty}
    defaults = option_defaults("kl_soap")
    further, shared = SOAPOptions.__annotations__.keys(), SharedOptions.__annotations__.keys()
    theirs |= {name: repr(defaults[name]) for name in further - shared}
    listed = options("docs/soap.md")
    assert theirs.items() <= listed.items()
    assert {name: listed[name] for name in listed.keys() - theirs} == {
        name: repr(defaults[name]) for name in listed.keys() & shared
    }


def test_the_page_on_routing_lists_every_view():
    assert options("docs/routing.md") == {name: repr(value) for name, value in VIEW_OPTIONS.items()}
    assert set(VIEW_OPTIONS) <= set(STACK_OPTIONS)


def test_the_architecture_names_every_module():
    text = text_of("docs/architecture.md")
    package = Path(steepest.__file__).parent
    parts = [f"{p.name}/" if p.is_dir() else p.name for p in package.iterdir() if not p.name.startswith("_")]
    missing = [part for part in parts if part.endswith(("/", ".py")) and f"  {part} " not in text]
    assert not missing, f"docs/architecture.md places no {', '.join(missing)}"


@pytest.mark.parametrize("name", steepest.__all__)
def test_what_is_exported_is_documented_with_an_example(name):
    exported = getattr(steepest, name)
    assert inspect.isclass(exported) or inspect.isfunction(exported), f"{name}: say here how it is documented"
    assert ">>>" in (exported.__doc__ or ""), f"{name} has no example in its docstring"


# The worked example.


def title(block):
    """The path in a block's first line, if that is a comment with one."""
    found = re.match(r"# ((?:src|tests)/\S+\.py)$", block.code.split("\n", 1)[0])
    return found[1] if found else None


def test_the_worked_example_works(tmp_path):
    """What CONTRIBUTING says is followed literally in a copy: new files, lines added, and the tests named there."""
    for part in ("src/steepest", "tests/reference/conftest.py", "tests/core/test_floors.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    written = [block for block in blocks(EXAMPLE) if title(block)]
    sizes = {}
    for block in written:
        file = tmp_path / title(block)
        if block.language == "diff":
            file.write_text(patched(file.read_text(), block.code))
            sizes["registry"] = len(re.findall(r"^\+", block.code, re.MULTILINE))
        else:
            assert not file.exists()
            file.write_text(block.code.split("\n", 1)[1].lstrip("\n"))
            sizes["test" if "tests/" in title(block) else "rule"] = len(file.read_text().splitlines())
    stated = re.search(r"a file of (\d+) lines, (\d+) lines in the registry,\s+a test of (\d+) lines", prose(EXAMPLE))
    assert stated, f"the count in {EXAMPLE}: a file of {sizes['rule']} lines, ..."
    assert [int(count) for count in stated.groups()] == [sizes["rule"], sizes["registry"], sizes["test"]]

    new = [title(block) for block in written]
    floors = "tests/core/test_floors.py::test_imports_only_go_down[steepest.rules.normalized]"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *new, floors],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ruff = Path(sys.executable).with_name("ruff")
    if ruff.exists():
        for command in (["check"], ["format", "--check"]):
            linted = subprocess.run([ruff, *command, "--no-cache", *new], cwd=tmp_path, capture_output=True, text=True)
            assert linted.returncode == 0, linted.stdout + linted.stderr


def patched(text, diff):
    """``text`` with the added lines of a diff, each after the line that the diff shows before it."""
    lines = text.splitlines()
    previous = None
    for line in diff.splitlines()[1:]:
        content = line[1:]
        if line.startswith("+"):
            lines.insert(lines.index(previous) + 1, content)
        previous = content
    return "\n".join(lines) + "\n"
