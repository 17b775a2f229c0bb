"""How long work takes that all ranks of an exchange do together, and what of it is the accelerator's alone.

Of several turns the quickest counts, since what else a machine does only ever makes one slower, and of the ranks the
median; every rank gets the same figure.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mfdist.sharding.exchange import Exchange
from mfdist.sharding.tags import Call
from mfdist.sharding.under_way import Opened

#: What an accelerator does first while its host queues so many pieces of work behind it. Sixty-four copies of a GiB are
#: 30 ms of an H200; a host takes 0.5 ms or less for a send.
_BUSY_TIMES, _QUEUED = 64, 24


@dataclass(frozen=True, kw_only=True)
class RanksClock:
    """All ranks of an exchange, in step with each other.

    Args:
        exchange: of the ranks; its payload's device is `device`.
        device: what works.
        turns: how often work is timed, besides a first time, which compiles.
        clock: seconds.

    Called on: every method on all ranks, with the same work.
    """

    exchange: Exchange
    device: torch.device
    turns: int
    clock: Callable[[], float]

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the time of `work`, begun by all ranks together each time."""
        return self.seconds_in_turns([work])[0]

    def seconds_in_turns(self, works: Sequence[Callable[[], object]]) -> list[float]:
        """Return the time of each work, one after the other in every turn.

        So it is in a model: a host takes longer to start what it did not start just before.

        Args:
            works: as many as an exchange tells counts at once, six.
        """
        taken: list[list[float]] = [[] for _ in works]
        for _ in range(self.turns + 1):
            for work, times in zip(works, taken, strict=True):
                self.finish()
                self.begin("start").wait()
                began = self.clock()
                work()
                self.finish()
                times.append(self.clock() - began)
        quickest = self.begin("result", [round(min(times[1:]) * 1e9) for times in taken]).wait()
        by_work = list(zip(*quickest, strict=True))[: len(works)]
        return [statistics.median(nanoseconds) * 1e-9 for nanoseconds in by_work]

    def queued_seconds(self, work: Callable[[], object], busy: Callable[[], object]) -> float:
        """Return what an accelerator takes for `work` that its host has sent it long before.

        What the host takes to send it is no part of that, as long as the accelerator is at `busy` meanwhile. A CPU does
        everything when it is asked to, so that there it is simply the time of `work`.

        Args:
            work: sent, and waited for by the accelerator alone.
            busy: work of half a millisecond or so, nearly the same each time.
        """

        def behind(times: int) -> Callable[[], None]:
            def run() -> None:
                for _ in range(_BUSY_TIMES):
                    busy()
                for _ in range(times):
                    work()

            return run

        few, many = self.seconds_in_turns([behind(1), behind(1 + _QUEUED)])
        return (many - few) / _QUEUED

    def begin(self, what: str, counts: Sequence[int] = ()) -> Opened:
        """Tell the other ranks of what is begun, and a few numbers."""
        return self.exchange.open(Call(table=what, kind="calibration", phase="check"), list(counts))

    def finish(self) -> None:
        """Wait for what a GPU has been asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
