"""Reading and writing past the page cache, in memory that suits it.

By way of the cache every byte is copied once more, into memory that is taken from everyone else for what nobody reads
again.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

import numpy as np

PAGE = mmap.PAGESIZE
_HUGE_BYTES = 2 << 20
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


class PageMemory:
    """Memory on page boundaries for one file after another; it grows to the largest.

    It is in huge pages where the system has them: a disk is told of each piece of memory that is contiguous, which are
    256 for a MiB of small pages and one of a huge one. Called on: one thread.
    """

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def of(self, num_bytes: int) -> memoryview:
        """Return memory for a file of this size, in whole pages; the next call may return the same."""
        if len(self._memory) < num_bytes or not self._memory:
            size = max(-(-num_bytes // _HUGE_BYTES), 1) * _HUGE_BYTES
            mapped = mmap.mmap(-1, size + _HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # only advice: where it is refused the pages stay small
                    mapped.madvise(mmap.MADV_HUGEPAGE)
            begin = -_address(memoryview(mapped)) % _HUGE_BYTES
            self._memory = memoryview(mapped)[begin : begin + size]
        return self._memory


def read_directly(fd: int, buffer: memoryview, num_bytes: int) -> int:
    """Read the file's beginning past the page cache; return how much that gave: nothing where it is not possible."""
    whole_pages = buffer[: min(-(-num_bytes // PAGE) * PAGE, len(buffer) // PAGE * PAGE)]
    with _past_the_cache(fd) as is_possible:
        return min(num_bytes, os.preadv(fd, [whole_pages], 0)) if is_possible else 0
    return 0


def write_directly(fd: int, content: memoryview) -> int:
    """Write the whole pages of `content` past the page cache; return how much was: nothing where it is not possible."""
    whole_pages, written = content[: len(content) // PAGE * PAGE], 0
    if not _address(content) % PAGE:
        with _past_the_cache(fd) as is_possible:
            while is_possible and written < len(whole_pages):
                written += os.write(fd, whole_pages[written:])
    return written


@contextlib.contextmanager
def _past_the_cache(fd: int) -> Iterator[bool]:
    """Let a file be read and written past the page cache; end the block early where the file system cannot."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    is_possible = bool(_O_DIRECT)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _O_DIRECT)
    except OSError:
        is_possible = False
    try:
        yield is_possible
    except OSError as error:
        if error.errno != errno.EINVAL:  # not on this file system, or not into this memory
            raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data) if len(memory) else 0
