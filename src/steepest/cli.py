"""The command ``steepest``.

Each command imports its module from `steepest.lab` when it is called. So help and usage errors don't import torch.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

from steepest import __version__

try:
    import typer
    from rich.console import Console
    from typer import Option
except ModuleNotFoundError as missing:
    sys.exit(f'steepest: the command line needs {missing.name}; install it with: pip install "steepest[lab]"')

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BAD_INPUT, INTERRUPTED = 2, 130

MODEL_FILE = typer.Argument(help="A Python file with a function model() that returns a module.")
Rule = Annotated[str, Option(help="The optimizer or recipe for hidden matrices.")]
Options = Annotated[list[str] | None, Option("--option", help='An option: "betas=(0.9, 0.95)". Repeat it for more.')]
Out = Annotated[Path, Option(help="Folder for the report and its figures.")]
Json = Annotated[bool, Option("--json", help="Print all figures as JSON.")]


@app.callback(invoke_without_command=True, epilog="Example: steepest race --optimizers 'adamw, soap'")
def steepest(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Matrix-aware optimizers for PyTorch: race, check, list and time them, and plan their memory on many GPUs."""
    if version:
        typer.echo(f"steepest {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        return
    raise typer.Exit


@app.command(epilog="Example: steepest race --optimizers 'adamw, soap(lr=1e-2)' --steps 200")
def race(
    optimizers: Annotated[str | None, Option(help="Contenders. Default: a few presets; all with --full.")] = None,
    workload: Annotated[str, Option(help="What to train: a name, as below, or a file.")] = "stdlib",
    full: Annotated[bool, Option("--full", help="Sweep learning rates, then run shorter distances, too.")] = False,
    sweep: Annotated[list[str] | None, Option(help='Values to try: "lr=5e-3, 1e-2". Repeat it for a grid.')] = None,
    steps: Annotated[int | None, Option(min=1, help="Training steps. Default: as the workload says.")] = None,
    seconds: Annotated[
        float | None, Option(min=0.001, help="Train for so long instead: time of model and optimizer.")
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Number of seeds with which each setting is trained.")] = 2,
    poison: Annotated[float, Option(min=0, max=1, help="Share of gradients that get NaN or infinite entries.")] = 0.0,
    workers: Annotated[int | None, Option(min=1, help="Trials at the same time. Default: one per core.")] = None,
    out: Annotated[Path, Option(help="Folder for the report and the records of all trials.")] = Path("runs/race"),
) -> None:
    """Train contenders side by side with equal tuning, and write a report.

    Workloads are stdlib, lstm, vit, convnet, mlp, autoencoder, photo, pinn, lora, diffusion, burgers and digits; or a
    Python file defines one. They have options: 'stdlib(width=128, depth=4)'.

    Each trial is recorded when it ends: the same command continues an interrupted race. Ctrl-C leaves a report.
    Delete the folder to run all trials again.
    """
    with _errors_in_one_line():
        from steepest.lab.race import command

        processes = workers or os.cpu_count() or 1
        request = command.Request(
            optimizers, workload, full, sweep or [], steps, seconds, seeds, poison, processes, out, _typed()
        )
        raise typer.Exit(command.run(request, _console()))


@app.command(epilog="Example: steepest suite --optimizers 'soap-f5, muon' --workloads 'stdlib, convnet' --budget 2h")
def suite(
    optimizers: Annotated[str | None, Option(help="Contenders beside adamw, in order. Default: 17, and peers.")] = None,
    workloads: Annotated[str | None, Option(help="What to train: names, or files. Default: the suite's.")] = None,
    budget: Annotated[str | None, Option(help="CPU time to spend: 30m, 2h. Drops contenders from the end.")] = None,
    start: Annotated[Path | None, Option("--from", help="Go on from a suite.json, from another machine too.")] = None,
    workers: Annotated[int | None, Option(min=1, help="Runs at the same time. Default: one per core.")] = None,
    out: Annotated[Path, Option(help="Folder for the results and the records of all runs.")] = Path("runs/suite"),
) -> None:
    """Compare optimizers on ten workloads, with the same number of trials for each, and write a leaderboard.

    Two tables come out: tuned on each workload, and one setting for all. Both say how much faster than AdamW an
    optimizer is at AdamW's final loss, in steps and in time. Peers, such as pytorch_optimizer.soap, are other
    libraries' optimizers with the settings of ours; they take part where they are installed.

    Each run is recorded when it ends: the same command continues an interrupted suite.
    """
    with _errors_in_one_line():
        from steepest.lab.suite import command

        processes = workers or os.cpu_count() or 1
        request = command.Request(optimizers, workloads, budget, start, processes, out, _typed())
        raise typer.Exit(command.run(request, _console()))


@app.command(epilog="Example: steepest tune my_task.py --optimizer soap --budget 10m")
def tune(
    workload: Annotated[str, typer.Argument(help="What to train, as in steepest race: a file, or a name.")],
    optimizer: Annotated[str, Option(help="One contender, as in steepest race: the search starts from it.")] = "soap",
    trials: Annotated[int, Option(min=3, help="Most settings to try; one run each.")] = 8,
    budget: Annotated[str | None, Option(help="CPU time to spend: 90s, 10m, 2h. Default: what the runs take.")] = None,
    steps: Annotated[int | None, Option(min=1, help="Training steps. Default: as the workload says.")] = None,
    out: Annotated[Path, Option(help="Folder for the setting, the picture and the records.")] = Path("runs/tune"),
) -> None:
    """Find learning rates and weight decay for one optimizer on a task of yours, and print the code to paste.

    Learning rates walk by factors of 4 until the best has a worse one on both sides; half steps, the rate of the
    parameters that are no hidden matrices, and weight decay follow. A best value at the edge is marked.

    Each run is recorded when it ends: the same command continues an interrupted search, and more trials go on from it.
    """
    with _errors_in_one_line():
        from steepest.lab.tune import command

        request = command.Request(workload, optimizer, trials, budget, steps, out, _typed())
        raise typer.Exit(command.run(request, _console()))


@app.command(epilog="Example: steepest check torch.optim:AdamW --lr 1e-3 --option 'betas=(0.9, 0.95)'")
def check(
    optimizer: Annotated[str, typer.Argument(help="module:Class, as in torch.optim:AdamW, or a name, as in soap.")],
    lr: Annotated[float | None, Option(help="Learning rate.")] = None,
    option: Options = None,
    dtype: Annotated[str, Option(help="Dtype of the parameters: float32, bfloat16, float64.")] = "float32",
    device: Annotated[str, Option(help="Device of the parameters: cpu, cuda.")] = "cpu",
    slow: Annotated[bool, Option("--slow", help="Check the compiled step, too.")] = False,
    as_json: Json = False,
) -> None:
    """Check an optimizer against each clause of the contract of PyTorch's optimizers.

    The exit status is 1 if the optimizer breaks a clause.
    """
    with _errors_in_one_line():
        from steepest.lab.listing import check as command

        options = ({} if lr is None else {"lr": lr}) | command.parse_options(option or [])
        kept = command.run(optimizer, options, _console(), dtype, device, slow, as_json)
        raise typer.Exit(0 if kept else 1)


@app.command(epilog="Example: steepest optimizers --papers")
def optimizers(
    papers: Annotated[bool, Option("--papers", help="List where they come from, instead of what they cost.")] = False,
) -> None:
    """List all optimizers with their state and their work per step, and all recipes."""
    with _errors_in_one_line():
        from steepest.lab.listing import command

        (command.print_papers if papers else command.print_optimizers)(_console())


@app.command(epilog="Example: steepest routes my_model.py --rule kl-soap")
def routes(model_file: Annotated[str, MODEL_FILE], rule: Rule = "soap") -> None:
    """Print which rule steps each parameter of a model, as which matrices, and why."""
    with _errors_in_one_line():
        from steepest.lab.listing import command

        command.print_routes(model_file, rule, _console())


@app.command(epilog="Example: steepest plan --params 7b --world 64 --layout hsdp:8x8 --gpu h100")
def plan(
    model_file: Annotated[str | None, MODEL_FILE] = None,
    params: Annotated[str | None, Option(help="Known models instead of a file: 124m,1b,7b,70b. Default: all.")] = None,
    optimizer: Rule = "soap",
    option: Options = None,
    world: Annotated[int, Option(help="Number of ranks.")] = 8,
    layout: Annotated[
        str, Option(help="How ranks hold parameters: fsdp, ddp, tp, hsdp:RxS (R replicas of S shards), fsdp+tp:SxT.")
    ] = "fsdp",
    block_size: Annotated[int | None, Option(help="Largest side of blocks of matrices. Default: try several.")] = None,
    tokens: Annotated[int, Option(help="Tokens in a training step, over all ranks.")] = 2**19,
    dtype: Annotated[str | None, Option(help="Dtype of gradients. Default: the file's, or bfloat16.")] = None,
    gpu: Annotated[
        str | None, Option(help="Predict time on: h200, h100, a100, l40s, or here, which measures this machine first.")
    ] = None,
    mfu: Annotated[float, Option(help="Share of peak FLOPs that forward and backward passes reach.")] = 0.4,
    as_json: Json = False,
) -> None:
    """Simulate an optimizer's step on many ranks: state, bytes sent, FLOPs, their balance, and time."""
    with _errors_in_one_line():
        from steepest.lab.listing.check import parse_options
        from steepest.lab.plan import command

        options = parse_options(option or [])
        request = command.Request(
            model_file, params, optimizer, options, world, layout, block_size, tokens, dtype, gpu, mfu
        )
        command.run(request, _console(), as_json)


@app.command(
    name="coord-check", epilog="Example: steepest coord-check stdlib --optimizer 'muon(lr=2e-2)' --widths 32,64,128"
)
def coord_check(
    model: Annotated[
        str, typer.Argument(help="A workload with a width: stdlib, my_task.py; or a function: my_model.py:make.")
    ] = "stdlib",
    optimizer: Annotated[str, Option(help="A contender, as in steepest race; its rate stays constant.")] = "adamw",
    widths: Annotated[str, Option(help="At least two widths.")] = "32,64,128,256",
    steps: Annotated[int, Option(min=1, help="Training steps at each width.")] = 5,
    seed: Annotated[int, Option(help="Seed of initial weights and data.")] = 0,
    as_json: Json = False,
) -> None:
    """Show how updates and activations move with a model's width: where they stay, its learning rate carries over.

    A function takes a width and returns a workload, or a module; then its file also has batch(generator) and
    loss(model, batch).
    """
    with _errors_in_one_line():
        from steepest.lab.coordcheck import command

        command.run(command.Request(model, optimizer, widths, steps, seed), _console(), as_json)


@app.command(epilog="Example: steepest spike --device cpu --seed 1")
def spike(
    device: Annotated[str, Option(help="auto, cpu or cuda. TF32 is emulated on devices without it.")] = "auto",
    seed: Annotated[int, Option(help="Seed of the gradients.")] = 0,
    out: Out = Path("runs/spike"),
) -> None:
    """Show what a gradient 1000 times too large does to KL-Shampoo's eigenbases, by precision and floor."""
    with _errors_in_one_line():
        from steepest.lab.spike import command

        command.run(device, seed, out, _typed(), _console())


@app.command(epilog="Example: steepest bench --optimizers 'soap-f10, soap-f10(stagger=True), muon' --steps 20")
def bench(
    shapes: Annotated[str, Option(help="Models with these matrices: gpt-tiny, gpt2-124m, llama-1b, moe.")] = "gpt-tiny",
    optimizers: Annotated[str | None, Option(help="-f10 is a refresh every 10 steps. Default: seven.")] = None,
    peers: Annotated[bool, Option("--peers", help="Time torch.optim, pytorch_optimizer and heavyball, too.")] = False,
    compiled: Annotated[bool, Option("--compiled", help="Time heavyball compiled, too: takes minutes.")] = False,
    steps: Annotated[int, Option(help="Timed steps: a multiple of every refresh frequency.")] = 40,
    warmup: Annotated[int | None, Option(help="Steps before. Default: one more than the longest period.")] = None,
    depth: Annotated[int | None, Option(help="Number of layers, instead of all that the model has.")] = None,
    device: Annotated[str, Option(help="cpu (one thread) or cuda.")] = "cpu",
    count: Annotated[bool, Option("--count", help="Count launches, bytes, FLOPs on a GPU that needn't exist.")] = False,
    lines: Annotated[bool, Option("--lines", help="Count by line of source; with --count.")] = False,
    engine: Annotated[bool, Option("--engine", help="Time the host's work for 100 to 1000 small matrices.")] = False,
    out: Out = Path("runs/bench"),
) -> None:
    """Time optimizers' steps on a model's shapes, by phase, against other libraries and against a lower bound."""
    with _errors_in_one_line():
        from steepest.lab.bench import command

        request = command.Request(
            shapes, optimizers, peers, compiled, steps, warmup, depth, device, out, _typed(), count, lines, engine
        )
        command.run(request, _console())


def main() -> None:
    """Run the command line; a usage error is one line on stderr."""
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        status = INTERRUPTED
    except Exception as error:
        message = getattr(error, "format_message", None)  # typer's usage errors; their class has moved between versions
        if message is None:
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "steepest")
        typer.echo(f"steepest: {message()} (see {command} --help)", err=True)
        status = BAD_INPUT
    sys.exit(status)


def _console() -> Console:
    return Console(emoji=False)  # else ":SOAP:" in a name is a picture


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Report bad input and missing packages as one line on stderr, and end with the exit status of an error."""
    try:
        from steepest.lab.shared.errors import BadInput

        try:
            yield
        except BadInput as error:
            _fail(str(error))
    except ModuleNotFoundError as missing:
        _fail(f'this needs {missing.name}; install it with: pip install "steepest[lab]"')
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with the status of bad input."""
    typer.echo(f"steepest: {message}", err=True)
    raise typer.Exit(BAD_INPUT)


def _typed() -> str:
    """Return the command line, as reports show it."""
    return shlex.join(["steepest", *sys.argv[1:]])


if __name__ == "__main__":
    main()
