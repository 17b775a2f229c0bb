"""What ranks do in the tests of training; in a module of its own, since their processes import it."""

import signal

from mfdist.training.events import Warned
from mfdist.training.loop import train
from mfdist.training.run import RunDirectory


def trained(rank, path, *overrides):
    """Train a run that is there; return where it stopped, and what was told on this rank."""
    told = []
    stopped = train(RunDirectory.open(path), overrides=overrides, observer=told.append)
    return stopped.step, stopped.reason, [type(event).__name__ for event in told]


def stopped_by_one(rank, path):
    """Train a run of which rank 1 alone is asked to stop after a few steps."""
    run, seen = RunDirectory.open(path), []
    if rank == 1:
        # Rank 1 hears nothing of the run, so it counts its own exchanges by the clock of an alarm.
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
    stopped = train(run, observer=seen.append)
    return stopped.step, stopped.reason, [event.message for event in seen if isinstance(event, Warned)]
