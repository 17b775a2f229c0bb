"""What ranks measure by a clock that their work itself moves; a module of its own, since their processes import it."""

import torch
from torch.distributed.device_mesh import init_device_mesh

from mfdist.benchmarks.ranks_clock import RanksClock
from mfdist.sharding.mesh import MeshExchanges


class HandClock:
    """A clock that stands still but for work, and remembers whose it was."""

    def __init__(self):
        self.now_s, self.done = 0.0, []

    def __call__(self):
        return self.now_s

    def work(self, name, *seconds):
        """Return work that takes so long each time it is done; of several times, the next one, then the last again."""
        left = list(seconds)

        def work():
            self.now_s += left.pop(0) if len(left) > 1 else left[0]
            self.done.append(name)

        return work


def _timed_by(clock, turns):
    exchanges = MeshExchanges(init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return RanksClock(exchange=exchanges.everyone, device=exchanges.device, turns=turns, clock=clock)


def in_turns(rank, seconds_of_ranks):
    """Return the times of works of which each rank takes its own seconds, and in which order they were done."""
    clock = HandClock()
    works = [clock.work(name, *seconds) for name, seconds in seconds_of_ranks[rank].items()]
    found = _timed_by(clock, turns=3).seconds_in_turns(works)
    return found, clock.done


def behind_other_work(rank, busy_s, work_s):
    """Return what work takes on the ranks behind other work, and how often each was done."""
    clock = HandClock()
    work, busy = clock.work("work", work_s[rank]), clock.work("busy", busy_s)
    found = _timed_by(clock, turns=2).queued_seconds(work, busy)
    return found, clock.done.count("work"), clock.done.count("busy")
