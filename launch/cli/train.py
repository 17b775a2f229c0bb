"""`mfdist train`: start a run from a configuration, or go on with one."""

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist import idle_threads
from mfdist.config import RunConfig, load_config
from mfdist.errors import ConfigError
from mfdist.launch.cli import failures, wording
from mfdist.launch.cli.display import showing
from mfdist.launch.cli.json_output import write_json
from mfdist.launch.cli.keys import as_toml
from mfdist.launch.cli.progress import RunProgress

if TYPE_CHECKING:
    from mfdist.training.run import RunDirectory
    from mfdist.training.table_home import TableHome

#: What the help says of the shipped presets; a test holds the names to mfdist.config.preset_names().
PRESETS = {
    "demo": "learns Python's documentation and sources in minutes on two CPU cores",
    "tiny": "the paper's tiny shape, for one GPU",
    "small": "the paper's small shape, for one GPU",
    "base": "the paper's base shape, for one GPU",
}

_CONFIG_HELP = "A TOML file, or a preset: " + "; ".join(f"{name} ({what})" for name, what in PRESETS.items()) + "."
_SET_HELP = (
    "Set a key of the configuration, as section.key=value, such as model.bits=10; may be given many times. "
    "RUN/config.toml shows every key of a run; --keys prints them with their defaults and meanings."
)

#: Ends the help of `train`.
NOTES = (
    "Ctrl-C and SIGTERM finish the step, save it and say how to go on; the exit code is then 1, because the run is not "
    "done. A second Ctrl-C stops at once, without saving."
)


def train(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help=_CONFIG_HELP, show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="Folder to make for the run.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run, from its last step.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps in all, those of an earlier start included.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="S", help="Seed of the weights and of the order of the data.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Where to train.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=_SET_HELP)] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="Print a CONFIG with every key, its default and its meaning, and end.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON summary on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines, even on a terminal.")] = False,
) -> int:
    """Train a model on text, or go on with a run.

    Example: mfdist train demo --out runs/demo

    Example: mfdist train --resume runs/demo --steps 800
    """
    if keys:
        for line in as_toml(RunConfig):
            typer.echo(line)
        return failures.DONE
    overrides = list(settings or ())
    overrides += [f"training.steps={steps}"] if steps is not None else []
    overrides += [f"training.seed={seed}"] if seed is not None else []
    overrides += [f"training.device={device}"] if device is not None else []
    idle_threads.sleep()
    if resume is not None:
        if config is not None or out is not None:
            extra = "--out" if config is None else f'the configuration "{config}"'
            raise ConfigError(
                f"--resume goes on with a run in its own folder, as it was configured; got {extra} too; leave it out"
            )
        return _go_on(resume, overrides, as_json=as_json, is_quiet=quiet)
    if config is None:
        raise ConfigError(
            "train needs a configuration or a run: mfdist train demo --out RUN, or mfdist train --resume RUN"
        )
    if out is None:
        raise ConfigError(f"a new run needs a folder; give one: mfdist train {config} --out RUN")
    return _start(out, load_config(config, overrides), as_json=as_json, is_quiet=quiet)


# torch and numba come with mfdist.training, and only once the command is known to make sense.


def _start(path: Path, config: RunConfig, *, as_json: bool, is_quiet: bool) -> int:
    from mfdist.training.run import RunDirectory
    from mfdist.training.world import joined

    with joined(config) as world:
        world.on_first(lambda: RunDirectory.create(path, config))
        return _train(RunDirectory.open(path), (), is_first=world.is_first, as_json=as_json, is_quiet=is_quiet)


def _go_on(path: Path, overrides: list[str], *, as_json: bool, is_quiet: bool) -> int:
    from mfdist.training.run import RunDirectory
    from mfdist.training.world import joined

    run = RunDirectory.open(path)
    with joined(run.config_with(overrides)) as world:
        return _train(run, overrides, is_first=world.is_first, as_json=as_json, is_quiet=is_quiet)


def _train(run: "RunDirectory", overrides: Sequence[str], *, is_first: bool, as_json: bool, is_quiet: bool) -> int:
    """Train, and show it on the first of the ranks; the others have nothing to say."""
    # torch's profiler, which measures the share of the lookups, would write on stderr, across the display.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from mfdist.training.events import ignore
    from mfdist.training.loop import train as train_run

    progress = RunProgress()
    stream = sys.stderr if as_json else sys.stdout
    try:
        with (
            _table_home(run.config_with(overrides)) as table_home,
            showing(stream, progress, is_quiet=is_quiet) if is_first else nullcontext(ignore) as observer,
        ):
            stopped = train_run(run, overrides=overrides, observer=observer, table_home=table_home)
    except KeyboardInterrupt:
        resume = f"mfdist train --resume {wording.quoted(run.path)}"
        return failures.fail(f"stopped without saving; go on from the last checkpoint: {resume}")
    if as_json and is_first:
        write_json(progress.summary())
    return failures.DONE if stopped.reason == "finished" else failures.FAILED


def _table_home(config: RunConfig) -> AbstractContextManager["TableHome | None"]:
    """Return where the tables lie, to be let go at the end; None: in the ranks."""
    if not config.servers.addresses or config.model.kind != "memory":
        return nullcontext()
    from mfdist.table_server.run_tables import ServedTables

    return closing(ServedTables(config))
