"""Assembles the verbs into one command."""

from collections.abc import Sequence
from typing import Annotated

import typer

from mfdist.launch.build import build_facts
from mfdist.launch.cli import bench, checkpoint, failures
from mfdist.launch.cli.attach import attach
from mfdist.launch.cli.bench_checkpoint import bench_checkpoint
from mfdist.launch.cli.bench_decode import bench_decode
from mfdist.launch.cli.bench_layers import bench_layers
from mfdist.launch.cli.bench_learning import bench_learning
from mfdist.launch.cli.bench_plan import bench_plan
from mfdist.launch.cli.bench_server import bench_server
from mfdist.launch.cli.bench_sharding import bench_sharding
from mfdist.launch.cli.bench_size import bench_size
from mfdist.launch.cli.bench_training import bench_training
from mfdist.launch.cli.checkpoint_convert import export_checkpoint, import_checkpoint
from mfdist.launch.cli.doctor import doctor
from mfdist.launch.cli.evaluate import evaluate
from mfdist.launch.cli.generate import generate
from mfdist.launch.cli.launch import NOTES as LAUNCH_NOTES
from mfdist.launch.cli.launch import launch
from mfdist.launch.cli.logs import logs
from mfdist.launch.cli.plan import plan
from mfdist.launch.cli.report import report
from mfdist.launch.cli.scale import scale
from mfdist.launch.cli.serve import serve
from mfdist.launch.cli.status import status
from mfdist.launch.cli.stop import stop
from mfdist.launch.cli.top import top
from mfdist.launch.cli.train import NOTES, train

app = typer.Typer(
    name="mfdist",
    help="Train, run and keep transformers whose layers are lookup tables.",
    epilog="Start here: mfdist train demo --out runs/demo. "
    "Exit codes: 0 done; 1 failed, or stopped before the end; 2 misuse.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=NOTES)(train)
app.command(epilog=LAUNCH_NOTES)(launch)
for verb in (status, attach, logs, scale, stop):
    app.command()(verb)
app.command()(generate)
app.command()(evaluate)
checkpoint.app.command("export")(export_checkpoint)
checkpoint.app.command("import")(import_checkpoint)
app.add_typer(checkpoint.app, name="checkpoint")
bench.app.command("decode")(bench_decode)
bench.app.command("layers")(bench_layers)
bench.app.command("plan")(bench_plan)
bench.app.command("checkpoint")(bench_checkpoint)
bench.app.command("sharding")(bench_sharding)
bench.app.command("learning")(bench_learning)
bench.app.command("size")(bench_size)
bench.app.command("training")(bench_training)
bench.app.command("server")(bench_server)
app.add_typer(bench.app, name="bench")
app.command()(report)
app.command()(plan)
app.command()(serve)
app.command()(top)
app.command()(doctor)


def run(arguments: Sequence[str]) -> int:
    """Run the command line on `arguments` and return its exit code."""
    command = typer.main.get_command(app)
    given = list(arguments)
    ours = given[: given.index("--")] if "--" in given else given
    wants_traceback = "--debug" in ours  # before the verb or behind it: people add it to the line that failed
    words = [word for word in ours if word != "--debug"] + given[len(ours) :]
    return failures.run(
        lambda: command.main(args=words, prog_name="mfdist", standalone_mode=False), wants_traceback=wants_traceback
    )


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version, where it comes from, and exit.", is_eager=True)
    ] = False,
    debug: Annotated[  # taken from the arguments before they are parsed, see `run`
        bool, typer.Option("--debug", help="Show the traceback of every failure; also behind a command.")
    ] = False,
) -> None:
    if version:
        for line in build_facts():
            typer.echo(line)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(failures.MISUSE)
