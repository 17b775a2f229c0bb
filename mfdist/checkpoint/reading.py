"""Reading whole files fast: from the page cache what is in it, past it what is not."""

import os
from pathlib import Path

from mfdist.checkpoint.direct_io import read_directly

_SMALL_BYTES = 64 << 10  # not worth the questions


def read_file(path: Path, buffer: memoryview) -> int:
    """Fill `buffer` with a file's contents as far as they go; return the file's size.

    PageMemory is filled past the page cache where the file is not in it; any other by way of it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        left = buffer[: min(size, len(buffer))]
        if len(left) >= _SMALL_BYTES and not _is_cached(fd, size):
            left = left[read_directly(fd, buffer, len(left)) :]
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
