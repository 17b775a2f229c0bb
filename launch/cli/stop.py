"""`mfdist stop`: end a launched job."""

import time
from pathlib import Path
from typing import Annotated

import typer

from mfdist.errors import UnavailableError
from mfdist.launch.cli import failures

_ANSWER_S = 30.0
_LOOK_S = 0.5


def stop(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a launched run.")],
    now: Annotated[bool, typer.Option("--now", help="Do not save; what is after the last commit is lost.")] = False,
) -> int:
    """Save a launched job and stop it; it can go on later.

    Example: mfdist stop runs/demo

    Returns once nothing of it runs any more.
    """
    from mfdist.launch import cluster, local_cluster
    from mfdist.launch.start import find_job, go_on, supervised

    job = find_job(run)
    if job.cluster.is_ours and now and local_cluster.is_head_alive(job.cluster):
        local_cluster.end_local(job.cluster, at_once=True)
        typer.echo(f"ended; {go_on(job)}")
        return failures.DONE
    with supervised(job) as handle:
        cluster.answer(handle.stop.remote(now), _ANSWER_S)
        while True:
            try:
                state = cluster.answer(handle.watch.remote(-1, 0.0), _ANSWER_S).state
            except UnavailableError:
                state = job.files.read_state()
                if state.get("outcome") is None:
                    raise
            if state["outcome"] is not None:
                break
            time.sleep(_LOOK_S)
    if job.cluster.is_ours:
        local_cluster.wait_for_end(job.cluster, _ANSWER_S)
        local_cluster.end_local(job.cluster)
    typer.echo(f"stopped at step {state['outcome']['step']:,}, which is saved; {go_on(job)}")
    return failures.DONE
