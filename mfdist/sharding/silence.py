"""Who is late: what a rank finds out before it gives up waiting.

A collective that times out names nobody. So each rank that gives up writes into the process group's store what it was
waiting in, and reads what the others wrote: those that wrote nothing are not there. In good times this costs nothing.
"""

import contextlib
import time
from collections.abc import Sequence

import torch.distributed as dist

from mfdist.errors import ConsistencyError, MfdistError, UnavailableError

#: How long after the first rank has given up the others may take to say where they are.
_GRACE_S = 3.0
_KEY = "mfdist/gave-up-in/{rank}"


def explain_silence(told: str, ranks: Sequence[int], cause: BaseException, deadline_s: float) -> MfdistError:
    """Return the error for a wait that failed.

    Args:
        told: what this rank was waiting in.
        ranks: global ranks that had to take part.
        cause: what the wait raised.
        deadline_s: how long it may have taken.

    Returns:
        UnavailableError with the ranks that are late or gone, or ConsistencyError with what they do instead.
    """
    store = dist.distributed_c10d._get_default_store()  # the only store every process group has
    own = dist.get_rank()
    with contextlib.suppress(RuntimeError):
        store.set(_KEY.format(rank=own), told)
    missing = [rank for rank in ranks if rank != own]
    where: dict[int, str] = {}
    give_up_at = time.monotonic() + _GRACE_S
    with contextlib.suppress(RuntimeError):  # the store may have gone with the rank that kept it
        while missing and time.monotonic() < give_up_at:
            for rank in list(missing):
                key = _KEY.format(rank=rank)
                if store.check([key]):
                    where[rank] = store.get(key).decode()
                    missing.remove(rank)
            time.sleep(0.02)
    if missing:
        late = ", ".join(map(str, missing))
        return UnavailableError(
            f"all ranks must reach {told} within {deadline_s:g} s; rank {late} did not: late, stopped by an error of "
            f"its own, or gone; see its log ({_first_line(cause)})"
        )
    elsewhere = {rank: told_there for rank, told_there in where.items() if told_there != told}
    if elsewhere:
        rank, told_there = min(elsewhere.items())
        return ConsistencyError(
            f"all ranks must make the same lookups in the same order; rank {own} waits in {told}, rank {rank} in "
            f"{told_there}; look for what in the model depends on the rank or its data"
        )
    return UnavailableError(f"the network must carry {told}; every rank waited in it, and it failed: {cause}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
