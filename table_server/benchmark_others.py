"""How much of the machine other programs use while something is measured: half of the cores halves what is found."""

import os
import time
from collections.abc import Iterable

import psutil

#: Cores of other programs from which on figures are not to be trusted.
MANY_CORES = 0.1

_NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")  # the last two are in user and nice already


class Others:
    """Counts from its making on. This process's children are not others; those that end must be waited for."""

    def __init__(self) -> None:
        self._began_s, self._busy_s, self._own_s = time.monotonic(), _busy_s(), _own_s()

    def cores(self) -> float:
        """Return how many cores others have used on average, of which the system itself is one."""
        passed_s = time.monotonic() - self._began_s
        used_s = (_busy_s() - self._busy_s) - (_own_s() - self._own_s)
        return max(0.0, used_s) / max(passed_s, 1e-3)


def said_of(cores: Iterable[float]) -> str:
    """Return what to say of others' cores, of one measurement or of several; nothing if there were few."""
    most = max(cores, default=0.0)
    if most < MANY_CORES:
        return ""
    return (
        f"other programs used up to {most:.1f} of {os.cpu_count()} cores meanwhile; "
        "figures are of what they left: measure again without them"
    )


def _busy_s() -> float:
    times = psutil.cpu_times()._asdict()
    return float(sum(seconds for name, seconds in times.items() if name not in _NOT_BUSY))


def _own_s() -> float:
    """Return the processor time of this process and of its children, those that have ended included."""
    this = psutil.Process()
    times = this.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in this.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return float(total)
