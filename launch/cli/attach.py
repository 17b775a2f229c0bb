"""`mfdist attach`: watch a job that runs by itself."""

from pathlib import Path
from typing import Annotated

import typer


def attach(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a launched run.")],
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON summary on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines, even on a terminal.")] = False,
) -> int:
    """Watch a launched job until it is over; Ctrl-C leaves it, and it goes on.

    Example: mfdist attach runs/demo

    The exit code is that of the job, or 0 after Ctrl-C.
    """
    from mfdist.launch.cli import watching
    from mfdist.launch.start import find_job

    return watching.watch(find_job(run), is_quiet=quiet, as_json=as_json, stops_job=False)
