"""Every command with no, wrong and typical input: its exit status, and the first line that it prints.

Typical runs are of tiny sizes, and what trains does so in this process.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
from short_training import Here
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.bench.shapes import MODELS
from steepest.lab.plan.models import Architecture, gpt2
from steepest.lab.race import command as race
from steepest.lab.spike import command as spike
from steepest.lab.spike import study
from steepest.lab.suite import command as suite
from steepest.lab.tune import command as tune

MODEL = """
from torch import nn

def model():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
"""
WIDE = """
import torch
from torch import nn

def make(width):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))

def batch(generator):
    return torch.randn(8, 6, generator=generator)

def loss(model, batch):
    return (model(batch) - batch[:, :3]).square().mean()
"""
REFUSED, BROKEN, DONE = 2, 1, 0
# Typed, exit status, what the first line begins with. A refusal is one line on stderr.
LINES = [
    ("", DONE, ""),
    ("nonsense", REFUSED, "No such command 'nonsense'"),
    ("check", REFUSED, "Missing argument 'optimizer'"),
    (
        "check sopa",
        REFUSED,
        "steepest: 'sopa': no such optimizer (did you mean 'soap'?); others go by module:Class, as in",
    ),
    (
        "check torch.optim",
        REFUSED,
        "steepest: 'torch.optim': no such optimizer; others go by module:Class, as in torch.opt",
    ),
    ("check steepest:SAOP", REFUSED, "steepest: steepest:SAOP: steepest has no SAOP (did you mean 'SOAP'?)"),
    ("check steepest:", REFUSED, "steepest: 'steepest:': write module:Class, as in torch.optim:AdamW"),
    (
        "check steepest:__version__",
        REFUSED,
        "steepest: steepest:__version__: is no class, but str; name a class, as in",
    ),
    ("check nowhere:X", REFUSED, "steepest: nowhere:X: ModuleNotFoundError: No module named 'nowhere'; is the package"),
    ("check soap --lr x", REFUSED, "Invalid value for '--lr'"),
    ("check soap --lr -1", REFUSED, "steepest: soap: no parameter could be optimized: ValueError: lr=-1.0: must be"),
    ("check soap --option betas", REFUSED, 'steepest: option "betas": write it as "betas=(0.9, 0.95)", a name'),
    ("check soap --dtype float8", REFUSED, "steepest: --dtype float8: there are float32, bfloat16, float64"),
    (
        "check soap --device tpu",
        REFUSED,
        "steepest: --device tpu: torch has no such device here; there is cpu, and with",
    ),
    ("check torch.optim:SGD --lr 0.1", BROKEN, "torch.optim:SGD  torch "),
    ("optimizers", DONE, ""),
    ("optimizers --papers", DONE, ""),
    ("optimizers x", REFUSED, "Got unexpected extra argument"),
    ("routes", REFUSED, "Missing argument 'model_file'"),
    ("routes nowhere.py", REFUSED, "steepest: model file nowhere.py: no such file"),
    ("routes empty.py", REFUSED, "steepest: model file empty.py: defines no function model()"),
    ("routes number.py", REFUSED, "steepest: model file number.py: model() returned int, not a torch.nn.Module"),
    ("routes syntax.py", REFUSED, "steepest: model file syntax.py: can't be imported: SyntaxError:"),
    ("routes model.py --rule sopa", REFUSED, "steepest: name='sopa': no such rule (did you mean 'soap'?)"),
    ("routes model.py", DONE, "parameter  shape  rule"),
    ("plan --params 3t", REFUSED, "steepest: --params 3t: there are 124m, 1b, 7b, 70b"),
    ("plan --world 0", REFUSED, "steepest: --world 0: must be at least 1"),
    ("plan --layout hsdp:3x3", REFUSED, "steepest: --layout hsdp:3x3: 3 times 3 are no 8 ranks (--world)"),
    ("plan --layout ring", REFUSED, "steepest: --layout ring: must be fsdp, ddp, tp, hsdp:RxS"),
    ("plan --gpu tpu", REFUSED, "steepest: --gpu tpu: there are h200, h100, a100, l40s, and here, which measures"),
    ("plan --mfu 0", REFUSED, "steepest: --mfu 0.0: must be in (0, 1], a share of the device's peak"),
    ("plan --tokens 0", REFUSED, "steepest: --tokens 0: must be at least 1"),
    ("plan --dtype float8", REFUSED, "steepest: --dtype float8: there are float32, bfloat16, float64"),
    ("plan --optimizer sopa", REFUSED, "steepest: name='sopa': no such"),
    ("plan model.py --params 7b", REFUSED, "steepest: --params 7b: give a model file or well-known sizes, not both"),
    ("plan model.py --world 2", DONE, "soap on 2 ranks, fsdp, 524,288 tokens a step"),
    ("race --optimizers sopa", REFUSED, "steepest: unknown optimizer 'sopa'; did you mean 'soap'?"),
    ("race --workload nowhere", REFUSED, "steepest: unknown workload 'nowhere'"),
    ("race --steps 0", REFUSED, "Invalid value for '--steps'"),
    ("race --sweep lr", REFUSED, 'steepest: sweep "lr"'),
    (
        "race --workload quick_task.py --optimizers adamw,muon --seeds 1 --workers 1 --out raced",
        DONE,
        "steepest race: adamw, muon on quick_task.py",
    ),
    ("suite --workloads nowhere", REFUSED, "steepest: unknown workload 'nowhere': give one of stdlib,"),
    ("coord-check digits", REFUSED, "steepest: workload 'digits' has only scale; a check over widths needs"),
    ("tune", REFUSED, "Missing argument 'workload'"),
    ("tune nowhere", REFUSED, "steepest: unknown workload 'nowhere': give one of stdlib,"),
    ("tune quick_task.py --trials 3 --out tuned", DONE, "steepest tune: soap on quick_task.py, 4 steps"),
    ("tune digits --optimizer sopa", REFUSED, "steepest: unknown optimizer 'sopa'; did you mean 'soap'?"),
    ("tune digits --optimizer lbfgs", REFUSED, "steepest: optimizer lbfgs: it chooses the lengths of its steps, so"),
    ("tune digits --trials 2", REFUSED, "Invalid value for '--trials'"),
    ("tune digits --budget 10", REFUSED, "steepest: --budget 10: write CPU time as 90s, 10m or 2h"),
    ("suite --optimizers sopa", REFUSED, "steepest: unknown optimizer 'sopa'; did you mean 'soap'?"),
    ("suite --budget x", REFUSED, "steepest: --budget x: write CPU time as 90s, 10m or 2h"),
    (
        "suite --workloads quick_task.py --optimizers muon --budget 1s --workers 1 --out compared",
        DONE,
        "steepest suite: adamw, muon",
    ),
    ("coord-check nowhere", REFUSED, "steepest: unknown workload 'nowhere'"),
    ("coord-check --optimizer sopa", REFUSED, "steepest: unknown optimizer 'sopa'; did you mean 'soap'?"),
    ("coord-check --steps 0", REFUSED, "Invalid value for '--steps'"),
    ("coord-check wide.py:make --widths 8,16 --steps 1", DONE, "wide.py:make, widths 8, 16: adamw lr 0.01"),
    ("spike --device tpu", REFUSED, "steepest: --device tpu:"),
    ("spike --seed x", REFUSED, "Invalid value for '--seed'"),
    ("spike --device cpu --out spiked", DONE, "steepest spike: 8×4, 31 steps, step 12 ×1000; emulated TF32 on cpu"),
    ("bench --shapes gpt-9", REFUSED, "steepest: --shapes gpt-9:"),
    ("bench --optimizers sopa", REFUSED, "steepest: unknown optimizer 'sopa'; did you mean 'soap'?"),
    ("bench --steps 0", REFUSED, "steepest: --steps 0: must be"),
    ("bench --device tpu", REFUSED, "steepest: --device tpu:"),
    (
        "bench --shapes tiny --optimizers muon --steps 1 --out timed",
        DONE,
        "steepest bench: 1 steps, one thread, cpu",
    ),
]


@pytest.fixture
def files(quick_task, tmp_path, monkeypatch) -> None:
    """A folder of files to name, and what makes typical runs short."""
    quick_task()
    texts = {"model": MODEL, "wide": WIDE, "empty": "", "number": "def model(): return 3", "syntax": "def model(:"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for module in (race, suite, tune):
        monkeypatch.setattr(module, "Pool", Here)
    monkeypatch.setitem(MODELS, "tiny", Architecture("for tests", 3, partial(gpt2, d=8)))
    monkeypatch.setattr(spike, "Setup", partial(spike.Setup, shape=(8, 4), steps=31, spike_at=11, top=2))
    # One case is followed, and stands for all with its gradients.
    compare = study.compare
    compared = cache(lambda gradients, setup: compare(study.Case("REKLS", "absolute", gradients), setup))
    monkeypatch.setattr(study, "compare", lambda case, setup: compared(case.gradients, setup))


@pytest.mark.usefixtures("files", "hasty")
@pytest.mark.parametrize(("typed", "status", "first"), LINES, ids=[line[0] or "(nothing)" for line in LINES])
def test_what_a_command_line_answers(typed: str, status: int, first: str, tmp_path) -> None:
    done = CliRunner().invoke(app, typed.split(), env={"COLUMNS": "80"})
    assert done.exit_code == status, done.output
    if status in (DONE, BROKEN):
        assert done.stderr == ""
        assert done.stdout.startswith(first)
        assert max(map(len, done.stdout.splitlines())) <= 80
    elif (lines := done.stderr.splitlines()) and lines[0].startswith("steepest: "):
        assert len(lines) == 1
        assert lines[0].startswith(first)
        assert done.stdout == ""
    else:  # main turns what typer says into one line: tests/lab/test_cli.py
        assert first in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_command_has_wrong_and_typical_lines(command: str) -> None:
    statuses = [line[1] for line in LINES if line[0].split(" ")[0] == command]
    assert REFUSED in statuses
    assert {DONE, BROKEN} & {*statuses}
