"""Watching a job from a terminal: its training and its actors, until it is over or the watcher leaves."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mfdist.errors import OUTCOMES, UnavailableError
from mfdist.launch import cluster, local_cluster
from mfdist.launch.cli import failures, wording
from mfdist.launch.cli.display import showing
from mfdist.launch.cli.job_view import JobView
from mfdist.launch.cli.json_output import write_json
from mfdist.launch.cli.progress import RunProgress
from mfdist.launch.job import Job
from mfdist.launch.start import go_on, supervised
from mfdist.training.events import Noted, Observer

_WAIT_S = 0.5
_ANSWER_S = 30.0
_END_S = 15.0
_AWAY_S = 60.0  # how long a supervisor may be on its way back


@dataclass
class _Asked:
    """How often somebody pressed Ctrl-C."""

    times: int = 0


def watch(job: Job, *, is_quiet: bool, as_json: bool, stops_job: bool) -> int:
    """Show a job until it is over; return the exit code.

    Args:
        job: which.
        is_quiet: plain lines, even on a terminal.
        as_json: end with one JSON document on stdout.
        stops_job: Ctrl-C stops the job; else it only stops watching.
    """
    progress = RunProgress(verb="launch")
    view = JobView()
    stream = sys.stderr if as_json else sys.stdout
    with supervised(job) as handle, showing(stream, progress, is_quiet=is_quiet, below=view) as display:
        state = _follow(job, handle, display, view, from_start=stops_job, stops_job=stops_job)
    if state is None:
        sys.stderr.write(f"the job goes on; mfdist attach {wording.quoted(Path(job.run))} comes back to it\n")
        return failures.DONE
    if job.cluster.is_ours:
        is_over = state["outcome"] is not None
        if is_over:
            local_cluster.wait_for_end(job.cluster, _END_S)
        local_cluster.end_local(job.cluster, at_once=not is_over)
    outcome = state["outcome"] or {"reason": "stopped", "cause": "", "kind": ""}
    if as_json:
        write_json({**progress.summary(), "reason": outcome["reason"], "job": state})
    if outcome["reason"] == "failed":
        code, _ = OUTCOMES.get(outcome["kind"], (failures.FAILED, ""))
        return failures.fail(f"{outcome['cause']}; {go_on(job)}", code)
    return failures.DONE if outcome["reason"] == "finished" else failures.FAILED


def _follow(
    job: Job, handle: Any, display: Observer, view: JobView, *, from_start: bool, stops_job: bool
) -> dict[str, Any] | None:
    """Show what happens until the job is over; return its last state, or None where the watcher leaves before."""
    position, done, phase = (0 if from_start else -1), 0, ""
    with _asked() as asked:
        while True:
            if asked.times > done:
                if not stops_job:
                    return None
                done = asked.times
                if _stop(job, handle, display, at_once=done > 1):
                    return {"outcome": None}
            seen = _seen(job, handle, position)
            position = seen.position
            view.update(seen.state)
            for event in seen.events:
                display(event)
            if seen.state["phase"] != phase:
                phase = seen.state["phase"]
                display(Noted(message=phase))
            if seen.state["outcome"] is not None and not seen.events:
                return dict(seen.state)


def _stop(job: Job, handle: Any, display: Observer, *, at_once: bool) -> bool:
    """Ask the job to stop; return whether there is nothing more to wait for."""
    if at_once:
        display(Noted(message="ending the job at once"))
        with contextlib.suppress(UnavailableError):
            cluster.answer(handle.stop.remote(True), 2.0)
        return job.cluster.is_ours  # whose processes are ended once this one has left it: Ray waits for a dead cluster
    display(Noted(message="saving and stopping; press Ctrl-C again to end it at once"))
    cluster.answer(handle.stop.remote(False), _ANSWER_S)
    return False


def _seen(job: Job, handle: Any, position: int) -> Any:
    until = time.monotonic() + _AWAY_S
    while True:
        try:
            return cluster.answer(handle.watch.remote(position, _WAIT_S), _ANSWER_S)
        except UnavailableError as error:
            state = job.files.read_state()
            if state.get("outcome") is not None:
                from mfdist.launch.supervisor import Watched

                return Watched(events=(), position=position, state=state)
            is_gone = job.cluster.is_ours and not local_cluster.is_head_alive(job.cluster)
            if is_gone or time.monotonic() > until:
                raise UnavailableError(f"the job in {job.run} cannot be reached: {error}; {go_on(job)}") from None
            time.sleep(_WAIT_S)


@contextlib.contextmanager
def _asked() -> Iterator[_Asked]:
    """Count Ctrl-C and SIGTERM while the body runs."""
    asked = _Asked()

    def count(number: int, frame: FrameType | None) -> None:
        asked.times += 1

    before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
