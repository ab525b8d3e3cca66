"""Text as data for language models: characters as numbers, windows of them, and the standard library's source.

The source consists of long-lived, pure-Python modules, some of them held out for validation. It differs between Python
versions, so every report contains its SHA-256, and losses are comparable within one version only.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.shared.errors import BadInput
from steepest.lab.workloads.workload import Pairs, Workload

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 64
"""Characters in a window."""

TRAINING_MODULES = """
argparse ast base64 bdb bisect calendar cmd code codecs collections/__init__ configparser contextlib copy csv
dataclasses datetime decimal _pydecimal difflib dis doctest enum filecmp fileinput fnmatch fractions ftplib functools
getopt gettext glob gzip hashlib heapq hmac imaplib inspect ipaddress keyword linecache locale lzma mailbox mimetypes
netrc numbers opcode operator optparse os pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint
profile pstats queue quopri random reprlib rlcompleter sched selectors shelve shlex shutil signal site smtplib socket
socketserver ssl stat statistics string stringprep struct subprocess symtable tabnanny tempfile textwrap threading
timeit token tokenize trace traceback tracemalloc types typing uuid warnings wave weakref webbrowser zipapp
xml/dom/minidom xml/etree/ElementTree xml/sax/handler email/message email/header email/_header_value_parser
email/policy http/client http/server http/cookies http/cookiejar json/decoder json/encoder logging/__init__
logging/config logging/handlers unittest/case unittest/mock unittest/loader urllib/parse urllib/request
asyncio/base_events asyncio/events asyncio/streams asyncio/tasks asyncio/locks concurrent/futures/_base
concurrent/futures/process multiprocessing/pool multiprocessing/managers multiprocessing/connection sqlite3/dump
wsgiref/handlers tkinter/__init__ tkinter/ttk turtle
"""
VALIDATION_MODULES = """
tarfile bz2 abc cProfile colorsys compileall copyreg email/mime/text importlib/util html/parser ntpath unittest/suite
urllib/robotparser
"""


class Characters(Workload):
    """Which character comes next? A batch is ``batch_size`` windows of 64 characters; validation has fixed windows."""

    measure = "validation loss (nats per character)"
    likelihood = "categorical"
    batch_size = 32
    held_out_windows = (4, 128)
    """Number of fixed batches, and of windows in each."""

    def __init__(self, train: Tensor, validation: Tensor) -> None:
        self.train = train
        fixed = torch.Generator().manual_seed(0)
        batches, windows = self.held_out_windows
        self.held_out = [cut(validation, windows, fixed) for _ in range(batches)]

    @override
    def batch(self, generator: torch.Generator) -> Pairs:
        return cut(self.train, self.batch_size, generator)

    @override
    def loss(self, model: nn.Module, batch: Pairs) -> Tensor:
        symbols, following = batch
        return F.cross_entropy(model(symbols).flatten(0, 1), following.flatten())

    @override
    def validation(self, model: nn.Module) -> float:
        return sum(self.loss(model, batch).item() for batch in self.held_out) / len(self.held_out)


def cut(symbols: Tensor, count: int, generator: torch.Generator) -> Pairs:
    """Return ``count`` random windows of symbols, and for each symbol the one that follows, ``[count, CONTEXT]``."""
    start = torch.randint(len(symbols) - CONTEXT, (count, 1), generator=generator)
    windows = symbols[start + torch.arange(CONTEXT + 1)]  # [count, CONTEXT + 1]
    return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Text:
    """Training and validation text, as indices into `ALPHABET`."""

    train: Tensor
    validation: Tensor
    sha256: str
    missing: tuple[str, ...]
    """Modules that this Python does not have."""

    def describe(self) -> dict[str, str]:
        """Return facts about the text for a report."""
        facts = {
            "text": f"source of the standard library of Python {platform.python_version()}",
            "characters": f"{len(self.train):,} to train on, {len(self.validation):,} held out",
            "sha256": self.sha256,
        }
        return facts | ({"modules not found": " ".join(self.missing)} if self.missing else {})


@functools.cache
def load_text(folder: str | None = None) -> Text:
    """Read the text from ``folder``, by default this Python's standard library.

    Raises:
        BadInput: if this Python comes without the source of its standard library.

    >>> text = load_text()
    >>> text.train.dtype, bool(text.train.max() < len(ALPHABET))
    (torch.int64, True)
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    train, missing = _read(root, TRAINING_MODULES.split())
    validation, missing_too = _read(root, VALIDATION_MODULES.split())
    if not train or not validation:
        raise BadInput("this Python comes without the source of its standard library: race on another workload")
    sha256 = hashlib.sha256(f"{train}\0{validation}".encode()).hexdigest()
    return Text(symbols_of(train), symbols_of(validation), sha256, (*missing, *missing_too))


def clean(source: str) -> str:
    r"""Drop characters outside the alphabet, and replace tabs by four spaces.

    >>> clean("if é:\r\n\tpass")
    'if :\n    pass'
    """
    outside = {ord(character): None for character in set(source) - set(ALPHABET) - {"\t"}}
    return source.translate(outside | {ord("\t"): "    "})


def _read(root: Path, modules: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """Return the cleaned text of all modules, and the names of those that are missing."""
    files = {module: root / f"{module}.py" for module in modules}
    missing = tuple(module for module, file in files.items() if not file.is_file())
    found = (file for module, file in files.items() if module not in missing)
    return "".join(clean(file.read_text(encoding="utf-8")) for file in found), missing


def symbols_of(text: str) -> Tensor:
    """Return ``text`` as indices into the alphabet."""
    codes = torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8).long()
    return torch.where(codes == 10, 0, codes - 31)  # "\n" is 0, " " is 1, ...
