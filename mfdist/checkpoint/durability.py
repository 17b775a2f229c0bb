"""Waiting until something is on disk."""

import os
import threading
from pathlib import Path
from typing import TypeAlias

from mfdist.checkpoint.direct_io import write_directly

Bytes: TypeAlias = bytes | bytearray | memoryview

#: Files that are open at a time because they may not be on disk yet.
MAX_UNSYNCED = 64
_SMALL_BYTES = 64 << 10  # not worth the questions


def fsync(path: Path) -> None:
    """Wait until a file's contents, or a directory's list of names, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, *parts: Bytes) -> int:
    """Write a new file, and have the disk begin with it; return it open.

    What lies in whole pages of memory (PageMemory) is written past the page cache, where the file system can.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for part in parts:
            left = memoryview(part)
            if len(left) >= _SMALL_BYTES:
                left = left[write_directly(fd, left) :]
            while left:  # a single call writes 2 GiB at most
                left = left[os.write(fd, left) :]
        if hasattr(os, "posix_fadvise"):  # on Linux this starts writing, and waits for nothing
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except BaseException:
        os.close(fd)
        raise
    return fd


class UnsyncedFiles:
    """Files that were written, open until they are on disk; any thread may call.

    Many are synced in a row, some time after they were written: that keeps the disk busy, and one commit of the file
    system's journal does for them all. They stay open, because an error of the disk is told to those who had the file
    open when it happened.
    """

    def __init__(self) -> None:
        self._files: list[tuple[int, Path]] = []
        self._lock = threading.Lock()

    def add(self, fd: int, path: Path) -> None:
        """Take over a file; where there are many, wait until they are on disk."""
        with self._lock:
            self._files.append((fd, path))
            taken = self._files if len(self._files) >= MAX_UNSYNCED else []
            if taken:
                self._files = []
        _sync(taken)

    def sync(self) -> None:
        """Wait until all that were added are on disk.

        Raises:
            OSError: the disk failed; which names the file. All are closed.
        """
        with self._lock:
            taken, self._files = self._files, []
        _sync(taken)

    def close(self) -> None:
        """Close all without waiting; what was written may be lost."""
        with self._lock:
            taken, self._files = self._files, []
        for fd, _ in taken:
            os.close(fd)


def _sync(files: list[tuple[int, Path]]) -> None:
    failed: OSError | None = None
    for fd, path in files:
        try:
            if failed is None:
                os.fsync(fd)
        except OSError as error:
            failed = OSError(error.errno, error.strerror, str(path))
        finally:
            os.close(fd)
    if failed is not None:
        raise failed
