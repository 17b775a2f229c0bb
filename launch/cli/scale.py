"""`mfdist scale`: more or fewer trainers for a job that runs."""

from pathlib import Path
from typing import Annotated

import typer

from mfdist.launch.cli import failures

_ANSWER_S = 30.0


def scale(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a launched run.")],
    trainers: Annotated[int, typer.Option(min=1, metavar="N", help="How many trainers there are to be.")],
) -> int:
    """Let a launched job save and go on with another number of trainers.

    Example: mfdist scale runs/demo --trainers 6
    """
    from mfdist.launch import cluster
    from mfdist.launch.start import find_job, supervised

    with supervised(find_job(run)) as handle:
        cluster.answer(handle.scale.remote(trainers), _ANSWER_S)
    typer.echo(f"the job saves its step and goes on with {trainers} trainer{'s' if trainers > 1 else ''}")
    return failures.DONE
