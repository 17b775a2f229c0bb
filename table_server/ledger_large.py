"""The large pushes of a segment of the log: a plain file, written past the page cache where the file system can.

By way of the cache every byte would be copied once more, into memory that is taken from others for what is hardly ever
read again.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from mfdist.checkpoint.direct_io import PAGE, PageMemory, write_directly
from mfdist.checkpoint.durability import Bytes

_AT_ONCE_BYTES = 4 << 20  # more in one call is not faster

_fdatasync = getattr(os, "fdatasync", os.fsync)  # Linux has it


class LargePushes:
    """The file. One thread writes, if it was opened for that; any may read.

    Args:
        path: of the file, which may be missing where nothing is written.
        memory: to write from; none to read alone.
    """

    def __init__(self, path: Path, memory: PageMemory | None = None) -> None:
        self._fd = os.open(path, os.O_RDWR if memory else os.O_RDONLY) if path.exists() else -1
        self._memory = memory

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the file."""
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    def write(self, payloads: Sequence[Sequence[Bytes]], place: int) -> list[int]:
        """Write pushes, each of them parts, one after the other; return where each begins, on disk by then.

        Args:
            payloads: at least one.
            place: of the first, in whole pages; see `end_of`.

        Raises:
            OSError: the disk is full or fails. The same may be tried again at the same place.
        """
        assert self._memory is not None
        memory, filled, places = self._memory.of(_AT_ONCE_BYTES), 0, []
        for parts in payloads:
            places.append(place + filled)
            for part in parts:
                left = memoryview(part)
                while left:
                    taken = left[: len(memory) - filled]
                    memory[filled : filled + len(taken)] = taken
                    left, filled = left[len(taken) :], filled + len(taken)
                    if filled == len(memory):
                        self._write(memory, place)
                        place, filled = place + filled, 0
        self._write(memory[: end_of(filled)], place)
        _fdatasync(self._fd)
        return places

    def read(self, place: int, num_bytes: int) -> bytes:
        """Return what lies there; less where the file ends."""
        return os.pread(self._fd, num_bytes, place)

    def close(self) -> None:
        """Let the file go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, content: memoryview, place: int) -> None:
        os.lseek(self._fd, place, os.SEEK_SET)
        left = content[write_directly(self._fd, content) :]
        while left:
            left = left[os.write(self._fd, left) :]


def end_of(place: int) -> int:
    """Return the end of the page that something ends in, where the next group begins."""
    return -(-place // PAGE) * PAGE
