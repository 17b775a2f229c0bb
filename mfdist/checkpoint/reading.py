"""Reading whole files fast: from the page cache what is in it, past it what is not.

Going through the cache costs a copy and memory for what nobody reads again; past it, a disk gave twice as much, for a
third of the processor time.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path

_PAGE = mmap.PAGESIZE
_SMALL_BYTES = 64 << 10  # not worth the questions


class ReadBuffer:
    """Memory on page boundaries that files are read into, one after another; it grows to the largest.

    Called on: one thread.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _PAGE)

    def of(self, num_bytes: int) -> memoryview:
        """Return memory for a file of this size; the next call may return the same."""
        if len(self._memory) < num_bytes:
            self._memory = mmap.mmap(-1, -(-num_bytes // _PAGE) * _PAGE)
        return memoryview(self._memory)


def read_file(path: Path, buffer: memoryview) -> int:
    """Fill `buffer` with a file's contents as far as they go; return the file's size.

    Memory of a ReadBuffer is filled past the page cache where the file is not in it; any other by way of it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        left = buffer[: min(size, len(buffer))]
        if len(left) >= _SMALL_BYTES and not _is_cached(fd, size):
            left = left[_read_directly(fd, buffer, len(left)) :]
        while left and (read := os.preadv(fd, [left], min(size, len(buffer)) - len(left))):
            left = left[read:]
        return size - len(left)
    finally:
        os.close(fd)


def _is_cached(fd: int, size: int) -> bool:
    """Say whether the file's end is in the page cache, or this cannot be known."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    try:
        os.preadv(fd, [bytearray(1)], size - 1, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # the file system cannot tell
        return True
    return True


def _read_directly(fd: int, buffer: memoryview, num_bytes: int) -> int:
    """Read the file's beginning past the page cache; return how much that gave: nothing where it is not possible."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    whole_pages = buffer[: min(-(-num_bytes // _PAGE) * _PAGE, len(buffer) // _PAGE * _PAGE)]
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        return min(num_bytes, os.preadv(fd, [whole_pages], 0))
    except OSError as error:
        if error.errno == errno.EINVAL:  # not on this file system, or not into this memory
            return 0
        raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
