"""`mfdist status`: what a launched job does, or last did."""

from pathlib import Path
from typing import Annotated

import typer

from mfdist.errors import ConfigError, UnavailableError
from mfdist.launch.cli import failures
from mfdist.launch.cli.job_view import described
from mfdist.launch.cli.json_output import write_json


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a launched run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document on stdout.")] = False,
) -> int:
    """Show a launched job: its step, its actors and where they are, what failed.

    Example: mfdist status runs/demo --json

    Reads the run's folder alone, where the supervisor stores its state every second. The exit code is 1 if the job does
    not run and has not finished.
    """
    from mfdist.launch.start import check_alive, find_job

    job = find_job(run)
    state = job.files.read_state()
    if not state:
        raise ConfigError(f"the job in {job.run} has not begun yet; ask again in a few seconds")
    trouble = ""
    if state["outcome"] is None:
        try:
            check_alive(job)
        except UnavailableError as error:
            trouble = str(error)
    if as_json:
        write_json({**state, "is_alive": state["outcome"] is None and not trouble})
    else:
        for line in described(state):
            typer.echo(line)
    if trouble:
        return failures.fail(trouble)
    outcome = state["outcome"]
    return failures.FAILED if outcome is not None and outcome["reason"] != "finished" else failures.DONE
