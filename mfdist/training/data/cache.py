"""A folder that is made once: whatever is killed or started at the same time, it is whole or not there."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mfdist.checkpoint.durability import fsync
from mfdist.errors import DataError, UnavailableError

_WAIT_S = 24 * 3600.0
_POLL_S = 0.2


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/mfdist`, or `~/.cache/mfdist`."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path("~/.cache").expanduser()) / "mfdist"


def make_once(target: Path, make: Callable[[Path], None], *, on_wait: Callable[[str], None]) -> None:
    """Make the folder `target` unless it is there.

    Of processes that call this at the same time one works and the others wait. The folder is filled beside its place
    and appears by one rename; what a killed process left is cleared away by the next.

    Args:
        target: the folder.
        make: fills the empty folder it is given.
        on_wait: told once who is waited for.

    Raises:
        DataError: writing failed (disk full, no permission); nothing is left.
        UnavailableError: another process has been at it for a day; a retry is safe.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(target.with_name(f".{target.name}.lock"), on_wait):
            shutil.rmtree(partial, ignore_errors=True)  # nobody else is at work, so a killed process left it
            if target.exists():
                return
            try:
                partial.mkdir()
                make(partial)
                for path in [*partial.iterdir(), partial]:
                    fsync(path)
                partial.rename(target)
                fsync(target.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except UnavailableError:  # refines ConnectionError, which is an OSError
        raise
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DataError(
            f"tokenised text must be written; {target.parent} does not allow it: {error.strerror or error};"
            f" {'free some space, or set data.cache_dir' if is_full else 'set data.cache_dir'} to another folder"
        ) from None


@contextmanager
def _one_at_a_time(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file at `path`; the system frees it when its holder dies."""
    with path.open("a+b") as lock:
        deadline = time.monotonic() + _WAIT_S
        has_told = False
        while not _try_lock(lock):
            lock.seek(0)
            holder = lock.read().decode("ascii", "replace") or "unknown"
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{path} must become free; process {holder} has held it for a day; end it and try again"
                )
            if not has_told:
                on_wait(f"waiting for process {holder}, which prepares the same text")
                has_told = True
            time.sleep(_POLL_S)
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        yield


def _try_lock(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
