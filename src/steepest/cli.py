"""The command ``steepest``.

What it runs lives in `steepest.lab` and is imported when a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    sys.exit(f'steepest: the command line needs {missing.name}; install it with: pip install "steepest[lab]"')

app = typer.Typer(
    help="steepest: matrix-aware optimizers for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BAD_INPUT = 2


@app.callback()
def commands() -> None:
    """Keeps ``race`` a command of its own while it is the only one."""


@app.command()
def race(
    optimizers: Annotated[
        str | None,
        typer.Option(
            help='Who runs: "adamw, soap(precondition_frequency=5, lr=1e-2)". Default: a few, or all with --full.'
        ),
    ] = None,
    workload: Annotated[
        str,
        typer.Option(help="What is trained: stdlib, digits, digits-vit, photo, convnet, or your own file, my_task.py."),
    ] = "stdlib",
    full: Annotated[
        bool, typer.Option("--full", help="Sweep learning rates, then run the best over shorter distances too.")
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help='Values to try instead of presets: "lr=5e-3, 1e-2". Repeat it for a grid of several options.'
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Distance; the workload's own unless given.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting.")] = 2,
    poison: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of gradients that get NaN or infinite entries: who bears it?"),
    ] = 0.0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trials side by side, one thread each; one per core unless given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and for each run's record.")] = Path("runs/race"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again, whatever was run before.")] = False,
) -> None:
    """Train contenders side by side, with equal tuning, and write a report of what happened.

    Runs are kept as they end: the same command continues a race that was broken off, and Ctrl-C leaves a report.
    """
    try:
        from steepest.lab.race import command as session
        from steepest.lab.shared.errors import BadInput
    except ModuleNotFoundError as missing:
        _fail(f'the race needs {missing.name}; install it with: pip install "steepest[lab]"')
    request = session.Request(
        optimizers=optimizers,
        workload=workload,
        full=full,
        sweep=sweep or [],
        steps=steps,
        seeds=seeds,
        workers=workers or os.cpu_count() or 1,
        out=out,
        fresh=fresh,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        poison=poison,
    )
    try:
        status = session.run(request, Console())
    except BadInput as error:
        _fail(str(error))
    except KeyboardInterrupt:  # before the first trial, or while the report was written
        status = session.INTERRUPTED
    raise typer.Exit(status)


@app.command()
def check(
    optimizer: Annotated[str, typer.Argument(help="module:Class, as torch.optim:AdamW, or one of ours: soap.")],
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help='Another option: "betas=(0.9, 0.95)". Repeat it for more.')
    ] = None,
    dtype: Annotated[str, typer.Option(help="What parameters are: float32, bfloat16, float64.")] = "float32",
    device: Annotated[str, typer.Option(help="Where they are: cpu, cuda.")] = "cpu",
    slow: Annotated[bool, typer.Option("--slow", help="Compile the step, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print verdicts and evidence as JSON.")] = False,
) -> None:
    """Put an optimizer to the contract of PyTorch's optimizers, clause by clause. Exits with 1 if it breaks one."""
    try:
        from steepest.lab.listing import check as checking
        from steepest.lab.shared.errors import BadInput
    except ModuleNotFoundError as missing:
        _fail(f'the check needs {missing.name}; install it with: pip install "steepest[lab]"')
    try:
        options = ({} if lr is None else {"lr": lr}) | checking.parse_options(option or [])
        kept = checking.run(checking.Request(optimizer, options, dtype, device, slow, as_json), Console())
    except BadInput as error:
        _fail(str(error))
    raise typer.Exit(0 if kept else 1)


@app.command()
def optimizers() -> None:
    """List every optimizer: state per entry, work per step, what it is for, its paper; and every recipe."""
    try:
        from steepest.lab.listing import command as listing
    except ModuleNotFoundError as missing:
        _fail(f'the list needs {missing.name}; install it with: pip install "steepest[lab]"')
    listing.print_optimizers(Console())


@app.command()
def routes(
    model_file: Annotated[str, typer.Argument(help="A Python file with a function model() that returns a module.")],
    rule: Annotated[str, typer.Option(help="Who steps hidden matrices: an optimizer or a recipe.")] = "soap",
) -> None:
    """Print which rule steps which parameter of a model, seen as which matrices, and why."""
    try:
        from steepest.lab.listing import command as listing
        from steepest.lab.shared.errors import BadInput
    except ModuleNotFoundError as missing:
        _fail(f'the table needs {missing.name}; install it with: pip install "steepest[lab]"')
    try:
        listing.print_routes(model_file, rule, Console())
    except BadInput as error:
        _fail(str(error))


@app.command()
def plan(
    model_file: Annotated[
        str | None, typer.Argument(help="A Python file with a function model() that returns a module.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="Or well-known models, by size: 124m,1b,7b,70b. Default: all of them.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="Who steps hidden matrices: an optimizer or a recipe.")] = "soap",
    option: Annotated[
        list[str] | None, typer.Option(help="One of its options: precondition_frequency=10. Repeat it for more.")
    ] = None,
    world: Annotated[int, typer.Option(help="Ranks.")] = 8,
    layout: Annotated[
        str,
        typer.Option(help="How parameters lie on them: fsdp, ddp, tp, hsdp:RxS (R replicas of S shards), fsdp+tp:SxT."),
    ] = "fsdp",
    block_size: Annotated[
        int | None,
        typer.Option(help="Cut matrices into blocks of at most so many rows and columns. Default: try some."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of a training step, over all ranks.")] = 2**19,
    dtype: Annotated[str | None, typer.Option(help="Of gradients; the file's own, or bfloat16, if not given.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Predict time, too: on h200, h100, a100, l40s, or here, which is measured first.")
    ] = None,
    mfu: Annotated[
        float, typer.Option(help="Share of the device's peak at which the model is trained, for its part of a step.")
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Simulate how an optimizer's step is shared out among ranks: state, bytes sent, FLOPs, their balance, and time."""
    try:
        from steepest.lab.listing.check import parse_options
        from steepest.lab.plan import command as plan_report
        from steepest.lab.shared.errors import BadInput
    except ModuleNotFoundError as missing:
        _fail(f'the plan needs {missing.name}; install it with: pip install "steepest[lab]"')
    try:
        options = parse_options(option or [])
        request = plan_report.Request(
            model_file, params, optimizer, options, world, layout, block_size, tokens, dtype, gpu, mfu
        )
        plan_report.run(request, Console(), as_json)
    except BadInput as error:
        _fail(str(error))


@app.command()
def spike(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda. TF32 is emulated where a device has none.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the gradients.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report and the figures in it.")] = Path("runs/spike"),
) -> None:
    """Show what a gradient a thousand times too large does to KL-Shampoo's eigenbases, by precision and floor."""
    try:
        from steepest.lab.shared.errors import BadInput
        from steepest.lab.spike import command as spike_session
    except ModuleNotFoundError as missing:
        _fail(f'the study needs {missing.name}; install it with: pip install "steepest[lab]"')
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    try:
        spike_session.run(spike_session.Request(device, seed, out, command), Console())
    except BadInput as error:
        _fail(str(error))


@app.command()
def bench(
    shapes: Annotated[
        str, typer.Option(help="Which matrices: gpt-tiny, gpt2-124m, llama-1b, moe; several with commas.")
    ] = "gpt-tiny",
    optimizers: Annotated[
        str | None,
        typer.Option(
            help='Who steps: "soap-f10, soap-f10(stagger=True), muon"; -f10 sets a frequency. Default: seven.'
        ),
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Beside torch.optim's, pytorch_optimizer's and heavyball's.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="heavyball's compiled, too, as by itself; that takes minutes.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps timed; a multiple of every frequency.")] = 40,
    warmup: Annotated[int | None, typer.Option(help="Steps before. Default: one more than the longest period.")] = None,
    depth: Annotated[int | None, typer.Option(help="Only so many layers of a model.")] = None,
    device: Annotated[str, typer.Option(help="cpu (one thread) or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the report and the figures in it.")] = Path("runs/bench"),
) -> None:
    """Time optimizers' steps on a model's shapes, by phase, in turn, against peers and against the least they take."""
    try:
        from steepest.lab.bench import command as bench_session
        from steepest.lab.shared.errors import BadInput
    except ModuleNotFoundError as missing:
        _fail(f'the bench needs {missing.name}; install it with: pip install "steepest[lab]"')
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    request = bench_session.Request(
        shapes, optimizers, peers, compiled, steps, warmup, depth, device, out, command=command
    )
    try:
        bench_session.run(request, Console())
    except BadInput as error:
        _fail(str(error))


def main() -> None:
    """The entry point."""
    app()


def _fail(message: str) -> NoReturn:
    """One line on stderr, and the exit status of bad input."""
    typer.echo(f"steepest: {message}", err=True)
    raise typer.Exit(BAD_INPUT)


if __name__ == "__main__":
    main()
