"""One supervisor at a time for a run: a lock on its folder, let go by the kernel at death."""

import contextlib
import fcntl
import os
import shlex
import socket
from pathlib import Path

from mfdist.errors import UnavailableError


class Holding:
    """The lock, held from construction to `release`.

    Args:
        folder: RUN/launch.

    Raises:
        UnavailableError: another holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / ".supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self._fd)
            run = folder.parent
            told = shlex.quote(str(run))
            raise UnavailableError(
                f"one job at a time may train a run; {run} belongs to a live job ({holder}); "
                f"look at it by mfdist attach {told}, or end it by mfdist stop {told}"
            ) from None
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"supervisor pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let the next one in."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def is_held(folder: Path) -> bool:
    """Return whether a supervisor lives that holds a run's folder."""
    if not (folder / ".supervisor.lock").exists():
        return False
    try:
        Holding(folder).release()
    except UnavailableError:
        return True
    return False
