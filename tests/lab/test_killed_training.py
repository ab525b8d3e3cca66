"""Training that is killed again and again, in `torch.save` too, ends as training that nothing happened to.

``save`` and ``resume`` are those of docs/checkpoints.md.
"""

from __future__ import annotations

import doctest
import json
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

ROOT = Path(__file__).parents[2]
SAVES = 12

SCRIPT = """
import json, os, signal
import torch
import steepest
from torch import nn

torch.set_num_threads(1)

{documented}

def start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 8))
    return model, steepest.for_model(model, RULE, lr=1e-2)

def train(model, optimizer, step):
    batch = torch.randn(16, 48, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()

for RULE in ("soap", "muon"):  # torch imports more for its first optimizer
    train(*start(), 0)

class Deadly:
    '''A file that kills who writes to it, when it has got so many bytes.'''

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        data = bytes(data)
        self.file.write(data[: self.left])
        self.left -= len(data)
        if self.left <= 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

def main(line):
    global RULE
    task = json.loads(line)
    RULE = task["rule"]
    model, optimizer, step = resume(task["path"])
    write = torch.save
    for step in range(step, {saves}):
        train(model, optimizer, step)
        if task.get("step") == step:
            torch.save = lambda state, file: write(state, Deadly(file, task["bytes"]))
        save({{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}}, task["path"])
    return 0
"""


def documented(*names: str) -> str:
    """Functions that docs/checkpoints.md defines."""
    examples = doctest.DocTestParser().get_examples((ROOT / "docs" / "checkpoints.md").read_text())
    heads = tuple(f"def {name}(" for name in names)
    found = [example.source for example in examples if example.source.startswith(heads)]
    assert len(found) == len(names)
    return "".join(found)


@pytest.fixture(scope="module")
def server(fork_server: Callable[[str], Any]) -> Any:
    return fork_server(SCRIPT.format(documented=documented("save", "resume"), saves=SAVES))


def line(rule: str, path: Path, **fault: int) -> str:
    return json.dumps({"rule": rule, "path": str(path), **fault})


def read(path: Path) -> dict[str, Any]:
    """A checkpoint; it is whole if it can be read."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def expect_as_undisturbed(server: Any, rule: str, path: Path) -> None:
    """Resumed once more, the training ends with the weights and the state of one that nothing happened to."""
    assert server.run(line(rule, path)) == (0, "")
    straight = path.with_name("straight.pt")
    assert server.run(line(rule, straight)) == (0, "")
    seen, expected = read(path), read(straight)
    assert seen["step"] == expected["step"] == SAVES
    pairs = [(seen["model"][name], x) for name, x in expected["model"].items()]
    for key, named in expected["optimizer"]["state"].items():
        pairs += [(seen["optimizer"]["state"][key][name], x) for name, x in named.items()]
    assert len(pairs) > 6
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("rule", ["soap", "muon"])
def test_killed_in_the_middle_of_torch_save(server: Any, tmp_path: Path, rule: str) -> None:
    """At each step but the last one, after ever more bytes of the file; the step's work is what is lost."""
    path = tmp_path / "last.pt"
    server.run(line(rule, tmp_path / "size.pt"))
    size = (tmp_path / "size.pt").stat().st_size
    for step in range(SAVES - 1):
        server.start(line(rule, path, step=step, bytes=1 + step * size // SAVES))
        assert server.end() == -signal.SIGKILL
        assert not path.exists() if step == 0 else read(path)["step"] == step
        assert 0 < path.with_name("last.pt.partial").stat().st_size < size
    expect_as_undisturbed(server, rule, path)


@pytest.mark.parametrize("rule", ["soap", "muon"])
def test_killed_at_random(server: Any, tmp_path: Path, rule: str) -> None:
    path = tmp_path / "last.pt"
    chance = random.Random(0)
    for _ in range(8):
        server.start(line(rule, path))
        time.sleep(chance.uniform(0.0, 0.05))  # it may have ended by then
        server.kill()
        assert server.end() in (-signal.SIGKILL, 0)
        assert not path.exists() or 0 < read(path)["step"] <= SAVES
    expect_as_undisturbed(server, rule, path)
