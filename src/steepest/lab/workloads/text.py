"""Text that every Python installation has: the source of its own standard library.

Named, long-lived, pure-Python modules, some of them held out for validation. The text differs between Python versions,
so its SHA-256 stands in every report, and losses compare within one version only.

>>> text = load()
>>> text.train.dtype, bool(text.train.max() < len(ALPHABET))
(torch.int64, True)
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))

TRAIN = """
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

VALIDATION = """
tarfile bz2 abc cProfile colorsys compileall copyreg email/mime/text importlib/util html/parser ntpath unittest/suite
urllib/robotparser
"""


@dataclass(frozen=True)
class Text:
    """Two sequences of symbols, each an index into `ALPHABET`."""

    train: Tensor
    validation: Tensor
    sha256: str
    missing: tuple[str, ...]
    """Modules that this Python doesn't have."""


def clean(source: str) -> str:
    r"""Keep what is in the alphabet; a tab becomes four spaces.

    >>> clean("if é:\r\n\tpass")
    'if :\n    pass'
    """
    return source.replace("\t", "    ").translate(_Dropped())


@functools.cache
def load(folder: str | None = None) -> Text:
    """Read the text from ``folder``, by default this Python's standard library."""
    root = Path(folder or sysconfig.get_path("stdlib"))
    train, missing = _read(root, TRAIN.split())
    validation, missing_too = _read(root, VALIDATION.split())
    digest = hashlib.sha256(f"{train}\0{validation}".encode()).hexdigest()
    return Text(_symbols(train), _symbols(validation), digest, (*missing, *missing_too))


class _Dropped(dict[int, int | None]):
    """A translation table that drops every character outside the alphabet."""

    def __missing__(self, code: int) -> int | None:
        self[code] = code if chr(code) in ALPHABET else None
        return self[code]


def _read(root: Path, modules: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """The modules' cleaned text, one after the other, and the names of those that aren't there."""
    files = {module: root / f"{module}.py" for module in modules}
    missing = tuple(module for module, file in files.items() if not file.is_file())
    found = (file for module, file in files.items() if module not in missing)
    return "".join(clean(file.read_text(encoding="utf-8")) for file in found), missing


def _symbols(text: str) -> Tensor:
    """``text`` as indices into the alphabet."""
    codes = torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8).long()
    return torch.where(codes == 10, 0, codes - 31)  # "\n" is 0, " " is 1, ...
