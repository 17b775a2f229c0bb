"""One writer at a time: an advisory lock on a file in the checkpoint directory, released by the kernel at death."""

import contextlib
import fcntl
import functools
import os
import socket
import weakref
from pathlib import Path

from mfdist.errors import CheckpointError, UnavailableError

LOCK_NAME = ".writer.lock"


class WriterLock:
    """An exclusive `flock` on `directory/.writer.lock`, held from construction to `release`.

    The file stays when the lock is released: deleting it would let two writers lock two files of the same name.

    Raises:
        UnavailableError: another writer holds it. Nothing was changed; try again when that writer is done.
        CheckpointError: the lock file cannot be opened.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_NAME
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint directory must be writable; cannot open {self._path} ({error.strerror}); "
                "check its permissions and its disk."
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "an unnamed process"
            os.close(self._fd)
            if not isinstance(error, BlockingIOError):
                raise CheckpointError(
                    f"a checkpoint directory must be on a file system with locks; cannot lock {self._path} "
                    f"({error.strerror}); move it to another."
                ) from error
            raise UnavailableError(
                f"one writer at a time may use {directory}; {holder} is writing to it; "
                "wait for it or stop it, or choose another directory."
            ) from error
        _closed_in_children().add(self)
        # The name of the holder is a courtesy; a disk too full for it must not stop `prune` from making room.
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def is_in_place(self) -> bool:
        """Say whether the locked file still is the one in the directory, i.e. nobody deleted the directory."""
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Let the next writer in."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@functools.cache
def _closed_in_children() -> "weakref.WeakSet[WriterLock]":
    """Return the locks whose copies forked processes close; they would else keep them after this process has died."""
    locks: weakref.WeakSet[WriterLock] = weakref.WeakSet()

    def close_copies() -> None:
        for lock in locks:
            lock.release()  # which leaves the parent's lock as it is

    os.register_at_fork(after_in_child=close_copies)
    return locks
