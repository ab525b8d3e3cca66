"""Check the archives of a release, and the wheel where it is installed.

    python .ci/wheel.py archives    dist holds one wheel and one source archive, with the files of git and no others
    python .ci/wheel.py torch       the wheel trains where only torch is installed
    python .ci/wheel.py race        the commands run and a race ends, with the extra "race"

`make wheel` calls each in its turn, in an environment with just that.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
RACE = ["race", "--optimizers", "adamw, soap, muon", "--steps", "4", "--seeds", "1"]


def compare_archives() -> None:
    """Compare what the archives hold with the files that git tracks, and the metadata with what is promised."""
    (wheel,), (source,) = ROOT.glob("dist/*.whl"), ROOT.glob("dist/*.tar.gz")
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True)
    package = set(tracked.stdout.split())

    with zipfile.ZipFile(wheel) as opened:
        held = {f"src/{name}" for name in opened.namelist() if ".dist-info/" not in name}
        (metadata,) = (opened.read(name).decode() for name in opened.namelist() if name.endswith("/METADATA"))
    same(wheel.name, held, package)

    # What setuptools adds to every source archive is made of pyproject.toml.
    added = {"PKG-INFO", "setup.cfg"}
    with tarfile.open(source) as opened:
        names = (member.name.partition("/")[2] for member in opened.getmembers() if member.isfile())
        held = {name for name in names if not name.startswith("src/steepest.egg-info/")}
    same(source.name, held, package | added | {"LICENSE", "README.md", "pyproject.toml"})

    told = Parser().parsestr(metadata)
    needed = [line for line in told.get_all("Requires-Dist", []) if "extra ==" not in line]
    expect(len(needed) == 1 and needed[0].startswith("torch>="), f"{wheel.name} requires {needed}, not torch alone")
    print(f"{wheel.name} and {source.name} hold the {len(package)} files of src, and need torch alone")


def same(archive: str, held: set[str], wanted: set[str]) -> None:
    """Exit if an archive lacks files, or holds others."""
    expect(held == wanted, f"{archive} lacks {sorted(wanted - held)}, and holds beside them {sorted(held - wanted)}")


def train_with_torch_alone() -> None:
    """Train a model, with nothing but torch installed."""
    import torch

    import steepest

    installed = Path(sysconfig.get_path("purelib"))
    expect(Path(steepest.__file__).is_relative_to(installed), f"steepest is {steepest.__file__}, not the wheel's")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x, y = torch.randn(32, 8), torch.randn(32, 4)
    losses = {}
    for name in ("soap", "muon"):
        optimizer = steepest.for_model(model, name, lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.setdefault(name, loss.item())
        expect(loss.item() < losses[name], f"{name} lowers no loss: {losses[name]} to {loss.item()}")
    refused = subprocess.run([command()], capture_output=True, text=True)
    expect("pip install" in refused.stderr, f"the command without typer says: {refused.stderr or refused.stdout}")
    print(f"steepest {steepest.__version__} trains with torch {torch.__version__} alone")


def run_commands() -> None:
    """Call the commands that need no more than the extra, and look for what a race writes."""
    for typed in (["--help"], ["race", "--help"], ["optimizers"]):
        done = subprocess.run([command(), *typed], capture_output=True, text=True)
        expect(done.returncode == 0 and done.stdout, f"steepest {' '.join(typed)}: {done.stderr}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([command(), *RACE, "--out", folder], capture_output=True, text=True)
        expect(done.returncode == 0, f"steepest {' '.join(RACE)}: {done.stdout}{done.stderr}")
        report = Path(folder, "report.html").read_text(encoding="utf-8")
    expect("Loss over steps" in report and "font-variant-numeric" in report, "the report lacks its text or its style")
    print("the commands run, and a race of 4 steps writes its report")


def command() -> str:
    """Return the path of the installed command."""
    return str(Path(sys.executable).with_name("steepest"))


def expect(holds: bool, otherwise: str) -> None:
    """Exit with a message unless something holds."""
    if not holds:
        sys.exit(f"wheel: {otherwise}")


if __name__ == "__main__":
    parts = {"archives": compare_archives, "torch": train_with_torch_alone, "race": run_commands}
    if sys.argv[1:] not in [[name] for name in parts]:
        sys.exit(__doc__)
    parts[sys.argv[1]]()
